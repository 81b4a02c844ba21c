"""Convolution and pooling: samples, channels and groups of channels are factors; positions stay whole."""

from __future__ import annotations

import torch

from ..types import Varying
from .base import Axis, Factor, LocalCall, OpCall, Rule, Slot, Strategy, everywhere, localizer, rule_for
from .views import ALONE, dims_map

aten = torch.ops.aten


@rule_for(aten.convolution.default)
def convolution(call: OpCall, axis: Axis) -> Rule | None:
    """x[n, g*c, ...], weight[g*o, c, ...] -> [n, g*o, ...] for g groups; a transposed one has weight[g*c, o, ...].

    n, g and o map, c sums.
    """
    x, weight = call.operands[0].shape, call.operands[1].shape
    if call.operand_of(2) is not None:
        return None
    g = call.arg(8, "groups", 1)
    c, o = x[1] // g, call.results[0].shape[1] // g
    transposed = call.arg(6, "transposed", False)
    weight_c, weight_o = (Slot(0, outer=g), Slot(1)) if transposed else (Slot(1), Slot(0, outer=g))
    factors = (
        Factor("n", x[0], (Slot(0), None), (Slot(0),)),
        Factor("g", g, (Slot(1, inner=c), Slot(0, inner=weight[0] // g)), (Slot(1, inner=o),)),
        Factor("o", o, (None, weight_o), (Slot(1, outer=g),)),
        Factor("c", c, (Slot(1, outer=g), weight_c), (None,), "sum"),
    )
    return Rule(
        tuple(f for f in factors if f.size > 1),
        linear=(frozenset({0}), frozenset({1})),
        swap=dict.fromkeys("goc", everywhere),
    )


@localizer(aten.convolution.default)
def local_convolution(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
    """Where x and the result are both cut by channels, a rank holds whole groups: fewer of them."""
    x, result = strategy.ins[0], strategy.outs[0]
    groups = call.arg(8, "groups", 1)
    if isinstance(x, Varying) and isinstance(result, Varying) and x.dim == result.dim == 1:
        groups = result.local_size(index) // (call.results[0].shape[1] // groups)
    return call.target, (*call.args[:8], groups), {}


@rule_for(aten.im2col.default, aten.col2im.default)
def windows(call: OpCall, axis: Axis) -> Rule:
    """x[n, c, h, w] <-> [n, c*k, windows], for k positions in a window: n and c map. Without samples, c is in front."""
    image, columns = (call.operands[0], call.results[0])[:: 1 if call.target is aten.im2col.default else -1]
    channel = len(image.shape) - 3
    width = columns.shape[channel] // image.shape[channel]
    slots = [Slot(channel), Slot(channel, inner=width)][:: 1 if call.target is aten.im2col.default else -1]
    factors = [Factor(f"d{d}", image.shape[d], (Slot(d),), (Slot(d),)) for d in range(channel)]
    factors.append(Factor("c", image.shape[channel], (slots[0],), (slots[1],)))
    return Rule(tuple(f for f in factors if f.size > 1), linear=ALONE, swap={f.name: everywhere for f in factors})


@rule_for(
    aten.max_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool3d.default,
    aten.max_pool1d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.default,
    aten._upsample_bicubic2d_aa.vec,
)
def pool(call: OpCall, axis: Axis) -> Rule:
    """Every dim but the pooled positions maps."""
    positions = next(n for n in (1, 2, 3) if f"{n}d" in str(call.target))
    rank = len(call.operands[0].shape)
    rule = dims_map(call, [(d, d) for d in range(rank - positions)])
    n = len(call.results)
    return Rule(tuple(Factor(f.name, f.size, f.operands, f.results * n) for f in rule.factors))
