"""Communication over one axis, seen from another: dims that it does not touch map, and it is linear."""

from __future__ import annotations

from ..convert import convert
from ..types import Partial, Varying
from .base import Axis, Factor, OpCall, Rule, Slot, has_derivatives, rule_for
from .views import ALONE


@rule_for(convert)
def conversion(call: OpCall, axis: Axis) -> Rule:
    """convert(x, axis, src, dst) with both types of the other axis."""
    _, _, src, dst = call.args
    shape = call.operands[0].shape
    touched = {t.dim for t in (src, dst) if isinstance(t, Varying)}
    factors = tuple(Factor(f"d{d}", s, (Slot(d),), (Slot(d),)) for d, s in enumerate(shape) if d not in touched and s > 1)
    sums = not any(isinstance(t, Partial) and t.op != "sum" for t in (src, dst))
    return Rule(factors, linear=ALONE if sums and has_derivatives(call.results[0].dtype) else ())
