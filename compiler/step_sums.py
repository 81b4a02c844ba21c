"""The sums of a step's gradients, from the totals of a placement: which collectives they are, and what ZeRO leaves a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..runtime.program import Mesh
from .gathers import Whole
from .gradient_sums import GradientSums, Sum, scattered, shares
from .memory import state_memory
from .plan import Plan
from .topology import CollectiveKind, Topology

Move = tuple[str, CollectiveKind, float, int]
"""(axis, kind, bytes, times a step)"""


@dataclass(frozen=True)
class Part:
    """Of a model's gradients those at one level of ZeRO: bytes whole over the data axes. copied: those that tp holds copies of."""

    sums: GradientSums
    own: float
    copied: float

    def at_least(self, hidden: float = 0.0) -> float:
        """Seconds that the copies take, where so large a share of what may run beside the backward does."""
        return self.copied * self.sums.exposed_rate(hidden)

    def shards(self, at_least: bool = False) -> int:
        """How many shards copies are cut in over tp; `at_least`: at the most."""
        cut = self.sums.level > 0 and (
            at_least or any("tp" in axis.split("+") for axis in scattered(self.sums.copies(self.copied)))
        )
        return self.sums.mesh.size("tp") if cut else 1

    def state(self, share: float, at_least: bool = False) -> float:
        """Bytes that a rank holds all the time of a share of these, with parameters and optimizer: of the gradients, the shards."""
        mesh, level = self.sums.mesh, self.sums.level
        data, more = max(1, mesh.size("dp_shard")) if level else 1, self.shards(at_least)
        own = state_memory(self.own * share, level, data).total
        if level == 3 and more > 1:  # the graphs take what dp_shard leaves
            return own + state_memory(self.copied * share / data, 2, more).total
        return own + state_memory(self.copied * share, level, data * more).total

    def updated(self, at_least: bool = False) -> float:
        """Bytes that an optimizer updates on a rank."""
        data = self.sums.mesh.size("dp_shard") if self.sums.level else 1
        return (self.own + self.copied / self.shards(at_least)) / max(1, data)


def parts_of(plan: Plan, sums: Callable[[int], GradientSums], trainable: float, copied: float, whole: Whole) -> list[Part]:
    """Of so many bytes of parameters with gradients.

    sums    by level        whole    of what ZeRO-3 keeps whole, which is at level 2
    """
    level = level_of(plan.zero)
    each = [(level, 1.0)] if not plan.whole else [(level, 1 - whole.trained), (2, whole.trained)]
    return [Part(sums(k), (trainable - copied) * share, copied * share) for k, share in each]


def level_of(zero: int) -> int:
    """As `GradientSums` has it."""
    return 2 if zero == 1 else zero


def copies_rate(mesh: Mesh, topology: Topology) -> float:
    """Seconds a byte of `PlacedCost.sums`."""
    return topology.collective("all_reduce", mesh, "tp").rate


@dataclass
class Moved:
    """What the sums of a step move, and the gathers of parameters that follow from them.

    moves     collectives of which there may be several
    early     of these the first sums, which may run beside the backward
    copies    where copies are counted at the least that they take: these sums, and the share of them that is meant
    """

    moves: list[Move] = field(default_factory=list)
    early: list[Move] = field(default_factory=list)
    copies: list[tuple[Part, float]] = field(default_factory=list)

    def add(self, found: Sequence[Part], share: float, at_least: bool) -> None:
        """The sums of a share of these, those that are alike in one."""
        once: dict[tuple[int, Sum], float] = {}
        early: dict[Sum, float] = {}
        for part in found:
            ways = [(part.sums.own, part.own)]
            if at_least:
                self.copies.append((part, share))
            elif part.copied:
                ways.append((part.sums.copies(part.copied), part.copied))
            for sums, size in ways:
                for k, (step, left) in enumerate(shares(part.sums.mesh, sums, part.sums.held)):
                    once[k, step] = once.get((k, step), 0.0) + size * left * share
                if part.sums.runs_beside(sums):
                    early[sums[0]] = early.get(sums[0], 0.0) + size * part.sums.held * share
        for (_, step), size in once.items():
            self.moves.extend((step.axis, kind, size, 1) for kind in step.kinds)
        self.early.extend((step.axis, step.kind, size, 1) for step, size in early.items())

    def seconds(self, topology: Topology, mesh: Mesh, hidden: float, backward: float) -> float:
        """Those that are left where a share of the first sums runs beside the backward, as far as its seconds reach.

        Of copies that count at least either as much is hidden as the backward lasts, of sums that take the least, or all of the
        first sums, of those of which that leaves the least: whichever leaves more, no choice leaves less.
        """
        own, early = (sum(move[3] * _seconds(move, topology, mesh) for move in moves) for moves in (self.moves, self.early))
        whole, rest = (sum(part.at_least(h) * share for part, share in self.copies) for h in (0.0, hidden))
        return own + max(whole - hidden * backward, rest - hidden * early)


def _seconds(move: Move, topology: Topology, mesh: Mesh) -> float:
    axis, kind, size, _ = move
    return topology.collective(kind, mesh, axis).of(size)
