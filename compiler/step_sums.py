"""The sums of a step's gradients, from the totals of a placement: which collectives they are, and what ZeRO leaves a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..runtime.program import Mesh
from .gathers import Whole
from .gradient_sums import GradientSums, Sum, scattered
from .memory import state_bytes
from .step_terms import Terms
from .topology import CollectiveKind, Collectives, Topology

Move = tuple[str, CollectiveKind, float, int]
"""(axis, kind, bytes, times a step)"""


class Part(NamedTuple):
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
        return self.sums.tp if cut else 1

    def state(self, share: float, at_least: bool = False) -> float:
        """Bytes that a rank holds all the time of a share of these, with parameters and optimizer: of the gradients, the shards."""
        level, data, more = self.sums.level, self.sums.shards, self.shards(at_least)
        own = state_bytes(self.own * share, level, data)
        if level == 3 and more > 1:  # the graphs take what dp_shard leaves
            return own + state_bytes(self.copied * share / data, 2, more)
        return own + state_bytes(self.copied * share, level, data * more)

    def updated(self, at_least: bool = False) -> float:
        """Bytes that an optimizer updates on a rank."""
        return (self.own + self.copied / self.shards(at_least)) / self.sums.shards


def parts_of(terms: Terms, trainable: float, copied: float, whole: Whole) -> list[Part]:
    """Of so many bytes of parameters with gradients. whole: the shares of what ZeRO-3 keeps whole."""
    if terms.whole is None:
        return [Part(terms.sums, trainable - copied, copied)]
    each = (terms.sums, 1 - whole.trained), (terms.whole, whole.trained)
    return [Part(sums, (trainable - copied) * share, copied * share) for sums, share in each]


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
            ways = [(part.sums.own_steps, part.own)]
            if at_least:
                self.copies.append((part, share))
            elif part.copied:
                ways.append((part.sums.steps(part.sums.copies(part.copied)), part.copied))
            for steps, size in ways:
                for k, (step, left) in steps.each:
                    once[k, step] = once.get((k, step), 0.0) + size * left * share
                if steps.beside:
                    _, (first, left) = steps.each[0]
                    early[first] = early.get(first, 0.0) + size * left * share
        for (_, step), size in once.items():
            self.moves.extend((step.axis, kind, size, 1) for kind in step.kinds)
        self.early.extend((step.axis, step.kind, size, 1) for step, size in early.items())

    def seconds(self, times: Collectives, hidden: float, backward: float) -> float:
        """Those that are left where a share of the first sums runs beside the backward, as far as its seconds reach.

        Of copies that count at least either as much is hidden as the backward lasts, of sums that take the least, or all of the
        first sums, of those of which that leaves the least: whichever leaves more, no choice leaves less.
        """
        own, early = (sum(move[3] * _seconds(move, times) for move in moves) for moves in (self.moves, self.early))
        whole, rest = (sum(part.at_least(h) * share for part, share in self.copies) for h in (0.0, hidden))
        return own + max(whole - hidden * backward, rest - hidden * early)


def _seconds(move: Move, times: Collectives) -> float:
    axis, kind, size, _ = move
    return times.collective(kind, axis).of(size)
