"""Layer, RMS and group normalization: what is normalized over stays whole, the rest maps."""

from __future__ import annotations

import torch

from .base import Axis, Factor, OpCall, Rule, Slot, rule_for

aten = torch.ops.aten


@rule_for(aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default)
def layer_norm(call: OpCall, axis: Axis) -> Rule:
    """x[..., n] with weight and bias of the normalized dims: leading dims map, the parameters are common."""
    shape = call.operands[0].shape
    lead = len(shape) - len(call.arg(1, "normalized_shape"))
    rest = (None,) * (len(call.operands) - 1)
    results = len(call.results)
    return Rule(tuple(Factor(f"d{d}", shape[d], (Slot(d), *rest), (Slot(d),) * results) for d in range(lead) if shape[d] > 1))


@rule_for(aten.group_norm.default)
def group_norm(call: OpCall, axis: Axis) -> Rule:
    """x[n, c, ...]: samples map; channels stay, because the number of groups is an argument."""
    size = call.operands[0].shape[0]
    rest = (None,) * (len(call.operands) - 1)
    return Rule((Factor("n", size, (Slot(0), *rest), (Slot(0),)),) if size > 1 else ())
