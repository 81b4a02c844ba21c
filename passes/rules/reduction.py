"""Reductions over dims, and ops that need a whole dim at once (softmax, sort, cumulative ops)."""

from __future__ import annotations

import torch

from ..ops import losses, sharded_losses  # noqa: F401  (define the ops)
from ..types import I, P, R, ReduceOp, Sections, Varying, flatten_sections
from .base import Axis, Factor, OpCall, Rule, Slot, Strategy, rule_for
from .views import ALONE, dims_map

aten = torch.ops.aten
ours = torch.ops.shardwright

REDUCTIONS: dict[object, ReduceOp] = {
    aten.sum.dim_IntList: "sum",
    aten.sum.default: "sum",
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.max.default: "max",
    aten.min.default: "min",
}


@rule_for(*REDUCTIONS)
def reduce(call: OpCall, axis: Axis) -> Rule:
    """Kept dims map; reduced ones combine by the op. max and min carry no gradient across ranks."""
    shape = call.operands[0].shape
    op = REDUCTIONS[call.target]
    whole = call.target in (aten.sum.default, aten.max.default, aten.min.default)
    dims = None if whole else call.arg(1, "dim")
    reduced = {d % len(shape) for d in dims} if dims else set(range(len(shape)))
    keep = False if whole else bool(call.arg(2, "keepdim", False))
    factors = []
    for d, size in enumerate(shape):
        if size <= 1:
            continue
        if d in reduced:
            if op == "sum" or not call.operands[0].grad:
                factors.append(Factor(f"d{d}", size, (Slot(d),), (None,), op))
        else:
            after = d if keep else d - sum(r < d for r in reduced)
            factors.append(Factor(f"d{d}", size, (Slot(d),), (Slot(after),)))
    return Rule(tuple(factors), linear=ALONE if op == "sum" else ())


WHOLE_DIM = {
    # op: position and name of the dim it needs whole; the results keep every dim.
    aten._softmax.default: (1, "dim"),
    aten._log_softmax.default: (1, "dim"),
    aten.softmax.int: (1, "dim"),
    aten.log_softmax.int: (1, "dim"),
    aten.cumsum.default: (1, "dim"),
    aten.cumprod.default: (1, "dim"),
    aten.sort.default: (1, "dim"),
    aten.topk.default: (2, "dim"),
    aten.argsort.default: (1, "dim"),
}


@rule_for(*WHOLE_DIM)
def whole_dim(call: OpCall, axis: Axis) -> Rule:
    shape = call.operands[0].shape
    position, name = WHOLE_DIM[call.target]
    dim = call.arg(position, name, -1) % len(shape) if shape else 0
    n = len(call.results)
    return Rule(
        tuple(Factor(f"d{d}", s, (Slot(d),), (Slot(d),) * n) for d, s in enumerate(shape) if d != dim and s > 1),
        linear=ALONE if call.target is aten.cumsum.default else (),
    )


@rule_for(aten.argmax.default, aten.argmin.default)
def arg_reduce(call: OpCall, axis: Axis) -> Rule | None:
    dim = call.arg(1, "dim")
    if dim is None:
        return None
    shape = call.operands[0].shape
    gone, keep = dim % len(shape), bool(call.arg(2, "keepdim", False))
    return dims_map_forward(call, gone, keep)


def dims_map_forward(call: OpCall, gone: int, keep: bool) -> Rule:
    shape = call.operands[0].shape
    pairs = [(d, d if keep else d - (d > gone)) for d in range(len(shape)) if d != gone]
    return Rule(dims_map(call, pairs).factors)


@rule_for(ours.logsumexp.default)
def logsumexp(call: OpCall, axis: Axis) -> Rule:
    """Leading dims map. The last dim combines the ranks' partial results inside the op, which gives I."""
    shape = call.operands[0].shape
    rule = dims_map_forward(call, len(shape) - 1, False)
    factor = Factor("v", shape[-1], (Slot(len(shape) - 1),), (None,), "sum")
    return Rule((*rule.factors, factor), swap={"v": _logsumexp_shard})


def _logsumexp_shard(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy | None:
    return Strategy("v", strategy.ins, (I,), ours.logsumexp_shard.default, (*call.args, axis.name), {})


@rule_for(ours.pick.default)
def pick(call: OpCall, axis: Axis) -> Rule:
    """x[..., v] at index[...]: leading dims map; the rank that holds the index adds it to a sum over the last dim."""
    shape = call.operands[0].shape
    last = len(shape) - 1
    factors = [Factor(f"d{d}", s, (Slot(d), Slot(d)), (Slot(d),)) for d, s in enumerate(shape[:-1]) if s > 1]
    factors.append(Factor("v", shape[-1], (Slot(last), None), (None,), "sum"))
    return Rule(tuple(factors), linear=(frozenset({0}),), swap={"v": _pick_shard})


def _pick_shard(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy | None:
    x = strategy.ins[0]
    assert isinstance(x, Varying)
    args = (*call.args, axis.name, flatten_sections(x.sections))
    return Strategy("v", (x, R), (P,), ours.pick_shard.default, args, {})
