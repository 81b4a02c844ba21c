"""Convolution and pooling: samples and channels are factors; positions stay whole."""

from __future__ import annotations

import torch

from .base import Axis, Factor, OpCall, Rule, Slot, rule_for
from .views import dims_map

aten = torch.ops.aten


@rule_for(aten.convolution.default)
def convolution(call: OpCall, axis: Axis) -> Rule | None:
    """x[n, c, ...], weight[o, c, ...] -> [n, o, ...]: n and o map, c sums. Grouped ones: n only."""
    x, weight = call.operands[0].shape, call.operands[1].shape
    if call.operand_of(2) is not None:
        return None
    factors = [Factor("n", x[0], (Slot(0), None), (Slot(0),))]
    if call.arg(8, "groups", 1) == 1 and not call.arg(6, "transposed", False):
        factors.append(Factor("o", weight[0], (None, Slot(0)), (Slot(1),)))
        factors.append(Factor("c", x[1], (Slot(1), Slot(1)), (None,), "sum"))
    return Rule(tuple(f for f in factors if f.size > 1), linear=(frozenset({0}), frozenset({1})))


@rule_for(
    aten.max_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.max_pool1d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
)
def pool(call: OpCall, axis: Axis) -> Rule:
    """Every dim but the pooled positions maps."""
    positions = 1 if "1d" in str(call.target) else 2
    rank = len(call.operands[0].shape)
    rule = dims_map(call, [(d, d) for d in range(rank - positions)])
    n = len(call.results)
    return Rule(tuple(Factor(f.name, f.size, f.operands, f.results * n) for f in rule.factors))
