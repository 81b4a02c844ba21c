"""Indexing that follows dims of its operand: a dim that is taken, or written, by a full range stays a dim of its own.

x[arange(n), arange(m)]       -> a permutation of dims
x[arange(n), i]               -> gather(x, 1, i), row by row: the batch, taken by an arange, is looked up where it lies
x[arange(n), i] = v           -> scatter(x, 1, i, v)
x[mask] = v                   -> where(mask, v, x), where v does not say which element goes where
take(x, i)                    -> reshape(x, [-1])[i]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .masks import affine
from .rewrite import Builder, Rules, dtype_of, shape_of

aten = torch.ops.aten


def _range_dim(i: Any, size: int) -> int | None:
    """The dim, counted from the last, along which an index is provably arange(size)."""
    form = affine(i)
    if form is None or form.constant != 0:
        return None
    steps = [d - len(form.shape) for d, c in enumerate(form.coefficients) if c]
    whole = len(steps) == 1 and form.coefficients[steps[0]] == 1 and form.shape[steps[0]] == size
    return steps[0] if whole else None


@dataclass(frozen=True)
class _Rows:
    """x[indices], its first dims indexed all, as a lookup row by row.

    spread      the shape of the indices together
    ranges      dims of x that are indexed by full ranges, in the order of the dims of `spread` that these run along, `along`
    looked_up   the other indexed dims of x
    rest        dims of x after the indexed ones
    """

    shape: tuple[int, ...]
    spread: tuple[int, ...]
    ranges: tuple[int, ...]
    along: tuple[int, ...]
    looked_up: tuple[int, ...]

    @property
    def rest(self) -> tuple[int, ...]:
        return self.shape[len(self.ranges) + len(self.looked_up) :]

    @property
    def others(self) -> list[int]:
        """The dims of `spread` that no range runs along."""
        return [d for d in range(len(self.spread)) if d not in self.along]

    @property
    def batch(self) -> list[int]:
        return [self.spread[d] for d in self.along]

    @property
    def count(self) -> int:
        return math.prod(self.spread[d] for d in self.others)

    def turned(self, b: Builder, x: Any) -> Any:
        """x as [ranges, looked_up together, rest]."""
        indexed = len(self.ranges) + len(self.looked_up)
        moved = b(aten.permute.default, x, [*self.ranges, *self.looked_up, *range(indexed, len(self.shape))])
        return b(aten.reshape.default, moved, [*self.batch, math.prod(self.shape[k] for k in self.looked_up), *self.rest])

    def turned_back(self, b: Builder, x: Any) -> Any:
        order = [*self.ranges, *self.looked_up, *range(len(self.ranges) + len(self.looked_up), len(self.shape))]
        apart = b(aten.reshape.default, x, [self.shape[k] for k in order])
        return b(aten.permute.default, apart, [order.index(d) for d in range(len(order))])

    def index(self, b: Builder, indices: Sequence[Any]) -> Any:
        """Where in the dims that are looked up together: [ranges, the other dims of `spread` together, rest]."""
        total: Any = None
        for k in self.looked_up:
            i = b(aten._to_copy.default, indices[k], dtype=torch.int64)
            inside = b(aten.where.self, b(aten.lt.Scalar, i, 0), b(aten.add.Tensor, i, self.shape[k]), i)
            total = inside if total is None else b(aten.add.Tensor, b(aten.mul.Tensor, total, self.shape[k]), inside)
        return self._spread_over(b, self._rowwise(b, b(aten.expand.default, total, list(self.spread)), ()))

    def _rowwise(self, b: Builder, x: Any, rest: tuple[int, ...]) -> Any:
        """A value over `spread`, and the dims `rest`, as [ranges, others together, rest]."""
        order = [*self.along, *self.others, *range(len(self.spread), len(self.spread) + len(rest))]
        return b(aten.reshape.default, b(aten.permute.default, x, order), [*self.batch, self.count, *rest])

    def _spread_over(self, b: Builder, i: Any) -> Any:
        own = shape_of(i)
        return b(aten.expand.default, b(aten.reshape.default, i, [*own, *[1] * len(self.rest)]), [*own, *self.rest])

    def source(self, b: Builder, value: Any) -> Any:
        """What is written, over `spread` and the rest."""
        whole = b(aten.expand.default, value, [*self.spread, *self.rest])
        return self._rowwise(b, whole, self.rest)

    def result(self, b: Builder, x: Any) -> Any:
        """What was looked up, as the indices have it."""
        order = [*self.along, *self.others]
        apart = b(aten.reshape.default, x, [*(self.spread[d] for d in order), *self.rest])
        tail = range(len(order), len(order) + len(self.rest))
        return b(aten.permute.default, apart, [*(order.index(d) for d in range(len(order))), *tail])


def _rows(x: Any, indices: Sequence[Any]) -> _Rows | None:
    """The lookup that indices of the first dims are, where some are full ranges along dims of their own."""
    if any(i is None or dtype_of(i) in (torch.bool, torch.uint8) for i in indices):
        return None
    shape = shape_of(x)
    spread = tuple(torch.broadcast_shapes(*(shape_of(i) for i in indices)))
    along: dict[int, int] = {}
    for k, i in enumerate(indices):
        found = _range_dim(i, shape[k])
        if found is not None and spread[found] == shape[k] and found + len(spread) not in along:
            along[found + len(spread)] = k
    places = tuple(sorted(along))
    ranges = tuple(along[d] for d in places)
    looked_up = tuple(k for k in range(len(indices)) if k not in ranges)
    return _Rows(shape, spread, ranges, places, looked_up) if ranges else None


def index(b: Builder, x: Any, indices: Sequence[Any]) -> Any:
    """x[i0, i1, ...] of which some are provably arange(x.shape[k]) along a dim of the result of their own."""
    rows = _rows(x, indices)
    if rows is None:
        return NotImplemented
    if rows.looked_up:
        taken = b(aten.gather.default, rows.turned(b, x), len(rows.ranges), rows.index(b, indices))
    elif rows.count == 1:
        taken = rows.turned(b, x)
    else:
        return NotImplemented
    return rows.result(b, taken)


def index_put(b: Builder, x: Any, indices: Sequence[Any], value: Any, accumulate: bool) -> Any:
    """x with value at [i0, i1, ...], of which some are ranges, or one is a mask."""
    given = [i for i in indices if i is not None]
    if len(given) == 1 and dtype_of(given[0]) == torch.bool:
        return _masked(b, x, list(indices).index(given[0]), given[0], value, accumulate)
    rows = _rows(x, indices)
    if rows is None or not rows.looked_up or dtype_of(value) != dtype_of(x):
        return NotImplemented
    args = (rows.turned(b, x), len(rows.ranges), rows.index(b, indices), rows.source(b, value))
    return rows.turned_back(b, b(aten.scatter_add.default if accumulate else aten.scatter.src, *args))


def _masked(b: Builder, x: Any, dim: int, mask: Any, value: Any, accumulate: bool) -> Any:
    """x[:, mask] = value, for a mask over x's dims from `dim` on: any element that is set gets the same."""
    shape, own, held = shape_of(x), shape_of(mask), shape_of(value)
    rest = len(shape) - dim - len(own)
    if shape[dim : dim + len(own)] != own or dtype_of(value) != dtype_of(x) or 0 in shape:
        return NotImplemented
    if len(held) > rest and held[len(held) - rest - 1] != 1:
        return NotImplemented  # one value for each element that is set: their number depends on data
    lead, tail = held[: max(0, len(held) - rest - 1)], held[max(0, len(held) - rest) :]
    spread = b(aten.reshape.default, value, [*lead, *[1] * (len(own) if len(held) > rest else 0), *tail])
    chosen = b(aten.reshape.default, mask, [*own, *[1] * rest])
    if not accumulate:
        return b(aten.where.self, chosen, spread, x)
    return b(aten.add.Tensor, x, b(aten.where.self, chosen, spread, b.scalar(0, dtype_of(x))))


def take(b: Builder, x: Any, i: Any) -> Any:
    return b(aten.index.Tensor, b(aten.reshape.default, x, [-1]), [i])


def put(b: Builder, x: Any, i: Any, source: Any, accumulate: bool) -> Any:
    flat = [b(aten.reshape.default, t, [-1]) for t in (x, i, source)]
    written = b(aten.index_put.default, flat[0], [flat[1]], flat[2], accumulate)
    return b(aten.reshape.default, written, list(shape_of(x)))


RULES: Rules = {
    aten.index_put.default: index_put,
    aten.take.default: take,
    aten.put.default: put,
}
