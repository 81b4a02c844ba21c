"""All reshaping views become `reshape` with explicit sizes, merged where they meet; slices, expands and permutations explicit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .rewrite import Builder, arguments, dtype_of, made_by, shape_of

aten = torch.ops.aten


def explicit_sizes(shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """`sizes` with its -1 filled in, for a reshape of `shape`."""
    known = math.prod(s for s in sizes if s != -1)
    return [math.prod(shape) // known if s == -1 else s for s in sizes]


def reshape(b: Builder, x: Any, sizes: Sequence[int]) -> Any:
    sizes = explicit_sizes(shape_of(x), list(sizes))
    while made_by(x, aten.reshape.default):
        x = x.args[0]
    if tuple(sizes) == shape_of(x):
        return x
    return b.emit(aten.reshape.default, x, sizes)


def as_reshape(b: Builder, x: Any, sizes: Sequence[int]) -> Any:
    return b(aten.reshape.default, x, sizes)


def flatten(b: Builder, x: Any, start: int, end: int) -> Any:
    shape = shape_of(x)
    if not shape:
        return b(aten.reshape.default, x, [1])
    return b(aten.reshape.default, x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


def unflatten(b: Builder, x: Any, dim: int, sizes: Sequence[int]) -> Any:
    shape = shape_of(x)
    return b(aten.reshape.default, x, [*shape[:dim], *explicit_sizes([shape[dim]], sizes), *shape[dim + 1 :]])


def expand(b: Builder, x: Any, sizes: Sequence[int], *, implicit: bool = False) -> Any:
    shape = shape_of(x)
    new = len(sizes) - len(shape)
    explicit = [shape[k - new] if s == -1 else s for k, s in enumerate(sizes)]
    return x if tuple(explicit) == shape else b.emit(aten.expand.default, x, explicit)


def expand_as(b: Builder, x: Any, other: Any) -> Any:
    return b(aten.expand.default, x, list(shape_of(other)))


def broadcast_tensors(b: Builder, tensors: Sequence[Any]) -> tuple[Any, ...]:
    shape = torch.broadcast_shapes(*(shape_of(t) for t in tensors))
    return tuple(b(aten.expand.default, t, list(shape)) for t in tensors)


def broadcast_to(b: Builder, x: Any, sizes: Sequence[int]) -> Any:
    return b(aten.expand.default, x, sizes)


def slice_(b: Builder, x: Any, dim: int, start: int | None, end: int | None, step: int) -> Any:
    size = shape_of(x)[dim]
    low = _clamp(0 if start is None else start, size)
    high = max(low, _clamp(size if end is None else end, size))
    if low == 0 and high == size and step == 1:
        return x
    pieces = _pieces(x, dim, low, high) if step == 1 else None
    return b(aten.cat.default, pieces, dim) if pieces else b.emit(aten.slice.Tensor, x, dim, low, high, step)


def _pieces(x: Any, dim: int, low: int, high: int) -> list[Any] | None:
    """What a concatenation was made of from `low` to `high`; None where a piece lies across a border.

    A tensor that is filled part by part is a concatenation anew after each part, of which the next takes slices.
    """
    if not made_by(x, aten.cat.default):
        return None
    tensors, joined = arguments(x)[:2]
    if joined != dim or any(dtype_of(t) != dtype_of(x) for t in tensors):
        return None
    found, end = [], 0
    for tensor in tensors:
        start, end = end, end + shape_of(tensor)[dim]
        if low <= start and end <= high:
            found.append(tensor)
        elif start < high and low < end:
            return None
    return found


def _clamp(position: int, size: int) -> int:
    return max(0, min(position + size if position < 0 else position, size))


def narrow(b: Builder, x: Any, dim: int, start: Any, length: int) -> Any:
    if not isinstance(start, int):
        return NotImplemented
    start = start % shape_of(x)[dim] if start < 0 else start
    return b(aten.slice.Tensor, x, dim, start, start + length)


def select(b: Builder, x: Any, dim: int, index: Any) -> Any:
    return b.emit(aten.select.int, x, dim, index % shape_of(x)[dim]) if isinstance(index, int) and index < 0 else NotImplemented


def transpose(b: Builder, x: Any, dim0: int, dim1: int) -> Any:
    low, high = sorted((dim0, dim1))
    if low == high:
        return x
    if made_by(x, aten.transpose.int) and tuple(x.args[1:]) == (low, high):
        return x.args[0]
    return b.emit(aten.transpose.int, x, low, high)


def transposed(b: Builder, x: Any, *_: Any) -> Any:
    """t, mT: the last two dims."""
    rank = len(shape_of(x))
    return x if rank < 2 else b(aten.transpose.int, x, rank - 2, rank - 1)


def reversed_dims(b: Builder, x: Any) -> Any:
    return b(aten.permute.default, x, list(reversed(range(len(shape_of(x))))))


def permute(b: Builder, x: Any, dims: Sequence[int]) -> Any:
    dims = list(dims)
    if made_by(x, aten.permute.default):
        inner = arguments(x)[1]
        return b(aten.permute.default, x.args[0], [inner[d] for d in dims])
    if dims == list(range(len(dims))):
        return x
    return b.emit(aten.permute.default, x, dims)


def movedim(b: Builder, x: Any, source: Any, destination: Any) -> Any:
    rank = len(shape_of(x))
    sources = [s % rank for s in ([source] if isinstance(source, int) else source)]
    destinations = [d % rank for d in ([destination] if isinstance(destination, int) else destination)]
    rest = iter(d for d in range(rank) if d not in sources)
    placed = dict(zip(destinations, sources, strict=True))
    return b(aten.permute.default, x, [placed[d] if d in placed else next(rest) for d in range(rank)])


def squeeze(b: Builder, x: Any, *dims: Any) -> Any:
    shape = shape_of(x)
    chosen = range(len(shape)) if not dims else dims[0] if isinstance(dims[0], tuple | list) else [dims[0]]
    gone = {d for d in chosen if d < len(shape) and shape[d] == 1}
    if len(gone) == 1 and made_by(x, aten.unsqueeze.default) and x.args[1] in gone:
        return x.args[0]
    if len(gone) == 1:
        return b.emit(aten.squeeze.dim, x, gone.pop())
    return b(aten.reshape.default, x, [s for d, s in enumerate(shape) if d not in gone])


def unsqueeze(b: Builder, x: Any, dim: int) -> Any:
    return x.args[0] if made_by(x, aten.squeeze.dim) and x.args[1] == dim else NotImplemented


def split(b: Builder, x: Any, size: int, dim: int) -> Any:
    return (x,) if size >= shape_of(x)[dim] else NotImplemented


def split_sizes(b: Builder, x: Any, sizes: Sequence[int], dim: int) -> Any:
    if len(sizes) == 1:
        return (x,)
    if len(set(sizes[:-1])) == 1 and 0 < sizes[-1] <= sizes[0]:
        return b(aten.split.Tensor, x, sizes[0], dim)
    return NotImplemented


def chunk(b: Builder, x: Any, chunks: int, dim: int) -> Any:
    return b(aten.split.Tensor, x, max(1, -(-shape_of(x)[dim] // chunks)), dim)


def repeat(b: Builder, x: Any, repeats: Sequence[int]) -> Any:
    """Dims interleaved with their repeats: unsqueeze, expand, reshape."""
    shape = (1,) * (len(repeats) - len(shape_of(x))) + shape_of(x)
    if all(r == 1 for r in repeats):
        return b(aten.reshape.default, x, list(shape))
    ones = [n for size in shape for n in (1, size)]
    whole = [n for r, size in zip(repeats, shape, strict=True) for n in (r, size)]
    spread = b(aten.expand.default, b(aten.reshape.default, x, ones), whole)
    return b(aten.reshape.default, spread, [r * size for r, size in zip(repeats, shape, strict=True)])


def tile(b: Builder, x: Any, repeats: Sequence[int]) -> Any:
    rank = len(shape_of(x))
    return b(aten.repeat.default, x, [1] * (rank - len(repeats)) + list(repeats))


def repeat_interleave(b: Builder, x: Any, repeats: int, dim: int | None, *, output_size: int | None = None) -> Any:
    if dim is None:
        x, dim = b(aten.reshape.default, x, [-1]), 0
    shape = shape_of(x)
    spread = b(aten.expand.default, b(aten.unsqueeze.default, x, dim + 1), [*shape[: dim + 1], repeats, *shape[dim + 1 :]])
    return b(aten.reshape.default, spread, [*shape[:dim], shape[dim] * repeats, *shape[dim + 1 :]])


def repeated_places(b: Builder, repeats: Any, *, output_size: int | None = None) -> Any:
    """Each place as often as `repeats` says: of how many the repeats have ended before."""
    if output_size is None:
        return NotImplemented
    ends = b(aten.cumsum.default, repeats, 0, dtype=torch.int64)
    places = b(aten.searchsorted.Tensor, ends, b(aten.arange.default, output_size, dtype=torch.int64), right=True)
    return b(aten._to_copy.default, places, dtype=dtype_of(repeats))


def slice_scatter(b: Builder, x: Any, src: Any, dim: int, start: int | None, end: int | None, step: int) -> Any:
    """x with x[start:end] replaced: what stands before it, src, what stands after it."""
    if step != 1:
        return NotImplemented
    size = shape_of(x)[dim]
    low = _clamp(0 if start is None else start, size)
    high = max(low, _clamp(size if end is None else end, size))
    pieces = [b(aten.slice.Tensor, x, dim, 0, low)] if low else []
    pieces.append(b(aten._to_copy.default, src, dtype=dtype_of(x)))
    if high < size:
        pieces.append(b(aten.slice.Tensor, x, dim, high, size))
    return b(aten.cat.default, pieces, dim)


def select_scatter(b: Builder, x: Any, src: Any, dim: int, index: int) -> Any:
    index %= shape_of(x)[dim]
    return b(aten.slice_scatter.default, x, b(aten.unsqueeze.default, src, dim), dim, index, index + 1, 1)


def copy(b: Builder, x: Any, src: Any, *_: Any) -> Any:
    """x overwritten with src: its shape and dtype, src's values."""
    return b(aten.expand.default, b(aten._to_copy.default, src, dtype=dtype_of(x)), list(shape_of(x)))


def fill(b: Builder, x: Any, number: Any) -> Any:
    if isinstance(number, int | float):
        return b(aten.full.default, list(shape_of(x)), number, dtype=dtype_of(x))
    return copy(b, x, number)


def conjugate(b: Builder, x: Any) -> Any:
    """Computed at once: what torch leaves to the reader of the value, `view_as_real` will not read."""
    return b.emit(aten._conj_physical.default, x) if dtype_of(x).is_complex else x


def part(index: int) -> Any:
    """The real or the imaginary part."""

    def rule(b: Builder, x: Any) -> Any:
        if not dtype_of(x).is_complex:
            return NotImplemented if index else x
        pairs = b(aten.view_as_real.default, x)
        return b(aten.select.int, pairs, len(shape_of(x)), index)

    return rule


def diagonal_sum(b: Builder, x: Any) -> Any:
    """trace: the sum of what lies on the diagonal, so that rows and columns may be cut."""
    chosen = b(aten.eye.m, *shape_of(x), dtype=torch.bool)
    return b(aten.sum.dim_IntList, b(aten.where.self, chosen, x, b.scalar(0, dtype_of(x))), [0, 1])


def eye(b: Builder, rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """True where the row is the column."""
    row = b(aten.reshape.default, b(aten.arange.default, rows, dtype=torch.int64), [rows, 1])
    equal = b(aten.eq.Tensor, row, b(aten.arange.default, rows if columns is None else columns, dtype=torch.int64))
    return b(aten._to_copy.default, equal, dtype=dtype or torch.get_default_dtype())


def rotate(b: Builder, x: Any, times: int, dims: Sequence[int]) -> Any:
    """rot90."""
    first, second = dims
    turned = b(aten.flip.default, x, {1: [second], 2: [first, second], 3: [first]}[times % 4]) if times % 4 else x
    return b(aten.transpose.int, turned, first, second) if times % 2 else turned


def same_as(target: Any) -> Any:
    """The rule of a view's form that copies, of which a functional graph knows no difference."""
    return lambda b, *args, **kwargs: b(target, *args, **kwargs)


COPIES = {
    aten.diagonal_copy.default: aten.diagonal.default,
    aten.expand_copy.default: aten.expand.default,
    aten.narrow_copy.default: aten.narrow.default,
    aten.permute_copy.default: aten.permute.default,
    aten.select_copy.int: aten.select.int,
    aten.slice_copy.Tensor: aten.slice.Tensor,
    aten.split_copy.Tensor: aten.split.Tensor,
    aten.split_with_sizes_copy.default: aten.split_with_sizes.default,
    aten.squeeze_copy.default: aten.squeeze.default,
    aten.squeeze_copy.dim: aten.squeeze.dim,
    aten.squeeze_copy.dims: aten.squeeze.dims,
    aten.t_copy.default: aten.t.default,
    aten.transpose_copy.int: aten.transpose.int,
    aten.unbind_copy.int: aten.unbind.int,
    aten.unfold_copy.default: aten.unfold.default,
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
    aten.unsqueeze_copy.default: aten.unsqueeze.default,
    aten.view_copy.default: aten.view.default,
}

RULES: dict[Any, Any] = {
    **{copied: same_as(view) for copied, view in COPIES.items()},
    aten.reshape.default: reshape,
    aten.view.default: as_reshape,
    aten._unsafe_view.default: as_reshape,
    aten._reshape_alias.default: lambda b, x, sizes, strides: b(aten.reshape.default, x, sizes),
    aten.view_as.default: lambda b, x, other: b(aten.reshape.default, x, list(shape_of(other))),
    aten.reshape_as.default: lambda b, x, other: b(aten.reshape.default, x, list(shape_of(other))),
    aten.flatten.using_ints: flatten,
    aten.ravel.default: lambda b, x: b(aten.reshape.default, x, [-1]),
    aten.unflatten.int: unflatten,
    aten.expand.default: expand,
    aten.expand_as.default: expand_as,
    aten.broadcast_to.default: broadcast_to,
    aten.broadcast_tensors.default: broadcast_tensors,
    aten.slice.Tensor: slice_,
    aten.narrow.default: narrow,
    aten.select.int: select,
    aten.transpose.int: transpose,
    aten.swapaxes.default: lambda b, x, a, c: b(aten.transpose.int, x, a, c),
    aten.swapdims.default: lambda b, x, a, c: b(aten.transpose.int, x, a, c),
    aten.t.default: transposed,
    aten.mT.default: transposed,
    aten.numpy_T.default: reversed_dims,
    aten.permute.default: permute,
    aten.movedim.int: movedim,
    aten.movedim.intlist: movedim,
    aten.squeeze.default: squeeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.unsqueeze.default: unsqueeze,
    aten.split.Tensor: split,
    aten.split.sizes: split_sizes,
    aten.split_with_sizes.default: split_sizes,
    aten.chunk.default: chunk,
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
    aten.copy.default: copy,
    aten.fill.Tensor: fill,
    aten.fill.Scalar: fill,
    aten.conj.default: conjugate,
    aten._conj.default: conjugate,
    aten.conj_physical.default: conjugate,
    aten.resolve_conj.default: lambda b, x: x,
    aten._neg_view.default: lambda b, x: b(aten.neg.default, x),
    aten.resolve_neg.default: lambda b, x: x,
    aten.real.default: part(0),
    aten.imag.default: part(1),
    aten.trace.default: diagonal_sum,
    aten.eye.default: eye,
    aten.eye.m: eye,
    aten.rot90.default: rotate,
    aten.repeat.default: repeat,
    aten.tile.default: tile,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.repeat_interleave.Tensor: repeated_places,
}
