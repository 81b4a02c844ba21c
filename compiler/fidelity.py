"""What `torch.export` would change in silence is refused here, and what was captured is compared with the eager model."""

from __future__ import annotations

import functools
import linecache
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.traceback
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from ..passes.normalize.promote import double, promote_casts
from . import control_flow, torch_compat
from .call_structure import describe_output, split_target
from .capture_error import CaptureError
from .custom_functions import NotElementwise, replaced, with_slopes

if TYPE_CHECKING:
    from .capture import Captured

TORCH_ROOT = os.path.dirname(str(torch.__file__)) + os.sep
aten = torch.ops.aten
HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@functools.cache
def is_user_file(filename: str) -> bool:
    """True of code that is neither torch's nor this compiler's."""
    path = os.path.abspath(filename)
    return not (filename.startswith("<") or path.startswith((TORCH_ROOT, HERE)))


def line_of(filename: str, line: int) -> str:
    return f"{filename}:{line}: {linecache.getline(filename, line).strip()}"


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def user_frame(start: FrameType | None) -> FrameType | None:
    """The innermost frame of user code, from `start` outwards."""
    return next((f for f in frames_from(start) if is_user_file(f.f_code.co_filename)), None)


def calling_line() -> str | None:
    """The innermost user line on the Python stack."""
    frame = user_frame(sys._getframe(1))
    return line_of(frame.f_code.co_filename, frame.f_lineno) if frame else None


def line_of_traceback(traceback: TracebackType | None) -> str | None:
    """The innermost user line of a traceback."""
    found = None
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if is_user_file(filename):
            found = line_of(filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def files_of_traceback(traceback: TracebackType | None) -> Iterator[str]:
    """The files of torch's frames of a traceback, outermost first, relative to torch."""
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if filename.startswith(TORCH_ROOT):
            yield filename.removeprefix(TORCH_ROOT).replace(os.sep, "/")
        traceback = traceback.tb_next


def on_gpus(traceback: TracebackType | None, source: str | None) -> CaptureError | None:
    """The refusal of what torch has on GPUs alone, where an error was raised within it."""
    for name in files_of_traceback(traceback):
        if name in control_flow.ON_GPUS:
            what, way_out = control_flow.ON_GPUS[name]
            return CaptureError(f"the forward uses {what}", source, way_out)
    return None


def draws_truncated(traceback: TracebackType | None) -> bool:
    """Whether an error was raised within `nn.init.trunc_normal_`."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "_no_grad_trunc_normal_":
            return True
        traceback = traceback.tb_next
    return False


def truncated(source: str | None) -> CaptureError:
    return CaptureError(
        "the forward draws from a truncated normal distribution, which torch does by trying again until the numbers fit",
        source,
        "draw through the inverse: torch.erfinv of torch.rand, scaled to the interval; initialize parameters outside the forward",
    )


def line_of_stack_trace(stack_trace: str | None) -> str | None:
    """The innermost user line of a node's `stack_trace`, as `file:line: code`."""
    lines = (stack_trace or "").splitlines()
    found = None
    for k, line in enumerate(lines):
        text = line.strip()
        if text.startswith('File "') and ", line " in text:
            filename, _, rest = text[6:].partition('", line ')
            number = rest.split(",")[0].split()[0]
            if is_user_file(filename):
                code = lines[k + 1].strip() if k + 1 < len(lines) else ""
                found = f"{filename}:{number}: {code}"
    return found


IN_PLACE_ALLOWED_NAMES = frozenset({"requires_grad_", "retain_grad"})
DATA = Tensor.data.__get__  # type: ignore[attr-defined]
HOOKS = frozenset({Tensor.register_hook, Tensor.register_post_accumulate_grad_hook})
GRADIENT_CALLS = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})


def custom_functions() -> dict[CodeType, type[Function]]:
    """The code of `forward` of every autograd Function that a user may have written, and the Function."""
    found: dict[CodeType, type[Function]] = {}
    stack: list[type[Function]] = [Function]
    while stack:
        for cls in stack.pop().__subclasses__():
            stack.append(cls)
            forward = cls.__dict__.get("forward")
            code = getattr(getattr(forward, "__func__", forward), "__code__", None)
            if code is not None and not torch_compat.is_registered_autograd(cls):
                found[code] = cls
    return found


class Watch(TorchFunctionMode):
    """Active around the model while it is traced: raises CaptureError, with the user's line, for what a trace would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.detached: list[Tensor] = []
        self.functions = custom_functions()
        self.keeping = 0
        self.steps = control_flow.Steps()
        self.replaced: AbstractContextManager[None] = nullcontext()
        self.around: FrameType | None = None  # of whoever entered: what is further out is not of the model

    def __enter__(self) -> Watch:
        own = [f for f in self.functions.values() if not f.__module__.startswith("torch.")]
        self.replaced = replaced(own, self._keep)
        self.replaced.__enter__()
        self.around = sys._getframe(1)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.replaced.__exit__(*error)
        self.around = None

    def _keep(self, function: type[Function], args: tuple[Any, ...]) -> Any:
        """What a custom function gives, by operations that have its gradient."""
        source = calling_line()
        if any(torch_compat.is_transformed(a) for a in args):
            raise CaptureError(
                f"the custom autograd function {function.__qualname__} is called within torch.vmap or another transform of "
                "torch.func, where a trace would lose its own backward",
                source,
                "call it outside, on the whole batch, or write it with ordinary differentiable operations",
            )
        self.keeping += 1
        try:
            return with_slopes(function, args)
        except NotElementwise as error:
            raise custom_function(function.__qualname__, source) from error
        finally:
            self.keeping -= 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        named = kwargs or {}
        self._check_function(func)
        for branch in self.steps.inside:
            branch.check_call(func, args, named, _writes(getattr(func, "__name__", "")))
            args, named = self._call(branch.enter, ((args, named),), {})
        result = self._called(func, args, named)
        for branch in self.steps.inside:
            branch.note(result)
        return result

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(func, torch_compat.HigherOrderOperator) and control_flow.has_body(func.name(), args):
            with self._active():
                return self.steps.call(func.name(), args, kwargs, calling_line())
        if func in HOOKS:
            raise CaptureError(
                f"{func.__name__} in the forward would be lost: hooks on activations are not captured",
                calling_line(),
                "write the change of the gradient into the forward (for a factor s: `x * s + (x * (1 - s)).detach()`)",
            )
        if func is Tensor.random_:  # torch writes one overload of it, `from`, as Python that cannot be read
            raise CaptureError(
                "random_ in the forward draws from torch's generator, whose numbers would differ between ranks",
                calling_line(),
                "draw with torch.randint or torch.randint_like",
            )
        if func in GRADIENT_CALLS:
            raise CaptureError(
                "the forward computes gradients itself",
                calling_line(),
                "derivatives inside the forward cannot be captured; give their formula",
            )
        if func == DATA:  # a trace would take it for a constant
            func, kwargs = Tensor.detach, {}
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor) and _writes(name):
            _check_write(args[0], name)
            if any(args[0] is d for d in self.detached):
                raise hidden_write(name)
        result = self._call(func, args, kwargs)
        if func is Tensor.detach and args[0].requires_grad:
            self.detached.append(result)
        return result

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Active again within its own `__torch_function__`: for code of the user's that is called there."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call with the user's line as what traced nodes keep of the Python stack. Left to itself, torch formats the whole stack
        for each node, and keeps of it the frames named `forward` alone."""
        caller = user_frame(sys._getframe(2))
        if caller is None:
            return func(*args, **kwargs)
        filename, line = caller.f_code.co_filename, caller.f_lineno
        code = linecache.getline(filename, line).strip()
        torch.fx.traceback.set_stack_trace([f'  File "{filename}", line {line}, in {caller.f_code.co_name}\n    {code}'])
        try:
            return func(*args, **kwargs)
        finally:
            torch.fx.traceback.set_stack_trace([])

    def _check_function(self, func: Any) -> None:
        if self.keeping:
            return
        frame: FrameType | None = sys._getframe(2)
        # A Function's own frame is that of its `forward`: `apply` has one in some versions of torch only.
        while frame is not None and frame is not self.around and frame.f_code not in self.functions:
            frame = frame.f_back
        if frame is None or frame is self.around:
            return
        function = self.functions[frame.f_code]
        user = user_frame(frame.f_back)
        source = line_of(user.f_code.co_filename, user.f_lineno) if user else None
        if getattr(function, "__module__", "") == "torch.utils.checkpoint":
            if function is not CheckpointFunction:
                return  # before torch 2.13, checkpointing without reentry keeps its inputs by a Function that computes nothing
            raise CaptureError(
                "reentrant activation checkpointing cannot be captured",
                source,
                "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False); shardwright chooses what to recompute either way",
            )
        raise custom_function(str(getattr(function, "__qualname__", function)), source)


def custom_function(name: str, source: str | None) -> CaptureError:
    return CaptureError(
        f"the forward uses the custom autograd function {name}, whose own backward a trace would lose: it does more than multiply "
        "its gradient element by element",
        source,
        "write it with ordinary differentiable operations, or register it as a torch.library.custom_op with register_autograd",
    )


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in IN_PLACE_ALLOWED_NAMES
    return in_place or name in ("__setitem__", "__set__", "__iadd__", "__imul__", "__isub__", "__itruediv__")


def _check_write(tensor: Tensor, name: str) -> None:
    if isinstance(tensor, nn.Parameter):
        raise CaptureError(
            f"the forward changes a parameter in place ({name})",
            calling_line(),
            "keep state that the forward updates in a buffer, or update the parameter outside the forward",
        )
    if tensor.requires_grad and not torch.is_grad_enabled() and name != "__set__":
        raise hidden_write(name)


def hidden_write(name: str) -> CaptureError:
    return CaptureError(
        f"a tensor that carries a gradient is changed in place behind autograd's back ({name})",
        calling_line(),
        "the captured graph would cut its gradient; compute a new tensor instead",
    )


def check_model(model: nn.Module) -> None:
    """Refuse, before tracing, what hangs on the model and would be lost.

    Raises CaptureError for compiled modules, backward hooks on modules and gradient hooks on parameters.
    """
    for name, module in model.named_modules():
        label = f"module {name!r}" if name else "the model"
        if torch_compat.is_compiled(module):
            raise CaptureError(
                f"{label} is already compiled by torch.compile",
                None,
                "pass the original model, and compile the result of auto_parallelize",
            )
        if torch_compat.backward_hooks(module):
            raise CaptureError(
                f"{label} has a backward hook, which a captured graph would not call", None, "remove the hook (handle.remove())"
            )
    for name, parameter in model.named_parameters():
        if torch_compat.tensor_hooks(parameter):
            raise CaptureError(
                f"parameter {name!r} has a gradient hook, which its shards would not call",
                None,
                "remove the hook and change the gradients between backward and optimizer.step",
            )
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError(f"parameter {name!r} has no shape yet", None, "run the lazy modules once before capture")


def check_autograd_graph(outputs: Sequence[Tensor]) -> None:
    """Refuse custom autograd functions that `Watch` could not see, because they call no torch operation in their forward."""
    seen = set()
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not torch_compat.is_registered_autograd(type(node)):
            raise custom_function(node.name(), None)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)


CHECKS = frozenset({aten._assert_scalar.default, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default})
"""What `torch._check` of a number leaves in a graph."""


def drop_checks(graph: fx.GraphModule) -> None:
    """Take out of a traced graph, in place, what a model asserts of numbers that depend on data, and the numbers that only
    assertions read. As with other assertions, a program does not check them."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in reversed(module.graph.nodes):
                value = node.meta.get("val")
                number = _is_symbolic(value) or isinstance(value, int | float)  # torch 2.11 knows some of them by then
                if node.target in CHECKS or (number and not node.users and node.op == "call_function"):
                    module.graph.erase_node(node)


def check_static(graph: fx.GraphModule) -> None:
    """Refuse graphs in which a number or a shape depends on data. Raises CaptureError at the first such node."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                values = node.meta.get("val")
                values = values if isinstance(values, tuple | list) else [values]
                if any(_is_symbolic(v) for v in values):
                    raise data_dependent(line_of_stack_trace(node.meta.get("stack_trace")) or str(node.target))


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, Tensor):
        return any(isinstance(s, torch.SymInt) for s in value.shape)
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def data_dependent(source: str | None) -> CaptureError:
    return CaptureError(
        "a number, a branch or a shape depends on the values of tensors",
        source,
        "keep it a tensor computation: torch.where for `if`, a 0-dim tensor for .item(), a mask for a boolean index",
    )


class PromoteCasts(TorchFunctionMode):
    """The eager counterpart of `promote_casts`: while it is active, casts to float32 are casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@dataclass(frozen=True)
class Difference:
    """The largest relative differences between the captured graph and the eager model.

    Each is the largest absolute difference of a tensor over its largest entry (over a thousandth of the largest of all
    gradients, where that is more). `worst` names the tensor with the largest.
    """

    loss: float
    gradients: float
    outputs: float
    worst: str


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Per dtype of the model: reordering of sums, with room for losses and gradients that nearly cancel."""


def check_capture(
    captured: Captured,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
) -> Difference:
    """Run the captured graph and the model itself on real data, with the same random numbers, and compare.

    Compared are the loss, every other output, the buffers afterwards and the gradient of every parameter. The model keeps its
    parameters, gradients, buffers and mode. A float64 model is compared in float64 throughout: its own casts to float32
    are promoted on both sides. Raises CaptureError when a difference is beyond `TOLERANCE`.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    eager, eager_gradients = _run_eager(captured, model, args, kwargs, loss_fn, names, dtype)
    ours, our_gradients = _run_captured(captured, model, args, kwargs, names, dtype)
    largest = max((float(g.abs().max()) for g in eager_gradients.values() if g.numel()), default=0.0)
    errors = {key: _relative(eager[key], ours[key], 0.0) for key in eager}
    for name in sorted(eager_gradients.keys() | our_gradients.keys()):
        ones = [gradients.get(name) for gradients in (eager_gradients, our_gradients)]
        known = next(g for g in ones if g is not None)
        a, b = (torch.zeros_like(known) if g is None else g for g in ones)
        errors[f"grad.{name}"] = _relative(a, b, 1e-3 * largest)
    worst = max(errors, key=lambda k: errors[k])
    if not errors[worst] <= TOLERANCE.get(dtype, 1e-3):
        raise CaptureError(
            f"the captured graph differs from the model: {worst} by {errors[worst]:.3g} of its largest entry",
            None,
            "report it with the model; until then run that part of the model outside auto_parallelize",
        )
    return Difference(
        loss=errors.get(captured.loss or "", 0.0),
        gradients=max((e for k, e in errors.items() if k.startswith("grad.")), default=0.0),
        outputs=max((e for k, e in errors.items() if not k.startswith("grad.")), default=0.0),
        worst=worst,
    )


def _relative(a: Tensor, b: Tensor, floor: float) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    if torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan()):
        return 0.0
    found = float((a - b).abs().max()) / max(float(a.abs().max()), floor, 1e-300)
    return math.inf if math.isnan(found) else found


def _gradients(loss: Tensor | None, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    if loss is None or not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def _run_eager(
    captured: Captured, model: nn.Module, args: Any, kwargs: Any, loss_fn: Any, names: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    modes = {m: m.training for m in model.modules()}
    if model.training != captured.training:
        model.train(captured.training)
    try:
        with torch.random.fork_rng(), torch.enable_grad(), PromoteCasts() if dtype == torch.float64 else torch.enable_grad():
            torch.manual_seed(0)
            if loss_fn is None:
                found = describe_output(model(*args, **kwargs), warn=False)[1]
            else:
                rest, named, target = split_target(args, kwargs)
                result = model(*rest, **named)
                found = [*describe_output(result, warn=False)[1], loss_fn(result, target)]
        values = {f"out.{k}": t for k, t in enumerate(found)}
        parameters = dict(model.named_parameters())
        gradients = _gradients(values.get(captured.loss or ""), names, [parameters[n] for n in names])
        updated = {f"buffer.{n}": b.clone() for n, b in model.named_buffers()}
        return {k: v.detach() for k, v in {**values, **updated}.items()}, gradients
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for module, training in modes.items():
            module.training = training


def _run_captured(
    captured: Captured, model: nn.Module, args: Any, kwargs: Any, names: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    graph, constants = captured.graph, captured.constants
    if dtype == torch.float64:
        graph = promote_casts(graph)
        constants = {k: double(t) for k, t in constants.items()}
    parameters = {n: p.detach().cpu().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    state = {
        **{f"param.{n}": p for n, p in parameters.items()},
        **{f"buffer.{n}": b.detach().cpu() for n, b in model.named_buffers()},
        **constants,
        "seed": torch.tensor(0),
        **{k: t.cpu() for k, t in captured.call.flatten(args, kwargs).items()},
    }
    inputs = [state[n.meta["key"]] for n in graph.graph.nodes if n.op == "placeholder"]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = fx.Interpreter(graph).run(*inputs)
    values = dict(zip(captured.outputs, outputs, strict=True))
    gradients = _gradients(values.get(captured.loss or ""), names, [parameters[n] for n in names])
    left = {k: v for k, v in state.items() if k.startswith("buffer.")}
    return {k: v.detach() for k, v in {**left, **values}.items()}, gradients
