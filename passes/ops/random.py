"""Random numbers drawn by position, so that every mesh, and every recomputation, draws the same.

    dropout(x, seed, p, site)      x * keep / (1 - p)
    uniform(seed, site, shape, dtype)

and their `_shard` forms, in which this rank has its part of a tensor of global `shape` after the cuts `axes`, `dims`,
`counts`, `sizes` (see `positions.cut_ranges`). `seed` is int64 []; `site` is a number of the op's own in the program.

The number of an element is a hash of (seed, site, its position in the global tensor). The position is taken apart into
a row (the leading dims) and a column (as many trailing dims as give a few hundred elements):

    k0, k1 = the halves of splitmix64's mix of (seed, site, row)                  Steele et al., OOPSLA 2014, figure 17
    h = k0 + column * 0x9e3779b1;  h ^= h >> 16;  h = h * 0x7feb352d + k1;  h ^= h >> 15;  h *= 0x846ca68b

in 32 bits without sign: the constants are "lowbias32" of Wellons' hash-prospector, keyed twice by the row. Columns of
2^31 and more carry over into the row. `uniform` takes the top bits of h; `dropout` keeps an element where h, read as a
signed number, is at least p * 2^32 - 2^31. All of it is plain ATen on int32. The backward draws anew: nothing is saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .collectives import ops
from .define import chunk_elements, define
from .positions import Ranges, cut_ranges, range_lengths, range_positions, whole_ranges

_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_MIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_COLUMN, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
_ROW_ELEMENTS = 256
_COLUMN_BITS = 31
_LANE = 1 << 62  # sets the second word of a float64 apart from every site


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of the low `bits` of `value`."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix_int(z: int) -> int:
    for shift, factor in _MIX64:
        z = ((z ^ (z >> shift)) * factor) & _MASK64
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer, in place on int64."""
    for shift, factor in _MIX64:
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor, 64))
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of int64, each int32."""
    words = z.view(torch.int32).unflatten(-1, (-1, 2))
    return words[..., 0].contiguous(), words[..., 1].contiguous()


def _joint_positions(shape: Sequence[int], held: Sequence[Ranges], device: torch.device) -> Tensor:
    """Row-major positions in `shape` of what is held of each dim, flattened."""
    total, stride = torch.zeros((), dtype=torch.int64, device=device), 1
    for size, ranges in zip(reversed(shape), reversed(held), strict=True):
        total = (range_positions(ranges, device) * stride).view(-1, *(1 for _ in total.shape)) + total
        stride *= size
    return total.reshape(-1)


class _Counters:
    """The keys of each row and the counter of each column of one tensor's local part, seen as [rows, columns]."""

    def __init__(self, seed: Tensor, site: int, shape: Sequence[int], held: Sequence[Ranges]):
        device = seed.device
        split = len(shape)
        while split and math.prod(shape[split:]) < _ROW_ELEMENTS:
            split -= 1
        row = _joint_positions(shape[:split], held[:split], device).unsqueeze(1)
        column = _joint_positions(shape[split:], held[split:], device).unsqueeze(0)
        self.rows, self.columns = row.shape[0], column.shape[1]
        carries = -(-math.prod(shape[split:]) >> _COLUMN_BITS)
        if carries > 1:
            row = row * carries + (column >> _COLUMN_BITS)
            column = column & ((1 << _COLUMN_BITS) - 1)
        start = _mix(seed.reshape(1, 1) ^ _signed(_mix_int(site + 1), 64))
        k0, k1 = _halves(_mix(row * _signed(_GOLDEN64, 64) + start))
        self._k0, self._k1 = k0.expand(self.rows, self.columns), k1.expand(self.rows, self.columns)
        self._column = _halves(column * _COLUMN)[0].expand(self.rows, self.columns)
        self._limit = chunk_elements(device)
        self._buffers = torch.empty(2, min(self._limit, self.rows * self.columns), dtype=torch.int32, device=device)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Cuts the local part into pieces that stay in the cache."""
        width = min(self.columns, self._limit)
        if not width:
            return
        step = max(1, self._limit // width)
        for row in range(0, self.rows, step):
            for column in range(0, self.columns, width):
                yield slice(row, min(row + step, self.rows)), slice(column, min(column + width, self.columns))

    def draw(self, rows: slice, columns: slice) -> Tensor:
        """32 random bits for each element of a chunk: an int32 buffer, good until the next draw."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        h, t = (buffer[: shape[0] * shape[1]].view(shape) for buffer in self._buffers)
        torch.add(self._k0[rows, columns], self._column[rows, columns], out=h)
        _fold(h, t, 16)
        torch.add(self._k1[rows, columns], h, alpha=_FIRST, out=h)
        _fold(h, t, 15)
        return h.mul_(_signed(_SECOND, 32))


def _fold(h: Tensor, t: Tensor, shift: int) -> None:
    """h ^= h >> shift, without sign."""
    torch.bitwise_right_shift(h, shift, out=t)
    h.bitwise_xor_(t.bitwise_and_((1 << (32 - shift)) - 1))


def dropped(x: Tensor, seed: Tensor, p: float, site: int, shape: Sequence[int], held: Sequence[Ranges]) -> Tensor:
    """`x`, what is `held` of a tensor of `shape`, with elements dropped by their position in the whole."""
    left = range_lengths(held)
    if list(x.shape) != left:
        raise ValueError(f"dropout: a tensor of {list(x.shape)} where the cuts of {list(shape)} leave {left}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: the probability is {p}, not in [0, 1]")
    if p == 0.0:
        return x.clone()
    if p == 1.0 or not x.numel():
        return torch.zeros_like(x)
    counters = _Counters(seed.to(x.device), site, shape, held)
    source = x.contiguous().view(counters.rows, counters.columns)
    result = torch.empty_like(source)
    threshold = round(p * (1 << 32)) - (1 << 31)
    scale = 1.0 / (1.0 - p)
    scale_bits = int(torch.tensor(scale, dtype=torch.float32, device="cpu").view(torch.int32))
    for chunk in counters.chunks():
        keep = counters.draw(*chunk).ge_(min(threshold, (1 << 31) - 1))
        if x.dtype == torch.float32:
            # 0 or 1 times the bits of a float are the bits of 0.0 or of that float.
            torch.mul(source[chunk], keep.mul_(scale_bits).view(torch.float32), out=result[chunk])
        else:
            torch.mul(source[chunk], keep.to(x.dtype), out=result[chunk]).mul_(scale)
    result = result.view(x.shape)
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


def _uniform_values(seed: Tensor, site: int, shape: Sequence[int], held: Sequence[Ranges], dtype: torch.dtype) -> Tensor:
    result = torch.empty(range_lengths(held), dtype=dtype, device=seed.device)
    if not result.numel():
        return result
    counters = _Counters(seed, site, shape, held)
    flat = result.view(counters.rows, counters.columns)
    bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(dtype)
    if bits is None:
        raise ValueError(f"uniform: {dtype} is not a floating point type")
    high = min(bits, 27)
    for chunk in counters.chunks():
        flat[chunk] = _top_bits(counters.draw(*chunk), high)
    if bits > high:
        counters = _Counters(seed, site ^ _LANE, shape, held)
        for chunk in counters.chunks():
            flat[chunk].mul_(1 << (bits - high)).add_(_top_bits(counters.draw(*chunk), bits - high))
    return result.mul_(2.0**-bits)


def _top_bits(h: Tensor, bits: int) -> Tensor:
    return (h >> (32 - bits)).bitwise_and_((1 << bits) - 1)


def _dropout(x: Tensor, seed: Tensor, p: float, site: int) -> Tensor:
    return dropped(x, seed, p, site, x.shape, whole_ranges(x.shape))


def _dropout_shard(
    x: Tensor, seed: Tensor, p: float, site: int,
    shape: Sequence[int], axes: Sequence[str], dims: Sequence[int], counts: Sequence[int], sizes: Sequence[int],
) -> Tensor:  # fmt: skip
    return dropped(x, seed, p, site, shape, cut_ranges(shape, axes, dims, counts, sizes))


def _uniform(seed: Tensor, site: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _uniform_values(seed, site, shape, whole_ranges(shape), dtype)


def _uniform_shard(
    seed: Tensor, site: int, shape: Sequence[int], dtype: torch.dtype,
    axes: Sequence[str], dims: Sequence[int], counts: Sequence[int], sizes: Sequence[int],
) -> Tensor:  # fmt: skip
    return _uniform_values(seed, site, shape, cut_ranges(shape, axes, dims, counts, sizes), dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, *ctx.rest = inputs
    ctx.save_for_backward(seed)


define(
    "dropout(Tensor x, Tensor seed, float p, int site) -> Tensor",
    _dropout,
    lambda x, *_: torch.empty_like(x),
    lambda ctx, grad: (ops.dropout(grad, *ctx.saved_tensors, *ctx.rest), None, None, None),
    _save,
)
define(
    "dropout_shard(Tensor x, Tensor seed, float p, int site, int[] shape, str[] axes, int[] dims, int[] counts, int[] sizes) "
    "-> Tensor",
    _dropout_shard,
    lambda x, *_: torch.empty_like(x),
    lambda ctx, grad: (ops.dropout_shard(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 8),
    _save,
)
define(
    "uniform(Tensor seed, int site, int[] shape, ScalarType dtype) -> Tensor",
    _uniform,
    lambda seed, site, shape, dtype: seed.new_empty(shape, dtype=dtype),
)
define(
    "uniform_shard(Tensor seed, int site, int[] shape, ScalarType dtype, str[] axes, int[] dims, int[] counts, int[] sizes) "
    "-> Tensor",
    _uniform_shard,
    lambda seed, site, shape, dtype, *cuts: seed.new_empty(range_lengths(cut_ranges(shape, *cuts)), dtype=dtype),
)
