"""Tensors made from nothing: every rank can make its own part."""

from __future__ import annotations

import torch

from ..ops import embedding as _ops  # noqa: F401  (defines arange_shard)
from ..types import Varying, flatten_sections
from .base import (
    Axis,
    Factor,
    OpCall,
    Rule,
    Slot,
    Strategy,
    localizer,
    rule_for,
    with_result_sizes,
)

aten = torch.ops.aten
ours = torch.ops.shardwright

localizer(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)(with_result_sizes(0))
localizer(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)(with_result_sizes(1))


@rule_for(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
def constant(call: OpCall, axis: Axis) -> Rule:
    shape = call.results[0].shape
    return Rule(tuple(Factor(f"d{d}", s, (), (Slot(d),)) for d, s in enumerate(shape) if s > 1))


@rule_for(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def new_constant(call: OpCall, axis: Axis) -> Rule:
    shape = call.results[0].shape
    return Rule(tuple(Factor(f"d{d}", s, (None,), (Slot(d),)) for d, s in enumerate(shape) if s > 1))


WINDOWS = ("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window")
SMALL = (
    aten.linspace.default,
    aten.logspace.default,
    aten.tril_indices.default,
    aten.triu_indices.default,
    *(getattr(getattr(aten, name), overload) for name in WINDOWS for overload in ("default", "periodic")),
)


@rule_for(*SMALL)
def small(call: OpCall, axis: Axis) -> Rule:
    """A row of constants, or two: every rank makes all of them, of which it may take its part for nothing."""
    return Rule()


@rule_for(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(call: OpCall, axis: Axis) -> Rule:
    """Each rank counts its own positions."""
    size = call.results[0].shape[0]
    factor = Factor("d0", size, (), (Slot(0),))
    return Rule((factor,) if size > 1 else (), swap={"d0": _arange_shard})


def _arange_shard(call: OpCall, axis: Axis, strategy: Strategy, cut: object) -> Strategy | None:
    args = call.args
    start = args[0] if len(args) > 1 else 0
    step = args[2] if len(args) > 2 else 1
    out = strategy.outs[0]
    assert isinstance(out, Varying)
    local = (start, step, axis.name, flatten_sections(out.sections), call.results[0].dtype)
    return Strategy(strategy.label, (), strategy.outs, ours.arange_shard.default, local, {})
