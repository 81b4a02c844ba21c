"""Attention: batch, heads and query positions map; keys and the head dims stay whole."""

from __future__ import annotations

import torch

from ..ops import attention as _ops  # noqa: F401  (defines the op)
from ..types import Sections, Varying, flatten_sections
from .base import Axis, Factor, OpCall, Rule, Slot, Strategy, rule_for

ours = torch.ops.shardwright


@rule_for(ours.attention.default)
def attention(call: OpCall, axis: Axis) -> Rule:
    """q[b, h r, i, d], k[b, h, j, d], v[b, h, j, e], mask broadcast to [b, h r, i, j] -> out[b, h r, i, e], lse[b, h r, i].

    A key and value head goes where the r query heads are that share it.
    Query positions are not offered under the causal flag: a shard of them would start at another position.
    """
    q = call.operands[0].shape
    has_mask = len(call.operands) > 3
    mask = call.operands[3].shape if has_mask else ()

    def of_mask(dim: int, inner: int = 1) -> tuple[Slot | None, ...]:
        if not has_mask:
            return ()
        own = dim - (4 - len(mask))
        return (Slot(own, inner=inner),) if own >= 0 and mask[own] == q[dim] else (None,)

    factors = []
    for dim, name in ((0, "b"), (1, "h")):
        size = call.operands[1].shape[dim]
        if size > 1:
            share = q[dim] // size
            own = Slot(dim, inner=share)
            factors.append(Factor(name, size, (own, Slot(dim), Slot(dim), *of_mask(dim, share)), (own, own)))
    if q[2] > 1 and not call.arg(4, "causal", False):
        factors.append(Factor("i", q[2], (Slot(2), None, None, *of_mask(2)), (Slot(2), Slot(2))))
    return Rule(tuple(factors))


@rule_for(ours.chunked_attention.default)
def chunked_attention(call: OpCall, axis: Axis) -> Rule:
    """As `attention`, with a bias that lies as the mask does and a seed that is common; top and total lie as lse does."""
    q = call.operands[0].shape
    lie = {i: call.operands[i].shape for i in (call.operand_of(3, "bias"), call.operand_of(4, "mask")) if i is not None}
    dims = [(0, "b"), (1, "h")] + ([] if call.arg(6, "causal") else [(2, "i")])
    factors = []
    for dim, name in dims:
        if q[dim] <= 1:
            continue
        slots: list[Slot | None] = [Slot(dim), *([Slot(dim)] * 2 if dim < 2 else [None, None])]
        for i in range(3, len(call.operands)):
            own = dim - (4 - len(lie.get(i, ())))
            slots.append(Slot(own) if i in lie and own >= 0 and lie[i][own] == q[dim] else None)
        factors.append(Factor(name, q[dim], tuple(slots), (Slot(dim),) * 3))
    drops = call.arg(8, "p") > 0
    return Rule(tuple(factors), swap={f.name: _drawn_by_position for f in factors} if drops else {})


def _drawn_by_position(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy | None:
    """Dropout draws by global position, so a shard's op carries the cuts it belongs to."""
    *head, shape, axes, dims, counts, sizes = call.args
    out = strategy.outs[0]
    assert isinstance(out, Varying)
    own = flatten_sections(out.sections)
    whole = list(shape) or [*call.operands[0].shape[:3], call.operands[1].shape[2]]
    args = (*head, whole, [*axes, axis.name], [*dims, out.dim], [*counts, len(own)], [*sizes, *own])
    return Strategy(strategy.label, strategy.ins, strategy.outs, call.target, args, call.kwargs)
