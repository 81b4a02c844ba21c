"""Fourier transforms, and complex numbers as pairs of real ones: the transformed dims stay whole, the rest maps."""

from __future__ import annotations

import torch

from .base import Axis, OpCall, Rule, everywhere, rule_for
from .views import dims_map

aten = torch.ops.aten


@rule_for(aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)
def transform(call: OpCall, axis: Axis) -> Rule:
    rank = len(call.operands[0].shape)
    whole = {d % rank for d in call.arg(1, "dim")}
    rule = dims_map(call, [(d, d) for d in range(rank) if d not in whole])
    return Rule(rule.factors, rule.linear, swap={f.name: everywhere for f in rule.factors})


@rule_for(aten.view_as_real.default, aten.view_as_complex.default)
def pairs(call: OpCall, axis: Axis) -> Rule:
    """The dim of the pairs is the last of the real one."""
    return dims_map(call, [(d, d) for d in range(min(len(m.shape) for m in (*call.operands, *call.results)))])
