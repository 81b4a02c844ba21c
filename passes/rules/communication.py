"""Communication over one axis, seen from another: dims that it does not touch map, it is linear, and both may be done at once."""

from __future__ import annotations

from ..convert import convert
from ..types import Partial, Type, Varying, balanced_sizes, even_sections
from .base import Axis, Factor, OpCall, Operand, Rule, Slot, Strategy, has_derivatives, rule_for
from .views import ALONE


@rule_for(convert)
def conversion(call: OpCall, axis: Axis) -> Rule:
    """convert(x, axis, src, dst) with both types of the other axis."""
    _, _, src, dst = call.args
    shape = call.operands[0].shape
    touched = {t.dim for t in (src, dst) if isinstance(t, Varying)}
    factors = tuple(Factor(f"d{d}", s, (Slot(d),), (Slot(d),)) for d, s in enumerate(shape) if d not in touched and s > 1)
    sums = not any(isinstance(t, Partial) and t.op != "sum" for t in (src, dst))
    linear = ALONE if sums and has_derivatives(call.results[0].dtype) else ()
    return Rule(factors, linear, extra=_at_once(call, axis))


def _at_once(call: OpCall, axis: Axis) -> tuple[Strategy, ...]:
    """The same conversion over this axis as well, both by one collective over all their ranks."""
    _, name, src, dst = call.args
    (operand,), (result,) = call.operands, call.results
    if not set(name.split("+")) <= set(axis.joins):
        return ()
    before, after = _inside(src, operand.shape, axis.size), _inside(dst, result.shape, axis.size)
    if before is None or after is None:
        return ()
    (inner, joined), (inner_after, joined_after) = before, after
    args = (Operand(0), f"{name}+{axis.name}", joined, joined_after)
    return (Strategy("at once", (inner,), (inner_after,), convert, args),)


def _inside(type_: Type, shape: tuple[int, ...], n: int) -> tuple[Type, Type] | None:
    """The type over n more ranks, of what a rank of the other axis holds, of a value with this type over that axis; and its type
    over the ranks of both. Shards are cut once more, as equally as can be; None where some rank would have none."""
    if not isinstance(type_, Varying):
        return type_, type_
    if not type_.is_plain or min(type_.sections[0]) < n:
        return None
    every = tuple(size for length in type_.sections[0] for size in balanced_sizes(length, n))
    return Varying(type_.dim, even_sections(shape[type_.dim], n)), Varying(type_.dim, (every,))
