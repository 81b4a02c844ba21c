"""Ops that move elements without computing: reshape, permute, slices, concatenation, padding."""

from __future__ import annotations

import torch

from ..types import Varying, even_sections, local_shape
from .base import (
    Axis,
    Factor,
    LocalCall,
    OpCall,
    Rule,
    Slot,
    Strategy,
    localizer,
    rule_for,
    with_result_sizes,
)

aten = torch.ops.aten

localizer(aten.reshape.default, aten.view.default, aten.expand.default, aten.unfold_backward.default)(with_result_sizes(1))

ALONE = (frozenset({0}),)


def split_dims(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[int, Slot, Slot]]:
    """The factors of a reshape: (size, place before, place after), from the common refinement of both shapes.

    [b, s, 12*64] -> [b*s, 12, 64] has factors b, s, 12 and 64. Dims that share no refinement (6 -> 4, 9 from 12, 3) give none.
    """
    found: list[tuple[int, Slot, Slot]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        # Smallest groups of dims before and after with one product.
        left, right = [i], [j]
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(before):
                a, left, i = a * before[i], [*left, i], i + 1
            elif j < len(after):
                b, right, j = b * after[j], [*right, j], j + 1
            else:
                break
        if a != b or a == 0:
            return found
        found.extend(_refine(before, after, left, right))
    return found


def _refine(before: tuple[int, ...], after: tuple[int, ...], left: list[int], right: list[int]) -> list[tuple[int, Slot, Slot]]:
    """Factors of one group, outermost first; stops where the two sides have no common factor."""

    def borders(shape: tuple[int, ...], dims: list[int]) -> list[int]:
        """Products of the dims inside each border, from the outermost border in."""
        inner, total = [], 1
        for d in reversed(dims):
            total *= shape[d]
            inner.append(total)
        return inner[::-1]

    total = borders(before, left)[0]
    cuts = sorted({*borders(before, left), *borders(after, right), 1}, reverse=True)
    if any(big % small for big, small in zip(cuts, cuts[1:], strict=False)):
        return []  # the shapes interleave

    def place(shape: tuple[int, ...], dims: list[int], outside: int, inside: int) -> Slot | None:
        """The slot of the factor whose elements are `inside` apart and repeat every `outside`."""
        end = total
        for d in dims:
            start, end = end, end // shape[d]
            if end <= inside and outside <= start:
                return Slot(d, outer=start // outside, inner=inside // end)
        return None

    factors = []
    for outside, inside in zip(cuts, cuts[1:], strict=False):
        here, there = place(before, left, outside, inside), place(after, right, outside, inside)
        if here is not None and there is not None and outside // inside > 1:
            factors.append((outside // inside, here, there))
    return factors


@rule_for(aten.reshape.default, aten.view.default)
def reshape(call: OpCall, axis: Axis) -> Rule:
    pieces = split_dims(call.operands[0].shape, call.results[0].shape)
    factors = tuple(Factor(f"f{k}", size, (a,), (b,)) for k, (size, a, b) in enumerate(pieces))
    return Rule(factors, linear=ALONE)


@rule_for(aten.expand.default)
def expand(call: OpCall, axis: Axis) -> Rule:
    before, after = call.operands[0].shape, call.results[0].shape
    lead = len(after) - len(before)
    factors = []
    for dim, size in enumerate(after):
        if size > 1:
            own = dim - lead
            slot = Slot(own) if own >= 0 and before[own] == size else None
            factors.append(Factor(f"d{dim}", size, (slot,), (Slot(dim),)))
    return Rule(tuple(factors), linear=ALONE)


def dims_map(call: OpCall, pairs: list[tuple[int, int]]) -> Rule:
    """A rule for an op of one tensor that carries dim a of the operand to dim b of the result, for each pair (a, b)."""
    shape = call.operands[0].shape
    rest = (None,) * (len(call.operands) - 1)
    return Rule(
        tuple(Factor(f"d{a}", shape[a], (Slot(a), *rest), (Slot(b),)) for a, b in pairs if shape[a] > 1),
        linear=ALONE,
    )


def _dim(value: int, rank: int) -> int:
    return value % rank if rank else 0


@rule_for(aten.permute.default)
def permute(call: OpCall, axis: Axis) -> Rule:
    order = [_dim(d, len(call.operands[0].shape)) for d in call.arg(1, "dims")]
    return dims_map(call, [(a, b) for b, a in enumerate(order)])


@rule_for(aten.transpose.int)
def transpose(call: OpCall, axis: Axis) -> Rule:
    rank = len(call.operands[0].shape)
    a, b = _dim(call.arg(1, "dim0"), rank), _dim(call.arg(2, "dim1"), rank)
    swap = {a: b, b: a}
    return dims_map(call, [(d, swap.get(d, d)) for d in range(rank)])


@rule_for(aten.t.default)
def t(call: OpCall, axis: Axis) -> Rule:
    rank = len(call.operands[0].shape)
    return dims_map(call, [(d, rank - 1 - d) for d in range(rank)])


@rule_for(aten.unsqueeze.default)
def unsqueeze(call: OpCall, axis: Axis) -> Rule:
    rank = len(call.operands[0].shape)
    new = _dim(call.arg(1, "dim"), rank + 1)
    return dims_map(call, [(d, d + (d >= new)) for d in range(rank)])


@rule_for(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(call: OpCall, axis: Axis) -> Rule:
    gone = squeezed_dims(call)
    kept = [d for d in range(len(call.operands[0].shape)) if d not in gone]
    return dims_map(call, [(a, b) for b, a in enumerate(kept)])


def squeezed_dims(call: OpCall) -> list[int]:
    """The dims that a squeeze takes away."""
    shape = call.operands[0].shape
    which = call.arg(1, "dim", list(range(len(shape))))
    dims = {_dim(d, len(shape)) for d in ([which] if isinstance(which, int) else which)}
    return [d for d in sorted(dims) if shape[d] == 1]


@localizer(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def local_squeeze(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
    """By name: a shard of length 1 is no reason to lose its dim."""
    return aten.squeeze.dims, (call.args[0], squeezed_dims(call)), {}


def slice_bounds(call: OpCall) -> tuple[int, int, int, int]:
    """(dim, start, end, step) of a slice, clamped to the dim."""
    shape = call.operands[0].shape
    dim = _dim(call.arg(1, "dim", 0), len(shape))
    start, end, step = call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)
    start, end, _ = slice(start, end).indices(shape[dim])
    return dim, start, max(start, end), step


@rule_for(aten.slice.Tensor)
def slice_(call: OpCall, axis: Axis) -> Rule:
    """Other dims map. The sliced dim of a value cut in equal sections may be sliced at section borders."""
    dim, start, end, step = slice_bounds(call)
    shape = call.operands[0].shape
    rule = dims_map(call, [(d, d) for d in range(len(shape)) if d != dim or (start == 0 and end == shape[d] and step == 1)])
    length = end - start
    if step != 1 or length == 0 or length == shape[dim] or shape[dim] % length or start % length or length < axis.size:
        return rule
    piece = Factor("piece", length, (Slot(dim, outer=shape[dim] // length),), (Slot(dim),))
    return Rule((*rule.factors, piece), rule.linear)


@localizer(aten.slice.Tensor)
def local_slice(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
    """Bounds among what this rank holds: whole sections lie before the slice, the slice itself is one."""
    dim, start, end, step = slice_bounds(call)
    held, result = strategy.ins[0], strategy.outs[0]
    if isinstance(held, Varying) and held.dim == dim and isinstance(result, Varying):
        length = result.local_size(index)
        first = start // (end - start) * length
        return call.target, (call.args[0], dim, first, first + length), {}
    return call.target, (call.args[0], dim, start, end, step), {}


@rule_for(aten.select.int)
def select(call: OpCall, axis: Axis) -> Rule:
    shape = call.operands[0].shape
    gone = _dim(call.arg(1, "dim"), len(shape))
    return dims_map(call, [(d, d - (d > gone)) for d in range(len(shape)) if d != gone])


@rule_for(aten.cat.default)
def cat(call: OpCall, axis: Axis) -> Rule:
    """Other dims map. The joined dim: each operand is cut among the ranks in its own right, and is a section of the whole."""
    rank = len(call.results[0].shape)
    dim = _dim(call.arg(1, "dim", 0), rank)
    n = len(call.operands)
    factors = tuple(
        Factor(f"d{d}", size, (Slot(d),) * n, (Slot(d),))
        for d, size in enumerate(call.results[0].shape)
        if size > 1 and d != dim and all(len(m.shape) == rank for m in call.operands)
    )
    linear = (frozenset(range(n)),)
    pieces = [m.shape[dim] if len(m.shape) == rank else 0 for m in call.operands]
    if n < 2 or min(pieces) < axis.size:
        return Rule(factors, linear)
    if len(set(pieces)) == 1:
        return Rule((*factors, Factor("piece", pieces[0], (Slot(dim),) * n, (Slot(dim, outer=n),))), linear)
    cuts = [even_sections(piece, axis.size) for piece in pieces]
    joined = Varying(dim, tuple(section for cut in cuts for section in cut))
    return Rule(factors, linear, extra=(Strategy("pieces", tuple(Varying(dim, cut) for cut in cuts), (joined,)),))


@rule_for(aten.stack.default)
def stack(call: OpCall, axis: Axis) -> Rule:
    rank = len(call.results[0].shape)
    new = _dim(call.arg(1, "dim", 0), rank)
    n = len(call.operands)
    factors = tuple(
        Factor(f"d{d}", size, (Slot(d),) * n, (Slot(d + (d >= new)),)) for d, size in enumerate(call.operands[0].shape) if size > 1
    )
    return Rule(factors, linear=(frozenset(range(n)),))


@rule_for(aten.split_with_sizes.default, aten.split.Tensor)
def split(call: OpCall, axis: Axis) -> Rule:
    """Other dims map. The split dim: each piece is a section of the whole, cut among the ranks in its own right."""
    shape = call.operands[0].shape
    dim = _dim(call.arg(2, "dim", 0), len(shape))
    pieces = [m.shape[dim] for m in call.results]
    n = len(pieces)
    factors = [Factor(f"d{d}", size, (Slot(d),), (Slot(d),) * n) for d, size in enumerate(shape) if d != dim and size > 1]
    if len(set(pieces)) == 1 and pieces[0] >= axis.size:
        factors.append(Factor("piece", pieces[0], (Slot(dim, outer=n),), (Slot(dim),) * n))
        return Rule(tuple(factors), linear=ALONE)
    if min(pieces) < axis.size:
        return Rule(tuple(factors), linear=ALONE)
    cuts = [even_sections(piece, axis.size) for piece in pieces]
    held = Varying(dim, tuple(section for cut in cuts for section in cut))
    unequal = Strategy("pieces", (held,), tuple(Varying(dim, cut) for cut in cuts))
    return Rule(tuple(factors), linear=ALONE, extra=(unequal,))


@localizer(aten.split_with_sizes.default, aten.split.Tensor)
def local_split(call: OpCall, strategy: Strategy, index: int) -> LocalCall:
    dim = _dim(call.arg(2, "dim", 0), len(call.operands[0].shape))
    sizes = [local_shape(m.shape, t, index)[dim] for m, t in zip(call.results, strategy.outs, strict=True)]
    return aten.split_with_sizes.default, (call.args[0], sizes, dim), {}


@rule_for(aten.unbind.int)
def unbind(call: OpCall, axis: Axis) -> Rule:
    shape = call.operands[0].shape
    gone = _dim(call.arg(1, "dim", 0), len(shape))
    n = len(call.results)
    factors = tuple(
        Factor(f"d{d}", size, (Slot(d),), (Slot(d - (d > gone)),) * n) for d, size in enumerate(shape) if d != gone and size > 1
    )
    return Rule(factors, linear=ALONE)


@rule_for(aten.constant_pad_nd.default, aten.pad.default)
def pad(call: OpCall, axis: Axis) -> Rule:
    """Dims that are not padded map."""
    shape, widths = call.operands[0].shape, call.arg(1, "pad")
    padded = {len(shape) - 1 - k // 2 for k, width in enumerate(widths) if width}
    rule = dims_map(call, [(d, d) for d in range(len(shape)) if d not in padded])
    value = call.arg(2, "value", 0) if call.target is aten.constant_pad_nd.default else call.arg(3, "value")
    return rule if not value else Rule(rule.factors)


@rule_for(aten.flip.default, aten.roll.default)
def flip(call: OpCall, axis: Axis) -> Rule:
    shape = call.operands[0].shape
    dims = call.arg(1 if call.target is aten.flip.default else 2, "dims", [])
    moved = {_dim(d, len(shape)) for d in dims} or set(range(len(shape)))
    return dims_map(call, [(d, d) for d in range(len(shape)) if d not in moved])


@rule_for(aten.unfold_backward.default)
def unfold_backward(call: OpCall, axis: Axis) -> Rule:
    """The sum of windows of one dim at their places: other dims map."""
    rank = len(call.results[0].shape)
    return dims_map(call, [(d, d) for d in range(rank) if d != _dim(call.arg(2, "dim"), rank)])


@rule_for(aten.unfold.default)
def unfold(call: OpCall, axis: Axis) -> Rule:
    """Windows of one dim, their positions in a new last one."""
    rank = len(call.operands[0].shape)
    return dims_map(call, [(d, d) for d in range(rank) if d != _dim(call.arg(1, "dimension"), rank)])


@rule_for(aten.tril.default, aten.triu.default)
def triangle(call: OpCall, axis: Axis) -> Rule:
    return dims_map(call, [(d, d) for d in range(len(call.operands[0].shape) - 2)])


@rule_for(aten.diagonal.default)
def diagonal(call: OpCall, axis: Axis) -> Rule:
    """Dims other than the two of the matrix stay, in their order; the diagonal comes last."""
    rank = len(call.operands[0].shape)
    gone = {_dim(call.arg(2, "dim1", 0), rank), _dim(call.arg(3, "dim2", 1), rank)}
    return dims_map(call, [(d, k) for k, d in enumerate(d for d in range(rank) if d not in gone)])
