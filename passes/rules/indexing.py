"""Lookups by index tensors: embedding, gather, index, scatter."""

from __future__ import annotations

import torch

from ..ops import embedding as _ops  # noqa: F401  (defines the op)
from ..types import P, R, Sections, Varying, flatten_sections
from .base import Axis, Factor, OpCall, Rule, Slot, Strategy, rule_for

aten = torch.ops.aten
ours = torch.ops.shardwright


@rule_for(aten.embedding.default)
def embedding(call: OpCall, axis: Axis) -> Rule | None:
    """weight[v, h] at ids[...]: dims of ids and h map; v sums, each rank giving zeros for rows it does not hold."""
    if call.arg(4, "sparse", False) or call.arg(3, "scale_grad_by_freq", False):
        return None
    (rows, width), ids = call.operands[0].shape, call.operands[1].shape
    n = len(ids)
    factors = [Factor(f"i{d}", s, (None, Slot(d)), (Slot(d),)) for d, s in enumerate(ids) if s > 1]
    factors.append(Factor("h", width, (Slot(1), None), (Slot(n),)))
    factors.append(Factor("v", rows, (Slot(0), None), (None,), "sum"))
    return Rule(tuple(factors), linear=(frozenset({0}),), swap={"v": _embedding_shard})


def _embedding_shard(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy | None:
    weight = strategy.ins[0]
    assert isinstance(weight, Varying)
    args = (call.args[0], call.args[1], call.arg(2, "padding_idx", -1), axis.name, flatten_sections(weight.sections))
    return Strategy("v", (weight, R), (P,), ours.embedding_shard.default, args, {})


@rule_for(aten.gather.default)
def gather(call: OpCall, axis: Axis) -> Rule:
    """out[i, j] = x[i, index[i, j]] for dim 1: dims other than `dim` map where both are equally long; index's dim maps; that of x
    sums, each rank giving zeros for what it does not hold."""
    shape, index = call.operands[0].shape, call.operands[1].shape
    dim = call.arg(1, "dim") % len(shape) if shape else 0
    factors = [
        Factor(f"d{d}", s, (Slot(d), Slot(d)), (Slot(d),)) for d, s in enumerate(index) if d != dim and s > 1 and shape[d] == s
    ]
    if index and index[dim] > 1:
        factors.append(Factor("i", index[dim], (None, Slot(dim)), (Slot(dim),)))
    if shape and shape[dim] > 1 and call.results[0].dtype != torch.bool:
        factors.append(Factor("v", shape[dim], (Slot(dim), None), (None,), "sum"))
    return Rule(tuple(factors), linear=(frozenset({0}),), swap={"v": _gather_shard})


def _gather_shard(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy | None:
    x = strategy.ins[0]
    assert isinstance(x, Varying)
    args = (call.args[0], x.dim, call.args[2], axis.name, flatten_sections(x.sections))
    return Strategy("v", (x, R), (P,), ours.gather_shard.default, args, {})


@rule_for(
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
)
def scatter(call: OpCall, axis: Axis) -> Rule:
    """x with src (or a value) at [i, index[i, j]] for dim 1: dims other than `dim` map where all are equally long.

    What is added may be cut anywhere: each rank adds its own to a term of the sum.
    """
    shapes = [m.shape for m in call.operands]
    dim = call.arg(1, "dim") % len(shapes[0]) if shapes[0] else 0
    maps = [d != dim and size > 1 and all(s[d] == size for s in shapes) for d, size in enumerate(shapes[0])]
    factors = [Factor(f"d{d}", shapes[0][d], (Slot(d),) * len(shapes), (Slot(d),)) for d, mapped in enumerate(maps) if mapped]
    if call.target is not aten.scatter_add.default:
        return Rule(tuple(factors))
    if len(shapes[1]) == len(maps) > 0 and shapes[1][dim] == shapes[2][dim] > 1:
        factors.append(Factor("i", shapes[1][dim], (None, Slot(dim), Slot(dim)), (None,), "sum", TERM))
    return Rule(tuple(factors), linear=(frozenset({0, 2}),))


@rule_for(aten.index_select.default)
def index_select(call: OpCall, axis: Axis) -> Rule:
    shape = call.operands[0].shape
    dim = call.arg(1, "dim") % max(len(shape), 1)
    factors = [Factor(f"d{d}", s, (Slot(d), None), (Slot(d),)) for d, s in enumerate(shape) if d != dim and s > 1]
    factors.append(Factor("i", call.operands[1].shape[0], (None, Slot(0)), (Slot(dim),)))
    return Rule(tuple(factors), linear=(frozenset({0}),))


@rule_for(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(call: OpCall, axis: Axis) -> Rule | None:
    """x[i0, :, i1]: dims of x that are not indexed map, and so do the dims of the index tensors, broadcast together.

    The indexed dims of the result stand where the first index stands when the indices are adjacent, and in front otherwise.
    """
    shape, indices = call.operands[0].shape, list(call.arg(1, "indices"))
    if any(m.dtype == torch.bool for m in call.operands[1:]):
        return None
    where = [d for d, i in enumerate(indices) if i is not None]
    if not where:
        return None
    tensors = [call.operands[indices[d].index].shape for d in where]
    spread = torch.broadcast_shapes(*tensors)
    adjacent = where == list(range(where[0], where[0] + len(where)))
    start = where[0] if adjacent else 0
    n = len(call.operands)
    factors = []
    for b, size in enumerate(spread):
        if size > 1:
            slots: list[Slot | None] = [None] * n
            for d, s in zip(where, tensors, strict=True):
                own = b - (len(spread) - len(s))
                if own >= 0 and s[own] == size:
                    slots[indices[d].index] = Slot(own)
            factors.append(Factor(f"i{b}", size, tuple(slots), (Slot(start + b),)))
    free = [d for d in range(len(shape)) if d not in where]
    for k, d in enumerate(free):
        after = k if adjacent and d < start else k + len(spread)
        if shape[d] > 1:
            factors.append(Factor(f"d{d}", shape[d], (Slot(d), *([None] * (n - 1))), (Slot(after),)))
    return Rule(tuple(factors), linear=(frozenset({0}),))


TERM = frozenset({0})
"""The operand that others are added to."""


@rule_for(
    aten.index_add.default,
    aten.index_copy.default,
    aten.index_reduce.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
)
def index_into(call: OpCall, axis: Axis) -> Rule:
    """x with a source (or one value) at the rows index[i] of `dim`: dims other than `dim` map. Rows that are added may be cut: each
    rank adds its own to a term of the sum."""
    shape = call.operands[0].shape
    dim = call.arg(1, "dim") % len(shape) if shape else 0

    def slots(d: int) -> tuple[Slot | None, ...]:
        return tuple(Slot(d) if len(m.shape) == len(shape) and i != 1 else None for i, m in enumerate(call.operands))

    factors = [Factor(f"d{d}", s, slots(d), (Slot(d),)) for d, s in enumerate(shape) if d != dim and s > 1]
    if call.target is not aten.index_add.default or not shape:
        return Rule(tuple(factors))
    rows = call.operands[2].shape[dim]
    if rows > 1:
        factors.append(Factor("i", rows, (None, Slot(0), Slot(dim)), (None,), "sum", TERM))
    return Rule(tuple(factors), linear=(frozenset({0, 2}),))


@rule_for(aten.index_put.default)
def index_put(call: OpCall, axis: Axis) -> Rule:
    """x[i0, :, i1] = value: dims of x that are not indexed map, and with them those of the value, which may broadcast.

    Where values are added, the indices may be cut: each rank adds its own to a term of the sum.
    """
    shape, indices = call.operands[0].shape, list(call.arg(1, "indices"))
    where = [d for d, i in enumerate(indices) if i is not None]
    n, value = len(call.operands), call.operands[-1].shape
    if not where or any(m.dtype == torch.bool for m in call.operands[1:-1]):
        return Rule()
    held = {indices[d].index: call.operands[indices[d].index].shape for d in where}
    taken = torch.broadcast_shapes(*held.values())
    spread = len(taken)
    adjacent = where == list(range(where[0], where[0] + len(where)))
    free = [d for d in range(len(shape)) if d not in where]
    factors = []
    for k, d in enumerate(free):
        after = k if adjacent and d < where[0] else k + spread
        own = after - (len(free) + spread - len(value))
        written = Slot(own) if own >= 0 and value[own] == shape[d] else None
        if shape[d] > 1:
            factors.append(Factor(f"d{d}", shape[d], (Slot(d), *(None,) * (n - 2), written), (Slot(d),)))
    if not call.arg(3, "accumulate", False):
        return Rule(tuple(factors))
    first = where[0] if adjacent else 0
    for k, size in enumerate(taken):
        own = first + k - (len(free) + spread - len(value))
        slots = [Slot(k - spread + len(s)) if spread - k <= len(s) and s[k - spread] == size else None for s in held.values()]
        if size > 1 and own >= 0 and value[own] == size:
            placed = dict(zip(held, slots, strict=True))
            factors.append(Factor(f"i{k}", size, (None, *(placed[i] for i in range(1, n - 1)), Slot(own)), (None,), "sum", TERM))
    return Rule(tuple(factors), linear=(frozenset({0, n - 1}),))


@rule_for(aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar)
def isin(call: OpCall, axis: Axis) -> Rule:
    """Elements map; each is looked for among all of the others."""
    shape, rest = call.operands[0].shape, (None,) * (len(call.operands) - 1)
    return Rule(tuple(Factor(f"d{d}", size, (Slot(d), *rest), (Slot(d),)) for d, size in enumerate(shape) if size > 1))


@rule_for(aten.bucketize.Tensor, aten.searchsorted.Tensor)
def bucketize(call: OpCall, axis: Axis) -> Rule:
    """Values map where the boundaries are one row for all; where each row of values has its own, the leading dims map."""
    place = 0 if call.target is aten.bucketize.Tensor else 1
    values, bounds = call.operands[place].shape, call.operands[1 - place].shape
    n = len(call.operands)
    shared = len(bounds) == 1
    factors = []
    for d, size in enumerate(values):
        if size > 1 and (shared or d < len(values) - 1):
            slots = tuple(Slot(d) if i == place or not shared else None for i in range(n))
            factors.append(Factor(f"d{d}", size, slots, (Slot(d),)))
    if not shared and values:
        last = len(values) - 1
        slots = tuple(Slot(last) if i == place else None for i in range(n))
        factors += [Factor("v", values[last], slots, (Slot(last),))] if values[last] > 1 else []
    return Rule(tuple(factors))
