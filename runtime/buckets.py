"""Several tensors as one flat buffer, so that one collective serves them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..passes.ops.collectives import take_shard
from .program import Cut


def pack(tensors: list[Tensor | None]) -> Tensor:
    """The tensors one after the other, flat. Empties the list, so that each dies once it is copied."""
    first = tensors[0]
    assert first is not None
    flat = first.new_empty(sum(t.numel() for t in tensors if t is not None))
    del first
    start = 0
    for i, x in enumerate(tensors):
        if x is not None:
            flat[start : start + x.numel()].view(x.shape).copy_(x)
            start += x.numel()
        tensors[i] = x = None
    return flat


def unpack(flat: Tensor, shapes: Sequence[torch.Size | tuple[int, ...]]) -> list[Tensor]:
    """Views of `flat`: the inverse of `pack`."""
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@dataclass(frozen=True)
class ScatterLayout:
    """Where each tensor's shards stand in a bucket of n rows, row i being what index i of the axis keeps.

    Each row holds that index's shards of all tensors, one after the other, and is padded to the longest row.
    """

    cuts: tuple[Cut, ...]
    shapes: tuple[tuple[int, ...], ...]
    index: int
    size: int

    def lengths(self, i: int) -> list[int]:
        return [math.prod(self.shard_shape(k, i)) for k in range(len(self.cuts))]

    def shard_shape(self, k: int, i: int) -> tuple[int, ...]:
        shape, cut = self.shapes[k], self.cuts[k]
        return (*shape[: cut.dim], sum(section[i] for section in cut.sections), *shape[cut.dim + 1 :])

    def pack(self, tensors: list[Tensor | None]) -> Tensor:
        """The bucket [n, row length]. Empties the list, so that each tensor dies once it is copied."""
        first = tensors[0]
        assert first is not None
        lengths = [self.lengths(i) for i in range(self.size)]
        totals = [sum(row) for row in lengths]
        width = max(totals)
        bucket = first.new_empty(self.size, width) if min(totals) == width else first.new_zeros(self.size, width)
        del first
        starts = [0] * self.size
        for k, cut in enumerate(self.cuts):
            x = tensors[k]
            tensors[k] = None
            assert x is not None
            even = len(cut.sections) == 1 and len(set(cut.sections[0])) == 1 and len(set(starts)) == 1
            if even:
                rows = x.unflatten(cut.dim, (self.size, cut.sections[0][0])).movedim(cut.dim, 0)
                bucket[:, starts[0] : starts[0] + lengths[0][k]].view(rows.shape).copy_(rows)
            for i in range(self.size):
                if not even:
                    target = bucket[i, starts[i] : starts[i] + lengths[i][k]]
                    target.view(self.shard_shape(k, i)).copy_(take_shard(x, cut.dim, cut.sections, i))
                starts[i] += lengths[i][k]
        return bucket

    def unpack(self, row: Tensor) -> list[Tensor]:
        """This index's shards, views of its reduced row."""
        shapes = [self.shard_shape(k, self.index) for k in range(len(self.cuts))]
        return unpack(row[: sum(map(math.prod, shapes))], shapes)
