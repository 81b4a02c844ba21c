"""Custom autograd functions in a trace, which would lose their backward.

A function whose backward multiplies the gradient, element by element, by something that does not depend on it (an activation with
its own derivative, a straight-through estimate, a scaled or reversed gradient) is kept: its backward is run once on a gradient of
ones, which gives the slope, and `shardwright.with_slope` puts it into the graph. Every other is refused by `fidelity.Watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from ..passes.ops import gradient as _ops  # noqa: F401  (defines the op)
from ..passes.ops.collectives import ops

FACTORS = frozenset("mul __mul__ __rmul__ multiply".split())
DIVISIONS = frozenset("div divide true_divide __truediv__".split())
UNCHANGED = frozenset("neg negative __neg__ clone contiguous detach to type_as type float double half bfloat16".split())
FACTS = frozenset("__get__ size dim stride numel nelement ndimension is_contiguous is_floating_point".split())
"""What may be asked of a gradient besides: nothing that depends on its elements."""


class NotElementwise(Exception):
    """A backward does more with its gradient than multiply it."""


class Follow(TorchFunctionMode):
    """Active around a backward: knows which values are its gradient times something else, element by element.

    Raises NotElementwise where the gradient goes into any other operation.
    """

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.multiples: list[Tensor] = [gradient]

    def is_multiple(self, value: Any) -> bool:
        return any(value is known for known in self.multiples)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used = [a for a in _leaves((args, kwargs)) if self.is_multiple(a)]
        if used and not (isinstance(result, Tensor) and self._multiplies(func.__name__, used, args, result)):
            if isinstance(result, Tensor) or func.__name__ not in FACTS:
                raise NotElementwise(func.__name__)
        elif used:
            self.multiples.append(result)
        return result

    @staticmethod
    def _multiplies(name: str, used: Sequence[Tensor], args: tuple[Any, ...], result: Tensor) -> bool:
        (first, *more) = used
        if more or result.shape != first.shape or not result.is_floating_point():
            return False
        if name in FACTORS:
            return True
        if name == "where":
            return len(args) == 3 and any(args[k] is first and _is_zero(args[3 - k]) for k in (1, 2))
        if name == "masked_fill":
            return args[0] is first and _is_zero(args[2])
        return args[0] is first and (name in UNCHANGED or (name in DIVISIONS and len(args) == 2))


def _leaves(value: Any) -> Iterator[Any]:
    """What nested arguments hold."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


class Context:
    """The `ctx` of a custom function, for one forward and one backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()
        self.to_save: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = self.to_save = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def with_slopes(function: type[Function], args: tuple[Any, ...]) -> Tensor:
    """What `function.apply(*args)` gives, by operations that a trace keeps.

    Raises NotElementwise for a function that has no such form.
    """
    context = Context(tuple(isinstance(a, Tensor) and a.requires_grad for a in args))
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    if function.setup_context is Function.setup_context:
        value = function.forward(context, *plain)
    else:
        value = function.forward(*plain)
        function.setup_context(context, plain, value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise NotElementwise("results")
    value = value.detach()
    if not any(context.needs_input_grad) or not torch.is_grad_enabled():
        return value
    ones = torch.ones_like(value)
    with Follow(ones) as follow:
        found = function.backward(context, ones)
    for x, needed, slope in zip(args, context.needs_input_grad, found if isinstance(found, tuple) else (found,), strict=True):
        if needed and slope is not None:
            if not follow.is_multiple(slope) or x.shape != value.shape:
                raise NotElementwise("gradients")
            value = ops.with_slope(value, x, slope.detach())
    return value


@contextmanager
def replaced(functions: Iterable[type[Function]], apply: Callable[[type[Function], tuple[Any, ...]], Any]) -> Iterator[None]:
    """While it is active, `F.apply(*args)` of each of the functions is `apply(F, args)`."""
    changed = [f for f in functions if "apply" not in vars(f)]
    try:
        for function in changed:
            function.apply = classmethod(lambda cls, *args: apply(cls, args))  # type: ignore[method-assign]
        yield
    finally:
        for function in changed:
            del function.apply
