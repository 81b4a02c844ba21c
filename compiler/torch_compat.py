"""Every private torch name the project uses, each with the public route it waits for. Imports nothing of the project."""

from __future__ import annotations

import importlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._higher_order_ops import utils as higher_order_utils
from torch._ops import HigherOrderOperator as HigherOrderOperator  # waits for: a public name of the type of torch.cond's op
from torch._ops import OpOverload as OpOverload  # waits for: a public name of the type of torch.ops.aten.add.Tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree  # noqa: F401  (waits for: a public torch.utils.pytree)


def fake_mode() -> FakeTensorMode:
    """A new mode of tensors that have shapes and no storage. Waits for: a public `torch.fake_mode`."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def lazy_graph_modules() -> AbstractContextManager[None]:
    """Within, torch writes and compiles the code of a graph when it is called, not whenever it has changed: of an export that was a
    fifth of the time. Waits for: `torch.export` to do so itself."""
    return _use_lazy_graph_module(True)


class _WithoutMkldnn:
    """Within, torch does not call oneDNN, whose layer of an LSTM runs on CPUs alone and has no derivative that can be traced:
    an LSTM is traced as its cells. Threads may be within at once: the setting is the process's, and the last to leave puts
    it back. Waits for: `torch.backends.mkldnn.flags` not to warn of settings that it leaves alone."""

    def __init__(self) -> None:
        self.lock, self.within, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if self.within == 0:
                self.before = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self.within += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.within -= 1
            if self.within == 0:
                torch._C._set_mkldnn_enabled(self.before)


WITHOUT_MKLDNN = _WithoutMkldnn()


def generic_associative_scan(combine: Callable[..., Any], xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inclusive scan of `xs` along dim 0 by `combine(*left, *right)`, which takes any number of pairs at once along it.
    Waits for: `associative_scan` to be traced so on every device."""
    module: Any = importlib.import_module("torch._higher_order_ops.associative_scan")
    return module.generic_associative_scan(combine, xs)


class _OpenBodies:
    """Within, on the threads that are within, higher-order ops (`scan`, `torch.cond`, ...) are called with the functions that they
    were given, where torch would compile these to graphs first; and a nested compile region is a plain call. Waits for: a way to
    tell `torch.export` to leave bodies to a TorchFunctionMode.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: Counter[int] = Counter()
        self.replaced: list[tuple[Any, str, Callable[..., Any]]] = []

    def __enter__(self) -> None:
        with self.lock:
            if not self.threads:
                # A package of torch has an op of the same name as its module, which hides it.
                regions: Any = importlib.import_module("torch._higher_order_ops.invoke_subgraph")
                self._replace(higher_order_utils, "setup_compilation_env", self._environment)
                self._replace(regions, "invoke_subgraph_placeholder", self._region)
            self.threads[threading.get_ident()] += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.threads[threading.get_ident()] -= 1
            self.threads = +self.threads
            if not self.threads:
                for owner, name, original in self.replaced:
                    setattr(owner, name, original)
                self.replaced.clear()

    def _replace(self, owner: Any, name: str, substitute: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, substitute(original))
        self.replaced.append((owner, name, original))

    def _is_within(self) -> bool:
        return self.threads[threading.get_ident()] > 0

    def _environment(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What torch calls `torch.compile` of a body in; it gives the backend."""

        @contextmanager
        def environment() -> Iterator[Any]:
            if self._is_within():
                with torch.compiler.set_stance("force_eager"):
                    yield "eager"
            else:
                with original() as backend:
                    yield backend

        return environment

    def _region(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What a function marked by `torch.compiler.nested_compile_region` is called by."""

        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if self._is_within() else original(function, *args, **kwargs)

        return call


OPEN_BODIES = _OpenBodies()


def asks_for_values(error: BaseException) -> bool:
    """Whether a trace ended because it needs the values of tensors. Waits for: public names of these errors."""
    return type(error).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException", "UserError")


@contextmanager
def unlogged_guards() -> Iterator[None]:
    """While active, nothing is logged of values that a trace asked for in vain. Waits for: a way to ask whether they are known."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def chunked_cross_entropy() -> tuple[OpOverload, ...]:
    """The ops of `torch.nn.functional.linear_cross_entropy` that go through the logits a few rows at a time: one that gives the
    mean or the sum, with gradients, and one that gives the loss of each row. None before torch 2.13. Waits for: public names."""
    try:
        importlib.import_module("torch.nn.modules.linear_cross_entropy")  # defines them
    except ImportError:
        return ()
    ops = torch.ops.torch_nn
    return ops._linear_cross_entropy_batch_chunked.default, ops._linear_cross_entropy_batch_chunked_no_reduction.default


def swap_state(module: torch.nn.Module, replace: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """Replace every parameter and buffer of `module` by `replace(qualified name, it)`; the result undoes it.

    Tied tensors must be kept tied by `replace`. Waits for: `torch.func.functional_call` to be traced by `torch.export`
    with the tensors' own names in the signature.
    """
    undo: list[tuple[dict[str, Any], str, Any]] = []
    for prefix, child in module.named_modules():
        tables: Any = (child._parameters, child._buffers)
        for owner in tables:
            for name, value in owner.items():
                if value is not None:
                    undo.append((owner, name, value))
                    owner[name] = replace(f"{prefix}.{name}" if prefix else name, value)

    def restore() -> None:
        for owner, name, value in undo:
            owner[name] = value

    return restore


def backward_hooks(module: torch.nn.Module) -> bool:
    """Whether full or pre backward hooks are registered on the module itself. Waits for: a public list of hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def tensor_hooks(tensor: torch.Tensor) -> bool:
    """Whether gradient hooks are registered on the tensor. Waits for: a public list of hooks."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module is the result of `torch.compile` or was compiled in place. Waits for: a public predicate."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def is_registered_autograd(function: type) -> bool:
    """Whether an autograd Function was made by `torch.library.register_autograd`. Waits for: a public marker on it."""
    forward_class = getattr(function, "_forward_cls", function)
    return getattr(forward_class, "__module__", "") == "torch._library.autograd"


def is_transformed(value: Any) -> bool:
    """Whether the value stands within `torch.vmap` or another transform of torch.func, where `requires_grad` does not tell of
    gradients outside. Waits for: a public predicate."""
    return isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value)


def wrapper_tensor(cls: type[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A `cls` of this metadata without storage, whose ops go to `cls.__torch_dispatch__`.

    Waits for: a public constructor of wrapper subclasses.
    """
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def foreach_scale_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply each tensor by the 0-dim `factor`, in place, in few kernels. Waits for: public foreach ops."""
    torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]


def foreach_add_(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Add to each tensor its other, in place, in few kernels. Waits for: public foreach ops."""
    torch._foreach_add_(tensors, others)  # pyright: ignore[reportPrivateImportUsage]


def write_count(tensor: torch.Tensor) -> int:
    """How often the tensor's memory was written in place, as autograd counts. Waits for: a public version counter."""
    return tensor._version


def is_composite(op: Any) -> bool:
    """Whether the op is defined by other ops below autograd's sight (CompositeImplicitAutograd).

    Waits for: a public way to ask an OpOverload for its decomposition.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def register_child(module: torch.nn.Module, name: str, child: torch.nn.Module) -> None:
    """`module.add_module`, also where the class of `module` has an attribute of that name, which then keeps precedence.

    Waits for: `add_module` to take such names.
    """
    module._modules[name] = child


def incompatible_keys(missing: list[str], unexpected: list[str]) -> Any:
    """What `nn.Module.load_state_dict` returns. Waits for: a public name of its type."""
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def reset_method(module: torch.nn.Module) -> Callable[[], Any] | None:
    """The module's own initialization of its parameters and buffers, None if it has none.

    Waits for: `nn.MultiheadAttention` and others to name it `reset_parameters`, as most modules do.
    """
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def default_store() -> Any:
    """The key-value store that the default process group was started with. Waits for: a public accessor."""
    return torch.distributed.distributed_c10d._get_default_store()
