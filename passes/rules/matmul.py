"""Matrix products."""

from __future__ import annotations

import torch

from ..ops import experts  # noqa: F401  (defines the op)
from .base import Axis, OpCall, Rule, rule_for
from .notation import factors

aten = torch.ops.aten

TABLE = {
    aten.mm.default: "m k, k n -> m n",
    aten.bmm.default: "b m k, b k n -> b m n",
    aten.mv.default: "m k, k -> m",
    aten.dot.default: "k, k -> ",
    aten.outer.default: "m, n -> m n",
    aten.linear.default: "... k, n k -> ... n",
    # x[t, k], weight[e, n, k], expert[t]: the expert of a token may be any, so e stays whole.
    torch.ops.shardwright.grouped_linear.default: "t k, e n k, t -> t n; block: e",
}


@rule_for(*TABLE)
def product(call: OpCall, axis: Axis) -> Rule | None:
    if call.target is aten.linear.default and len(call.operands) != 2:
        return None
    # A product is linear in each operand alone.
    return Rule(factors(TABLE[call.target], call), linear=(frozenset({0}), frozenset({1})))


@rule_for(aten.matmul.default)
def matmul(call: OpCall, axis: Axis) -> Rule | None:
    a, b = (len(m.shape) for m in call.operands)
    if a < 2 or b < 2:
        return None
    return Rule(factors("... m k, ... k n -> ... m n", call), linear=(frozenset({0}), frozenset({1})))
