"""Plans alike but for their layouts over tp and for how many parameters ZeRO-3 keeps whole: what any of them takes at least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .dual import Point
from .gathers import Whole
from .heaviest import COUNT
from .layouts import Layouts
from .plan import Plan
from .tensor_axis import Explored, Load
from .totals import HEAVIEST, LARGE, OF_BYTES, OF_SECONDS, SECOND, Envelope, Least, tangent, totals_of

if TYPE_CHECKING:
    from .candidates import Search

ALIKE = 0.02
"""Prices that differ by a smaller share are not both asked."""


@dataclass
class Asked:
    """prices    that layouts were asked for: of a byte of parameters, kept, of the stream and gathered, and of a second of compute
              and of sums of gradients
    fits      whether layouts found at any of them fit
    vain      how many of the last ones told next to nothing
    """

    prices: list[np.ndarray] = field(default_factory=list)
    fits: bool = False
    vain: int = 0

    def knows(self, layouts: Layouts) -> bool:
        """Whether there were some at prices nearly alike."""
        return any(np.allclose(self._prices(layouts), others, rtol=ALIKE, atol=0) for others in self.prices)

    def note(self, layouts: Layouts) -> None:
        self.prices.append(self._prices(layouts))

    @staticmethod
    def _prices(layouts: Layouts) -> np.ndarray:
        several = *(layouts.gather_prices or (0.0,) * COUNT), *(layouts.large_prices or (0.0,) * len(LARGE))
        seconds = layouts.compute_price, layouts.sums_price or 0.0
        single = layouts.byte_price or 0.0, layouts.kept_price, layouts.stream_price, layouts.fixed_price
        return np.array([*single, *several, *seconds])


@dataclass
class Family:
    """plan       one of its plans, with layouts at no price, and no parameter whole
    few, many  how many parameters ZeRO-3 keeps whole, at least and at most (`StepCost.whole`)
    gathered   bytes that the block that gathers the most over tp gathers at least
    below      and that no block gathers as many as, if there are such
    least      seconds of a step that no plan is below
    prices     of totals, at which this is found; of_bytes: as far as bytes have them
    known      how many lines this was found from; None before the fastest layouts were found
    points     of these placements: seconds and bytes, if a plan had them with the fewest parameters whole; see `look`
    asked      what layouts were asked for, with any number of parameters whole
    """

    search: Search
    plan: Plan
    samples: int
    few: int
    many: int
    least: float
    gathered: int = 0
    below: int | None = None
    prices: np.ndarray | None = None
    of_bytes: np.ndarray | None = None
    known: int | None = None
    points: list[Point] = field(default_factory=list)
    asked: Asked = field(default_factory=Asked)

    @property
    def per_sample(self) -> float:
        return self.least / self.samples

    @property
    def load(self) -> Load:
        return self.search.load(self.plan)

    @property
    def explored(self) -> Explored:
        return self.search.tensor.explored(self.plan.mesh.size("tp"), self.load)

    @property
    def whole(self) -> Sequence[Whole]:
        return self.search.steps.whole(self.plan.stages)[self.few : self.many + 1]

    @property
    def told(self) -> int:
        """How many lines there are by now."""
        return len(self.explored.within(self.below).lines)

    def part(self, few: int, many: int) -> Family:
        """The plans with so many parameters whole."""
        return replace(self, few=few, many=many, known=0, points=[])

    def gathering(self, gathered: int, below: int | None) -> Family:
        """The plans whose block that gathers the most gathers so many bytes."""
        found = replace(self, gathered=gathered, below=below, known=0, asked=Asked())
        found.envelopes = [
            replace(own, time=[*e.time], room=[*e.room]) for own, e in zip(found.envelopes, self.envelopes, strict=True)
        ]  # no less than these
        return found

    def estimate(self) -> None:
        """Find `least` from all that is known by now."""
        least = self.least_within(self.search.limit)
        self.least, self.prices, self.of_bytes = max(self.least, least.seconds), least.prices, least.of_bytes
        self.known = self.told

    def least_within(self, limit: float) -> Least:
        """Of its plans that take no more bytes."""
        explored = self.explored
        known, start = explored.within(self.below), totals_of(explored.costs[-1])
        return min((known.least(envelope, limit, start) for envelope in self.envelopes), key=lambda least: least.seconds)

    def look(self) -> list[Point]:
        """Its `points`, those included that were found since."""
        search, (whole, *_) = self.search, self.whole
        kept = replace(self.plan, whole=whole.names)
        for cost in self.explored.costs[len(self.points) :]:
            _, found = search.predict(kept, cost, whole)
            self.points.append(Point(found.step_seconds, found.peak_bytes - search.limit))
        return self.points

    @property
    def unit(self) -> float:
        """Of a price of a byte: at it the bytes of the limit cost as much as the fastest layouts take."""
        return min(p.seconds for p in self.points) / max(self.search.limit, 1.0)

    def slopes(self, price: float) -> np.ndarray:
        """Of seconds, and of bytes at their price, by totals: about the placement that costs the least of those known."""
        explored = self.explored
        _, best = min(zip(self.look(), explored.costs, strict=True), key=lambda found: found[0].at(price))
        functions = next((e.seconds, e.size) for e in reversed(self.envelopes) if e.trainable[0] <= best.trainable)
        seconds, size = (tangent(of, totals_of(best), explored.known.scale).slopes for of in functions)
        slopes = seconds + (price * size if price else 0.0)
        slopes[[HEAVIEST, SECOND]] = max(slopes[HEAVIEST], slopes[SECOND])  # else the other one would gather what this does not
        return slopes

    @cached_property
    def envelopes(self) -> list[Envelope]:
        """Of what its plans take at least: of those whose backwards have as many parts, each."""
        search = self.search
        least = replace(search.tensor.least(self.plan.mesh.size("tp")), gathered=float(self.gathered))
        found = []
        for trained in search.steps.alike_parts(self.plan, least.trainable):
            functions = search.steps.at_least(self.plan, self.whole, least, trained)
            found.append(Envelope(*functions, (OF_SECONDS, OF_BYTES), trained))
        return found


def smallest(families: Sequence[Family], count: int) -> list[Family]:
    """Those whose plans miss the limit by the least."""
    return sorted(families, key=lambda f: min((p.excess for p in f.look()), default=math.inf))[:count]
