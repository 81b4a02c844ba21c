"""Attention: batch, heads and query positions map; keys and the head dims stay whole."""

from __future__ import annotations

import torch

from ..ops import attention as _ops  # noqa: F401  (defines the op)
from .base import Axis, Factor, OpCall, Rule, Slot, rule_for

ours = torch.ops.shardwright


@rule_for(ours.attention.default)
def attention(call: OpCall, axis: Axis) -> Rule:
    """q[b, h, i, d], k[b, h, j, d], v[b, h, j, e], mask broadcast to [b, h, i, j] -> out[b, h, i, e], lse[b, h, i].

    Query positions are not offered under the causal flag: a shard of them would start at another position.
    """
    q = call.operands[0].shape
    has_mask = len(call.operands) > 3
    mask = call.operands[3].shape if has_mask else ()

    def of_mask(dim: int) -> tuple[Slot | None, ...]:
        if not has_mask:
            return ()
        own = dim - (4 - len(mask))
        return (Slot(own),) if own >= 0 and mask[own] == q[dim] else (None,)

    factors = []
    for dim, name in ((0, "b"), (1, "h")):
        if q[dim] > 1:
            factors.append(Factor(name, q[dim], (Slot(dim), Slot(dim), Slot(dim), *of_mask(dim)), (Slot(dim), Slot(dim))))
    if q[2] > 1 and not call.arg(4, "causal", False):
        factors.append(Factor("i", q[2], (Slot(2), None, None, *of_mask(2)), (Slot(2), Slot(2))))
    return Rule(tuple(factors))
