"""Capture: a model and one call of it become one functional ATen graph with named inputs and outputs.

    model, args, kwargs ──swap state for fake──▶ torch.export ──cut no_grad regions──▶ run_decompositions ──rename──▶ Captured

With a `loss_fn`, the call's keyword `target` (or, when there is none, the last positional argument) goes to
`loss_fn(output, target)`, and the rest of the call to the model; the loss becomes the last output. Without one, the loss is
the output's `loss` field, or the output itself when it is one 0-dim floating tensor, or the first 0-dim floating output
that carries a gradient.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, fx, nn
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind

from ..passes.graph_tools import LazyGraphModule, copy_call
from ..passes.normalize import views
from ..passes.normalize.gradients import mark_gradients
from ..passes.normalize.rewrite import rewrite
from . import fidelity, torch_compat
from .call_structure import Branch, CallStructure, Slot, Tree, build, describe_output, flatten_call, signature, split_target
from .capture_error import CaptureError
from .fidelity import line_of_stack_trace
from .loops import fold_loops
from .regions import is_functional, settle_regions

__all__ = ["CallStructure", "CaptureError", "Captured", "capture", "signature"]

LossFunction = Callable[[Any, Any], Tensor]
aten = torch.ops.aten
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
"""Kept as `reshape`: the strides that fake kernels give need not be those of the kernels that will run."""
CONTAINERS = (dict, OrderedDict, list, set)
"""Of a module's attributes, those whose contents are put back after a trace."""


@dataclass(frozen=True)
class Captured:
    """One call of a model as a graph.

    graph       ATen, functional. Placeholders carry meta["key"] and meta["val"] (FakeTensor on CPU); one flat output tuple
    outputs     per output: "out.K" in the order of the model's tensor outputs, or "buffer.NAME" for an updated buffer
    loss        the loss's key among the outputs, or None
    call        how the call's inputs and output object map to keys
    aliases     tied names: the canonical one (first of named_parameters()) -> the others
    constants   const.NAME -> its tensor
    trainable   names of the parameters with requires_grad
    training    whether the model was in training mode
    """

    graph: fx.GraphModule
    outputs: tuple[str, ...]
    loss: str | None
    call: CallStructure
    aliases: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Tensor]
    trainable: frozenset[str]
    training: bool


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    loss_fn: LossFunction | None = None,
    training: bool | None = None,
) -> Captured:
    """Capture one call `model(*args, **kwargs)` (see the module's text for `loss_fn`).

    Only shapes and dtypes of the tensors are used: arguments and model may be real or meta, on any device; nothing of the
    model's size is allocated, and the model is left as it was. `training` None keeps every module's own mode.

    Raises CaptureError for a model that cannot be captured, or only with a silent change.
    """
    fidelity.check_model(model)
    _check_autocast()
    try:
        tree, tensors = flatten_call(args, kwargs)
    except TypeError as error:
        raise CaptureError(str(error), None, "see the message") from error
    names = tied_names(model)
    traced = _Traced(model, loss_fn, tree, tuple(tensors))
    mode = torch_compat.fake_mode()
    with _prepared(model, mode, training), torch.inference_mode(False), torch.enable_grad():
        is_training = model.training
        with mode:
            fakes = tuple(_fake(t) for t in tensors.values())
        program = _export(traced, fakes)
    captured_graph, outputs, constants = _readable(program, names, tuple(tensors))
    requires_grad = {key for key, t in tensors.items() if t.requires_grad}
    trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    mark_gradients(captured_graph.graph, {f"param.{n}" for n in trainable} | requires_grad)
    fold_loops(captured_graph)
    structure = CallStructure(tree, tuple(tensors), signature(args, kwargs), traced.output.tree)
    loss = traced.output.loss or _first_scalar(captured_graph, outputs)
    aliases = {n: tuple(others) for n, others in _aliases(names).items()}
    return Captured(captured_graph, outputs, loss, structure, aliases, constants, trainable, is_training)


def _check_autocast() -> None:
    for device in ("cuda", "xpu", "mps"):
        if torch.is_autocast_enabled(device):
            raise CaptureError(
                f"capture under torch.autocast({device!r}): the casts would not be in the graph",
                fidelity.calling_line(),
                "leave the autocast region and convert the model instead: model.to(torch.bfloat16)",
            )


@dataclass
class _Output:
    """What a trace finds out about the model's output."""

    tree: Tree = Slot("out.0")
    loss: str | None = None


class _Traced(nn.Module):
    """The model with flat tensors in and out. `output` is filled in when it is called."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None, tree: Tree, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = (loss_fn,)
        self.tree, self.keys = tree, keys
        self.output = _Output()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = build(self.tree, dict(zip(self.keys, tensors, strict=True)))
        (loss_fn,) = self.loss_fn
        loss: Any = None
        with fidelity.Watch(), torch.fx.traceback.preserve_node_meta():
            if loss_fn is None:
                result = self.model(*args, **kwargs)
            else:
                args, kwargs, target = split_target(args, kwargs)
                result = self.model(*args, **kwargs)
                loss = loss_fn(result, target)
        self.output.tree, found = describe_output(result)
        if loss_fn is None:
            self.output.loss = _find_loss(self.output.tree, result)
        else:
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                raise CaptureError("loss_fn did not return a 0-dim tensor", None, "reduce the loss to one number, as with .mean()")
            self.output.loss = f"out.{len(found)}"
            found.append(loss)
        fidelity.check_autograd_graph(found)
        return tuple(found)


def _find_loss(tree: Tree, result: Any) -> str | None:
    if isinstance(tree, Branch) and "loss" in tree.names:
        child = tree.children[tree.names.index("loss")]
        return child.key if isinstance(child, Slot) else None
    if isinstance(tree, Slot) and result.dim() == 0 and result.is_floating_point():
        return tree.key
    return None


def _first_scalar(graph: fx.GraphModule, outputs: tuple[str, ...]) -> str | None:
    nodes: Any = graph.graph.output_node().args[0]
    for key, node in zip(outputs, nodes, strict=True):
        if key.startswith("out.") and node.meta.get("grad") and node.meta["val"].dim() == 0:
            return key
    return None


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every parameter's and buffer's name -> its canonical name: the first of those that share the tensor."""
    first: dict[int, str] = {}
    found = {}
    for entries in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in entries:
            found[name] = first.setdefault(id(tensor), name)
    return found


def _aliases(names: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, canonical in names.items():
        if name != canonical:
            found.setdefault(canonical, []).append(name)
    return found


def _fake(tensor: Tensor) -> Tensor:
    """A fake CPU tensor like `tensor`; call it inside a fake mode."""
    if tensor.layout is not torch.strided:
        raise CaptureError(f"a tensor of layout {tensor.layout} cannot be captured", None, "make it dense")
    fake = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


@contextmanager
def _prepared(model: nn.Module, mode: torch_compat.FakeTensorMode, training: bool | None) -> Iterator[None]:
    """The model in the wanted mode, with fake parameters and buffers; everything, attributes included, is put back."""
    attributes = [(name, module, dict(vars(module))) for name, module in model.named_modules()]
    contents = [(held, copy(held)) for _, _, values in attributes for held in values.values() if type(held) in CONTAINERS]
    fakes: dict[int, Tensor] = {}

    def replace(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            with mode:
                fakes[id(tensor)] = _fake(tensor)
        return fakes[id(tensor)]

    restore = torch_compat.swap_state(model, replace)
    try:
        if training is not None and model.training != training:
            model.train(training)
        for name, module, values in attributes:
            _move_plain_tensors(name, module, values)
        yield
    finally:
        restore()
        for held, before in contents:
            _refill(held, before)
        changed = [f"{name}.{k}".lstrip(".") for name, module, values in attributes for k in _put_back(module, values)]
        if changed:
            warnings.warn(
                f"attributes that the forward sets to tensors are not updated by a captured graph: {', '.join(changed)}",
                stacklevel=4,
            )


def _refill(held: Any, before: Any) -> None:
    """Give a container back what it held: a forward may register hooks, or collect values, in one that it found."""
    held.clear()
    held.extend(before) if isinstance(held, list) else held.update(before)


def _move_plain_tensors(name: str, module: nn.Module, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            if value.device.type == "meta":
                raise CaptureError(
                    f"attribute {key!r} of module {name!r} is a meta tensor that is neither parameter nor buffer",
                    None,
                    "register it as a buffer, so that its value can be loaded",
                )
            vars(module)[key] = value.detach().cpu()


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> list[str]:
    current = vars(module)
    changed = [k for k, v in current.items() if isinstance(v, Tensor) and v is not attributes.get(k)]
    changed = [k for k in changed if isinstance(current[k], torch_compat.FakeTensor)]
    for key in [k for k in current if k not in attributes]:
        del current[key]
    current.update(attributes)
    return changed


def _export(traced: _Traced, fakes: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings(), torch_compat.lazy_graph_modules(), torch_compat.WITHOUT_MKLDNN, torch_compat.OPEN_BODIES:
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
            warnings.filterwarnings("ignore", message="The tensor attributes? ")  # `_prepared` names them, where they matter
            warnings.filterwarnings("ignore", message="Pred is a Python constant")  # as all of Python is: a graph is of one call
            warnings.filterwarnings("ignore", message="torch.compile is ignored|You are calling torch.compile inside torch.export")
            program = torch.export.export(traced, fakes, strict=False)
            fidelity.drop_checks(program.graph_module)
            fidelity.check_static(program.graph_module)
            settle_regions(program.graph_module)
            if is_functional(program.graph_module) and not torch.is_autocast_enabled("cpu"):
                return program
            return program.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        source = fidelity.line_of_traceback(error.__traceback__)
        if (found := fidelity.on_gpus(error.__traceback__, source)) is not None:
            raise found from error
        if fidelity.draws_truncated(error.__traceback__):
            raise fidelity.truncated(source) from error
        if torch_compat.asks_for_values(error):
            raise fidelity.data_dependent(source) from error
        raise CaptureError(
            f"the model could not be traced: {type(error).__name__}: {error}",
            source,
            "see the error above, and torch.export's documentation",
        ) from error


def _readable(
    program: torch.export.ExportedProgram, names: Mapping[str, str], inputs: tuple[str, ...]
) -> tuple[fx.GraphModule, tuple[str, ...], dict[str, Tensor]]:
    """The program's graph with our keys, sources and module paths; its outputs' keys; its constants."""
    keys = _placeholder_keys(program.graph_signature, names, inputs)
    constant_targets = program.graph_signature.inputs_to_lifted_tensor_constants
    old = program.graph_module.graph
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    for node in old.nodes:
        if node.op == "placeholder":
            key = keys[node.name]
            if key in placeholders:  # a tied tensor stands in the program under each of its names
                copies[node] = placeholders[key]
                continue
            copy = placeholders[key] = graph.placeholder(key.replace(".", "_"))
            copy.meta = {"val": node.meta["val"], "key": key}
            if key.startswith("const."):
                constants[key] = _constant(program.constants[constant_targets[node.name]], node)
        elif node.op == "output":
            graph.output(tuple(copies[n] for n in node.args[0]))
            continue
        else:
            copy = copy_call(graph, node, copies)
            copy.meta.update(_facts(node))
            if copy.target in VIEWS:
                copy.target = aten.reshape.default
        copies[node] = copy
    result = LazyGraphModule(nn.Module(), graph)
    if graph.find_nodes(op="call_function", target=aten.copy.default):
        result = rewrite(result, {aten.copy.default: views.copy})  # torch has no derivative of it
    return result, _output_keys(program.graph_signature, names, result), constants


def _constant(value: Any, node: fx.Node) -> Tensor:
    if isinstance(value, torch_compat.FakeTensor):
        user = next(iter(node.users), node)
        raise CaptureError(
            "a tensor computed in the forward left the trace and came back as a constant",
            line_of_stack_trace(user.meta.get("stack_trace")),
            "keep the computation in torch operations (no .numpy(), no storage tricks)",
        )
    return value


def _placeholder_keys(signature_: ExportGraphSignature, names: Mapping[str, str], inputs: tuple[str, ...]) -> dict[str, str]:
    keys: dict[str, str] = {}
    remaining = iter(inputs)
    for spec in signature_.input_specs:
        target = (spec.target or "").removeprefix("model.")
        match spec.kind:
            case InputKind.PARAMETER:
                key = f"param.{names[target]}"
            case InputKind.BUFFER:
                key = f"buffer.{names[target]}"
            case InputKind.CONSTANT_TENSOR:
                key = f"const.{target}"
            case InputKind.USER_INPUT:
                key = next(remaining)
            case _:
                raise CaptureError(
                    f"the model takes an input of kind {spec.kind.name}, which cannot be captured", None, "leave it out"
                )
        keys[spec.arg.name] = key
    return keys


def _output_keys(signature_: ExportGraphSignature, names: Mapping[str, str], graph: fx.GraphModule) -> tuple[str, ...]:
    """The outputs' keys, in the graph's order. Raises CaptureError when the forward changes a parameter or an input."""
    nodes: Any = graph.graph.output_node().args[0]
    keys = []
    count = 0
    for spec, node in zip(signature_.output_specs, nodes, strict=True):
        target = (spec.target or "").removeprefix("model.")
        if spec.kind is OutputKind.USER_OUTPUT:
            keys.append(f"out.{count}")
            count += 1
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            keys.append(f"buffer.{names[target]}")
        else:
            what = "an input" if "INPUT" in spec.kind.name else f"parameter {target!r}"
            raise CaptureError(f"the forward changes {what} in place", node.meta.get("source"), "work on a copy (x.clone())")
    return tuple(keys)


def _facts(node: fx.Node) -> dict[str, Any]:
    facts: dict[str, Any] = {"val": node.meta.get("val")}
    source = line_of_stack_trace(node.meta.get("stack_trace"))
    if source:
        facts["source"] = source
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = list(stack.values())[-1][0]
        facts["module"] = path.removeprefix("model").removeprefix(".")
    return facts
