"""Reductions over dims, and ops that need a whole dim at once (softmax, sort, cumulative ops)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...compiler.torch_compat import chunked_cross_entropy
from ..ops import losses, sharded_losses  # noqa: F401  (define the ops)
from ..types import I, P, R, ReduceOp, Sections, Varying, flatten_sections
from .base import Axis, Factor, OpCall, Rule, Slot, Strategy, everywhere, rule_for
from .views import ALONE

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
    kept = kept_dims(len(shape), None if whole else call.arg(1, "dim"), False if whole else bool(call.arg(2, "keepdim", False)))
    factors = []
    for d, size in enumerate(shape):
        if size > 1 and d in kept:
            factors.append(Factor(f"d{d}", size, (Slot(d),), (Slot(kept[d]),)))
        elif size > 1 and (op == "sum" or not call.operands[0].grad):
            factors.append(Factor(f"d{d}", size, (Slot(d),), (None,), op))
    return Rule(tuple(factors), linear=ALONE if op == "sum" else ())


def kept_dims(rank: int, dims: int | Sequence[int] | None, keepdim: bool) -> dict[int, int]:
    """Dims that a reduction over `dims` (None or empty: all) leaves, and where they stand in its result."""
    listed = (dims,) if isinstance(dims, int) else dims or range(rank)
    gone = {d % max(rank, 1) for d in listed}  # a scalar may be reduced over dim 0
    return {d: d if keepdim else d - sum(r < d for r in gone) for d in range(rank) if d not in gone}


KEPT_DIMS = {
    # op: positions of dim and keepdim. What is reduced stays whole, the rest maps.
    aten.logsumexp.default: (1, 2),
    aten.linalg_vector_norm.default: (2, 3),
    aten.prod.dim_int: (1, 2),
    aten.any.dim: (1, 2),
    aten.all.dim: (1, 2),
    aten.max.dim: (1, 2),
    aten.min.dim: (1, 2),
    aten.argmax.default: (1, 2),
    aten.argmin.default: (1, 2),
    aten.kthvalue.default: (2, 3),
    aten.mode.default: (1, 2),
    aten.median.dim: (1, 2),
    aten.nanmedian.dim: (1, 2),
    aten.std_mean.correction: (1, 3),
    aten.var_mean.correction: (1, 3),
    aten.aminmax.default: (1, 2),
    aten.norm.ScalarOpt_dim: (2, 3),
}


@rule_for(*KEPT_DIMS)
def reduce_whole(call: OpCall, axis: Axis) -> Rule:
    shape = call.operands[0].shape
    dim, keepdim = KEPT_DIMS[call.target]
    kept = kept_dims(len(shape), call.arg(dim, "dim"), bool(call.arg(keepdim, "keepdim", False)))
    n = len(call.results)
    return Rule(tuple(Factor(f"d{d}", shape[d], (Slot(d),), (Slot(b),) * n) for d, b in kept.items() if shape[d] > 1))


WHOLE_DIM = {
    # op: position and name of the dim it needs whole; the results keep every dim.
    aten._softmax.default: (1, "dim"),
    aten._log_softmax.default: (1, "dim"),
    aten.softmax.int: (1, "dim"),
    aten.log_softmax.int: (1, "dim"),
    aten.cumsum.default: (1, "dim"),
    aten.cumprod.default: (1, "dim"),
    aten.sort.default: (1, "dim"),
    aten.sort.stable: (9, "dim"),  # by name alone
    aten.topk.default: (2, "dim"),
    aten.argsort.default: (1, "dim"),
    aten.cummax.default: (1, "dim"),
    aten.cummin.default: (1, "dim"),
    aten.logcumsumexp.default: (1, "dim"),
    aten._safe_softmax.default: (1, "dim"),
    aten.glu.default: (1, "dim"),
}


@rule_for(*WHOLE_DIM)
def whole_dim(call: OpCall, axis: Axis) -> Rule:
    shape = call.operands[0].shape
    position, name = WHOLE_DIM[call.target]
    dim = call.arg(position, name, -1) % len(shape) if shape else 0
    n = len(call.results)
    factors = [Factor(f"d{d}", s, (Slot(d),), (Slot(d),) * n) for d, s in enumerate(shape) if d != dim and s > 1]
    if call.target in SOFTMAX and shape and shape[dim] >= LONG:
        factors.append(Factor("s", shape[dim], (Slot(dim),), (Slot(dim),)))
    return Rule(tuple(factors), linear=ALONE if call.target is aten.cumsum.default else (), swap={"s": _softmax_shard})


SOFTMAX = {
    aten.softmax.int: ours.softmax_shard.default,
    aten.log_softmax.int: ours.log_softmax_shard.default,
}
LONG = 128
"""From which length on a row's own dim is offered: what the ranks exchange of a row is little beside it."""


def _softmax_shard(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy | None:
    """The ranks exchange the sums of their shards of each row, forward and backward, inside the op."""
    x = strategy.ins[0]
    assert isinstance(x, Varying)
    args = (call.args[0], x.dim, call.arg(2, "dtype"), axis.name)
    made = Strategy(strategy.label, strategy.ins, strategy.outs, SOFTMAX[call.target], args, {})
    return made if everywhere(call, axis, strategy, cut) else None


@rule_for(ours.logsumexp.default)
def logsumexp(call: OpCall, axis: Axis) -> Rule:
    """Leading dims map. The last dim combines the ranks' partial results inside the op, which gives I."""
    shape = call.operands[0].shape
    last = len(shape) - 1
    factors = [Factor(f"d{d}", size, (Slot(d),), (Slot(d),)) for d, size in enumerate(shape[:-1]) if size > 1]
    factors.append(Factor("v", shape[last], (Slot(last),), (None,), "sum"))
    return Rule(tuple(factors), swap={"v": _logsumexp_shard})


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


@rule_for(*chunked_cross_entropy())
def chunked_losses(call: OpCall, axis: Axis) -> Rule:
    """x[n, k], weight[c, k], target[n]: rows map where each keeps its loss; else they are summed, and so is the gradient of the
    weight that the op computes with the loss, while that of x has rows."""
    rows, n = call.operands[0].shape[0], len(call.operands)
    whole = len(call.results) > 1
    if rows < 2 or (whole and call.arg(5, "reduction") != "sum"):
        return Rule()
    slots = (Slot(0), None, Slot(0), *(None,) * (n - 3))
    with_rows = call.results[1 if whole else 0].shape[:1] == (rows,)  # the gradient may be left out
    own = Slot(0) if with_rows else None
    results = (None, own, None, None) if whole else (own,)
    return Rule((Factor("n", rows, slots, results, "sum"),), swap={"n": everywhere})


@rule_for(aten.vdot.default)
def vdot(call: OpCall, axis: Axis) -> Rule:
    size = call.operands[0].shape[0]
    factor = Factor("k", size, (Slot(0), Slot(0)), (None,), "sum")
    return Rule((factor,) if size > 1 else (), linear=(frozenset({0}), frozenset({1})))
