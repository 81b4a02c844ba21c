"""Layer, RMS and group normalization: what is normalized over stays whole, the rest maps."""

from __future__ import annotations

import torch

from ..types import Varying
from .base import Axis, Factor, LocalCall, OpCall, Rule, Slot, Strategy, everywhere, localizer, rule_for

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
    """x[n, g*c, ...] with weight and bias [g*c]: samples and groups map."""
    shape, groups = call.operands[0].shape, call.arg(1, "num_groups")
    width = shape[1] // groups
    rest = len(call.operands) - 1
    factors = (
        Factor("n", shape[0], (Slot(0), *(None,) * rest), (Slot(0),)),
        Factor("g", groups, (Slot(1, inner=width), *(Slot(0, inner=width),) * rest), (Slot(1, inner=width),)),
    )
    return Rule(tuple(f for f in factors if f.size > 1), swap={"g": everywhere})


@localizer(aten.group_norm.default)
def local_group_norm(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
    groups, result = call.arg(1, "num_groups"), strategy.outs[0]
    if isinstance(result, Varying) and result.dim == 1:
        groups = result.local_size(index) // (call.results[0].shape[1] // groups)
    return call.target, (call.args[0], groups, *call.args[2:]), dict(call.kwargs)
