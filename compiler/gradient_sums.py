"""How gradients are summed once a step: over which axes together, in which order, and what each rank is left with of them.

The backward leaves a gradient partial over the data axes and, of a parameter that the ranks of a tensor axis hold copies of, over
that axis too. Each sum takes one of these axes or several at once. ZeRO leaves a rank a shard of what is summed over dp_shard, and
of copies over tp besides; before the next step the parameter is gathered over these, which is part of the price. The cheapest
sequence for the machine is found, not listed: where the links of a node add up it is one exchange over all ranks, where little is
copied a second sum of the shards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ..runtime.program import Mesh
from .plan import DATA_AXES
from .topology import CollectiveKind, CollectiveTime, Topology, collective_bytes


class Sum(NamedTuple):
    """One collective. axis: several are joined by "+", major first."""

    kind: Literal["all_reduce", "reduce_scatter"]
    axis: str

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.axis.split("+"))

    @property
    def kinds(self) -> tuple[CollectiveKind, ...]:
        """What it takes: of what is scattered the parameter is gathered."""
        return (self.kind, "all_gather") if self.kind == "reduce_scatter" else (self.kind,)


Sums = tuple[Sum, ...]
"""Each over other axes; those that scatter come first, for after them less is to be summed."""

Time = Callable[[int, Sum], CollectiveTime]
"""Of the first, second, ... sum."""


class Way(NamedTuple):
    """What some sums take of a gradient, by its bytes before the first; left: how many shards they leave."""

    sums: Sums
    time: CollectiveTime
    left: int


class Steps(NamedTuple):
    """Some sums, one after the other.

    each      its number, it, and the share that it sums of a gradient whole over the data axes
    beside    whether the first runs beside the backward
    """

    each: tuple[tuple[int, tuple[Sum, float]], ...]
    beside: bool


def scattered(sums: Sums) -> tuple[str, ...]:
    """Over which axes a rank is left a shard, in the order in which they cut."""
    return tuple(s.axis for s in sums if s.kind == "reduce_scatter")


def shares(mesh: Mesh, sums: Sums, share: float = 1.0) -> Iterator[tuple[Sum, float]]:
    """Each sum, with the share of a gradient that it sums."""
    for step in sums:
        yield step, share
        if step.kind == "reduce_scatter":
            share /= mesh.size(step.axis)


def ways(mesh: Mesh, pending: Sequence[str], may: Collection[str], must: Collection[str], time: Time) -> list[Way]:
    """All in which to sum over the `pending` axes.

    may, must    axes of which a shard may be left, and those of them of which one has to be
    """
    found = []
    for sums in _sequences(tuple(pending), may, must):
        latency = rate = 0.0
        for k, (step, share) in enumerate(shares(mesh, sums)):
            taken = time(k, step)
            latency, rate = latency + taken.latency, rate + taken.rate * share
        found.append(Way(sums, CollectiveTime(latency, rate), math.prod(map(mesh.size, scattered(sums)))))
    return found


def cheapest(found: Sequence[Way], size: float, hidden: Callable[[Sums], float] = lambda sums: 0.0) -> Sums:
    """For so many bytes; of equally cheap ones the fewest sums, and of these those that leave the smallest shard.

    hidden: seconds a byte that need not be waited for
    """
    return min(found, key=lambda way: (way.time.of(size) - hidden(way.sums) * size, len(way.sums), -way.left)).sums


def _sequences(left: tuple[str, ...], may: Collection[str], must: Collection[str], scattering: bool = True) -> Iterator[Sums]:
    if not left:
        yield ()
    for count in range(1, len(left) + 1):
        for taken in itertools.combinations(left, count):
            rest, axis = tuple(a for a in left if a not in taken), "+".join(taken)
            if scattering and set(taken) <= set(may):
                yield from ((Sum("reduce_scatter", axis), *then) for then in _sequences(rest, may, must))
            if not set(must) & set(left):
                yield from ((Sum("all_reduce", axis), *then) for then in _sequences(rest, may, must, False))


@dataclass(frozen=True)
class GradientSums:
    """On a mesh, of parameters at a level of ZeRO: 0, 2 (1 runs as 2 does), or 3, of which the graphs scatter the gradients.

    topology    None: sums are chosen by the bytes that a rank receives
    small       of copies a rank is left the smallest shard that may be, however long their sums take
    beside      of the first sum of copies, the share that runs beside the backward, if it may: what is left is to take the least
    """

    mesh: Mesh
    level: int
    topology: Topology | None
    small: bool = False
    beside: float = 0.0

    @property
    def held(self) -> float:
        """Of a gradient, the share that the graphs give."""
        return 1 / self.mesh.size("dp_shard") if self.level == 3 else 1.0

    @cached_property
    def own(self) -> Sums:
        """Of parameters that tp holds no copies of."""
        return cheapest(self._own_ways, MANY)

    def copies(self, size: float) -> Sums:
        """Of parameters that tp holds copies of; in all they have so many bytes, whole over the data axes. Few bytes go the way of
        the fewest latencies, many that of the most bandwidth."""
        if not self.beside or self.topology is None:
            return cheapest(self._ways_to_take, size * self.held)
        return cheapest(self._ways_to_take, size * self.held, lambda sums: self.beside * self._firsts[sums])

    def if_short(self, copied: bool) -> Iterator[Sums]:
        """What is left to do, one after the other, where the dims of a parameter are too short to be cut in so many shards."""
        pending = self._with_tp if copied else self._data
        for may in (self._sharded, ()):
            yield cheapest(self._ways(pending, may), MANY)

    @cached_property
    def own_rate(self) -> float:
        """Seconds that a byte takes at least, whole over the data axes, whatever the latencies: where tp holds no copies."""
        return self.held * min(way.time.rate for way in self._own_ways)

    @cached_property
    def copies_rate(self) -> float:
        """The same of parameters that it holds copies of."""
        return self.held * min(way.time.rate for way in self._copies_ways)

    def exposed_rate(self, hidden: float) -> float:
        """As `copies_rate`, where so large a share of the first sum runs beside the backward, if one does."""
        if hidden not in self._exposed:
            self._exposed[hidden] = self.held * min(w.time.rate - hidden * self._firsts[w.sums] for w in self._copies_ways)
        return self._exposed[hidden]

    @cached_property
    def _exposed(self) -> dict[float, float]:
        return {}

    def steps(self, sums: Sums) -> Steps:
        """Of one of its sums."""
        if sums not in self._steps:
            self._steps[sums] = Steps(tuple(enumerate(shares(self.mesh, sums, self.held))), self.runs_beside(sums))
        return self._steps[sums]

    @cached_property
    def own_steps(self) -> Steps:
        return self.steps(self.own)

    @cached_property
    def _steps(self) -> dict[Sums, Steps]:
        return {}

    @cached_property
    def tp(self) -> int:
        """Ranks of the tensor axis."""
        return self.mesh.size("tp")

    @cached_property
    def shards(self) -> int:
        """In how many parts ZeRO cuts what tp holds no copies of."""
        return max(1, self.mesh.size("dp_shard")) if self.level else 1

    def runs_beside(self, sums: Sums) -> bool:
        """Whether the first of these sums runs beside the backward: what the graphs scatter (ZeRO-3) they wait for."""
        return self.level < 3 and any(axis in DATA_AXES for step in sums for axis in step.axes)

    @cached_property
    def _firsts(self) -> dict[Sums, float]:
        """Of each way of copies, the seconds a byte of what may run beside the backward: the gathers that follow do not."""
        topology = self.topology
        assert topology is not None

        def first(sums: Sums) -> float:
            return topology.collective(sums[0].kind, self.mesh, sums[0].axis).rate if self.runs_beside(sums) else 0.0

        return {way.sums: first(way.sums) for way in self._copies_ways}

    @cached_property
    def _own_ways(self) -> list[Way]:
        return self._ways(self._data, self._sharded)

    @cached_property
    def _copies_ways(self) -> list[Way]:
        def time(k: int, step: Sum) -> CollectiveTime:
            together = self.own[k : k + 1] == (step,)  # in one bucket with those that tp holds no copies of
            return self._time(k, step)._replace(latency=0.0) if together else self._time(k, step)

        return self._ways(self._with_tp, self._cut, time)

    @cached_property
    def _ways_to_take(self) -> list[Way]:
        """Of copies."""
        most = max(way.left for way in self._copies_ways)
        return [way for way in self._copies_ways if way.left == most or not self.small]

    @property
    def _data(self) -> tuple[str, ...]:
        return tuple(a for a in self.mesh.axes if a in DATA_AXES and not (a == "dp_shard" and self.level == 3))

    @property
    def _with_tp(self) -> tuple[str, ...]:
        return tuple(a for a in self.mesh.axes if a in self._data or a == "tp")

    @property
    def _sharded(self) -> tuple[str, ...]:
        return ("dp_shard",) if self.level and "dp_shard" in self._data else ()

    @property
    def _cut(self) -> tuple[str, ...]:
        return (*self._sharded, "tp") if self.level else ()

    def _ways(self, pending: Sequence[str], may: Collection[str], time: Time | None = None) -> list[Way]:
        return ways(self.mesh, pending, may, set(may) & set(self._sharded), time or self._time)

    def _time(self, _: int, step: Sum) -> CollectiveTime:
        if self.topology is None:
            n = self.mesh.size(step.axis)
            return CollectiveTime(0.0, sum(collective_bytes(kind, 1.0, n) for kind in step.kinds))
        latencies, rates = zip(*(self.topology.collective(kind, self.mesh, step.axis) for kind in step.kinds), strict=True)
        return CollectiveTime(sum(latencies), sum(rates))


MANY = 2.0**27
"""Bytes of which latency is next to nothing."""
