"""Matrix products."""

from __future__ import annotations

import torch

from ..ops import experts  # noqa: F401  (defines the op)
from ..types import P, R, Sections, Varying, flatten_sections
from .base import Axis, Factor, OpCall, Rule, Slot, Strategy, everywhere, rule_for
from .notation import factors

aten = torch.ops.aten
ours = torch.ops.shardwright

TABLE = {
    aten.mm.default: "m k, k n -> m n",
    aten.bmm.default: "b m k, b k n -> b m n",
    aten.mv.default: "m k, k -> m",
    aten.dot.default: "k, k -> ",
    aten.outer.default: "m, n -> m n",
    aten.linear.default: "... k, n k -> ... n",
    # x[t, k], weight[e, n, k], expert[t]: the expert of a token may be any, so every rank adds what its experts give.
    ours.grouped_linear.default: "t k, e n k, t -> t n",
}


@rule_for(*TABLE)
def product(call: OpCall, axis: Axis) -> Rule | None:
    if call.target is aten.linear.default and len(call.operands) != 2:
        return None
    # A product is linear in each operand alone.
    return Rule(factors(TABLE[call.target], call), linear=(frozenset({0}), frozenset({1})), swap={"e": _experts_shard})


def _experts_shard(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy:
    weight = strategy.ins[1]
    assert isinstance(weight, Varying)
    args = (*call.args, axis.name, flatten_sections(weight.sections))
    return Strategy("e", (R, weight, R), (P,), ours.grouped_linear_shard.default, args, {})


@rule_for(aten.matmul.default)
def matmul(call: OpCall, axis: Axis) -> Rule | None:
    a, b = (len(m.shape) for m in call.operands)
    if a < 2 or b < 2:
        return None
    return Rule(factors("... m k, ... k n -> ... m n", call), linear=(frozenset({0}), frozenset({1})))


@rule_for(aten._trilinear.default)
def trilinear(call: OpCall, axis: Axis) -> Rule:
    """The product of three tensors, each with dims of length 1 put in at `expand`, summed over `sumdim`: as a product of two."""
    summed = set(call.args[6])
    rank = len(call.operands[0].shape) + len(call.args[3])
    places = [[d for d in range(rank) if d not in call.args[3 + i]] for i in range(3)]
    kept = [d for d in range(rank) if d not in summed]
    found = []
    for d in range(rank):
        held = [o.shape[p.index(d)] if d in p else 1 for o, p in zip(call.operands, places, strict=True)]
        size = max(held)
        slots = tuple(Slot(p.index(d)) if d in p and n == size else None for p, n in zip(places, held, strict=True))
        if size > 1:
            found.append(Factor(f"d{d}", size, slots, (Slot(kept.index(d)) if d in kept else None,), "sum"))
    return Rule(tuple(found), linear=tuple(frozenset({i}) for i in range(3)), swap={f.name: everywhere for f in found})
