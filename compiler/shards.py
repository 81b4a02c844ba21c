"""What ZeRO leaves a rank of a parameter, after tensor parallelism, and how the gradient is summed for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..passes.types import even_sections
from ..passes.zero import shard_dim, zero_cut
from ..runtime.program import Cut, Mesh
from .gradient_sums import GradientSums, Sums, scattered
from .topology import Topology


@dataclass(frozen=True)
class Shards:
    """cuts      over the data axes, and over tp of what it holds copies of; those that the graphs gather (ZeRO-3) come first
    gathered  the axes of the others: the parameter is gathered over them before a step, and its gradient scattered
    sums      of its gradient, as the graphs give it
    """

    cuts: tuple[Cut, ...]
    gathered: tuple[str, ...]
    sums: Sums


@dataclass(frozen=True)
class Sharding:
    """Of a plan's parameters at the coordinates of a rank. topology, small, beside: of the plan, for which the sums are
    chosen."""

    mesh: Mesh
    coordinates: Mapping[str, int]
    topology: Topology | None
    small: bool = False
    beside: float = 0.0

    @cached_property
    def _ways(self) -> Mapping[int, GradientSums]:
        """By level: found once for all parameters."""
        return {level: GradientSums(self.mesh, level, self.topology, self.small, self.beside) for level in (0, 2, 3)}

    def shards(self, level: int, tensor_cuts: Sequence[Cut], shape: tuple[int, ...], copied: float | None) -> Shards:
        """Of a parameter of this whole shape.

        level          of ZeRO
        tensor_cuts    over tp
        copied         None: its gradient is not to be summed over tp. Else the bytes of all parameters of which it is, whole over
                       the data axes, at the same level
        """
        level = level if self.mesh.size("dp_shard") > 1 else 0
        left = _Left(shape, shape)
        for cut in tensor_cuts:
            left = left.after(cut, self.coordinates[cut.axis])
        inside = []
        if level == 3 and (found := zero_cut(left.own, self.mesh.size("dp_shard"))) is not None:
            inside.append(Cut("dp_shard", found.dim, found.sections))
            left = left.after(inside[0], self.coordinates["dp_shard"])
        ways = self._ways[3 if inside else 2 if level else 0]
        first = ways.own if copied is None else ways.copies(copied)
        for sums in (first, *ways.if_short(copied is not None)):
            cuts = self._cut(left, scattered(sums))
            if cuts is not None:
                return Shards((*inside, *cuts), scattered(sums), sums)
        raise AssertionError("the last way cuts nothing")

    def _cut(self, left: _Left, axes: Sequence[str]) -> list[Cut] | None:
        """Over each of the axes, of what the ones before leave; None where no dim is long enough on all ranks."""
        cuts = []
        for axis in axes:
            n = self.mesh.size(axis)
            dim = shard_dim(left.least, n)
            if dim is None:
                return None
            cuts.append(Cut(axis, dim, even_sections(left.own[dim], n)))
            left = left.after(cuts[-1], self.mesh.index(self.coordinates, axis))
        return cuts


@dataclass(frozen=True)
class _Left:
    """The shape that is left on this rank, and the smallest that is on any."""

    own: tuple[int, ...]
    least: tuple[int, ...]

    def after(self, cut: Cut, index: int) -> _Left:
        lengths = [sum(part) for part in zip(*cut.sections, strict=True)]
        least = min(*lengths, self.least[cut.dim] // len(lengths))
        return _Left(_with(self.own, cut.dim, lengths[index]), _with(self.least, cut.dim, least))


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
