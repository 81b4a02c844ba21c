"""Elementwise ops: every dim maps; operands broadcast from the right."""

from __future__ import annotations

import torch

from ..ops import gradient, random  # noqa: F401  (define the ops)
from ..types import Sections, Varying, flatten_sections
from .base import Axis, Factor, OpCall, Rule, Slot, Strategy, has_derivatives, rule_for

aten = torch.ops.aten
ours = torch.ops.shardwright

# The op that draws a shard, and whether the whole one's arguments name its shape already.
RANDOM = {
    ours.dropout.default: (ours.dropout_shard.default, False),
    ours.dropout_shard.default: (ours.dropout_shard.default, True),
    ours.uniform.default: (ours.uniform_shard.default, True),
    ours.uniform_shard.default: (ours.uniform_shard.default, True),
}

# Operands that an op is linear in together (a set), the other operands being coefficients.
LINEAR = {
    aten.add.Tensor: (frozenset({0, 1}),),
    aten.sub.Tensor: (frozenset({0, 1}),),
    aten.neg.default: (frozenset({0}),),
    aten._conj_physical.default: (frozenset({0}),),
    aten.mul.Tensor: (frozenset({0}), frozenset({1})),
    aten.mul.Scalar: (frozenset({0}),),
    aten.div.Tensor: (frozenset({0}),),
    aten.div.Scalar: (frozenset({0}),),
    aten._to_copy.default: (frozenset({0}),),
    aten.clone.default: (frozenset({0}),),
}


@rule_for(
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.copy.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.hardswish.default,
    aten._prelu_kernel.default,
    aten._conj_physical.default,  # without its tag before torch 2.13
    aten.floor_divide.default,
    aten.complex.default,
    aten.polar.default,
    ours.with_slope.default,
)
def pointwise(call: OpCall, axis: Axis) -> Rule | None:
    if len({m.shape for m in call.results}) != 1:
        return None
    result = call.results[0].shape
    factors = []
    for dim, size in enumerate(result):
        if size <= 1:
            continue
        slots = []
        for meta in call.operands:
            own = dim - (len(result) - len(meta.shape))
            slots.append(Slot(own) if own >= 0 and meta.shape[own] == size else None)
        factors.append(Factor(f"d{dim}", size, tuple(slots), (Slot(dim),) * len(call.results)))
    return Rule(tuple(factors), linear=linear_sets(call))


@rule_for(
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.huber_loss.default,
    aten.kl_div.default,
    aten.l1_loss.default,
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
)
def elementwise_loss(call: OpCall, axis: Axis) -> Rule | None:
    """With reduction "none"; a loss that reduces is taken apart by passes/normalize/losses.py."""
    return pointwise(call, axis) if call.results[0].shape == call.operands[0].shape else None


@rule_for(aten.log_sigmoid_forward.default)
def log_sigmoid(call: OpCall, axis: Axis) -> Rule | None:
    """Its second result is what the backward reads; not everywhere is it computed."""
    x, kept = call.operands[0].shape, call.results[1].shape
    if kept != x:
        return None
    return Rule(tuple(Factor(f"d{d}", size, (Slot(d),), (Slot(d), Slot(d))) for d, size in enumerate(x) if size > 1))


def linear_sets(call: OpCall) -> tuple[frozenset[int], ...]:
    if not has_derivatives(call.results[0].dtype):
        return ()
    if call.target is aten.where.self:
        return (frozenset({1, 2}),) if len(call.operands) == 3 else ()
    if call.target is aten._to_copy.default and call.results[0].dtype.itemsize < call.operands[0].dtype.itemsize:
        return ()  # the sum would be made of rounded terms
    found = LINEAR.get(call.target, ())
    if call.target in (aten.add.Tensor, aten.sub.Tensor) and len(call.operands) == 1:
        return ()  # a scalar term makes it affine
    if call.target is aten.div.Tensor and call.operand_of(0) is None:
        return ()
    return tuple(s for s in found if max(s) < len(call.operands))


def append_cut(call: OpCall, axis: Axis, strategy: Strategy, cut: Sections) -> Strategy:
    """A random op, or its `_shard` form, with one more cut, over `axis`: it draws by global position."""
    target, named = RANDOM[call.target]
    out = strategy.outs[0]
    assert isinstance(out, Varying)
    sizes = flatten_sections(out.sections)
    if target is call.target:
        *head, axes, dims, counts, old = call.args
    else:
        head, (axes, dims, counts, old) = [*call.args], ([],) * 4
        head += [] if named else [list(call.results[0].shape)]
    args = (*head, [*axes, axis.name], [*dims, out.dim], [*counts, len(sizes)], [*old, *sizes])
    return Strategy(strategy.label, strategy.ins, strategy.outs, target, args, call.kwargs)


@rule_for(ours.dropout.default, ours.dropout_shard.default)
def dropout(call: OpCall, axis: Axis) -> Rule | None:
    """x maps on every dim; the seed is common."""
    x = call.operands[0].shape
    seed = len(call.operands) - 1
    factors = tuple(Factor(f"d{dim}", size, (Slot(dim), *([None] * seed)), (Slot(dim),)) for dim, size in enumerate(x) if size > 1)
    return Rule(factors, linear=(frozenset({0}),), swap={f.name: append_cut for f in factors})


@rule_for(ours.uniform.default, ours.uniform_shard.default)
def uniform(call: OpCall, axis: Axis) -> Rule | None:
    """The result maps on every dim; the seed is common."""
    none = (None,) * len(call.operands)
    factors = tuple(Factor(f"d{dim}", size, none, (Slot(dim),)) for dim, size in enumerate(call.results[0].shape) if size > 1)
    return Rule(factors, swap={f.name: append_cut for f in factors})
