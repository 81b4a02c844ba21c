"""The least time within a limit of bytes, by putting a price on the bytes: which price to ask next, and what is proven so far.

Of choices with seconds S and bytes M over the limit, one that costs the least at a price y of a byte, S + y M, says two things: it
is a choice, which may fit; and no choice that fits takes less than its S + y M (weak duality). As a function of y that bound is
concave, and below the line S + y M of every choice known: the price at which these lines leave the most is asked next (Kelley
1960), until the bound is there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

CLOSE = 1e-4
"""Bounds that differ by a smaller share are the same."""

STEEPER = (0.1, 1.0, 10.0)
"""Prices asked while nothing fits: at them the bytes of the limit cost so many times the seconds of the fastest choice."""


@dataclass(frozen=True)
class Point:
    """A choice. seconds: what it takes; excess: its bytes over the limit, below 0 where it fits."""

    seconds: float
    excess: float

    def at(self, price: float) -> float:
        return self.seconds + price * self.excess


@dataclass
class Dual:
    """What is known of choices for which there are `limit` bytes.

    points    those that were found
    bound     seconds: no choice that fits takes less
    """

    limit: float
    points: list[Point] = field(default_factory=list)
    bound: float = -math.inf
    _asked: list[float] = field(default_factory=list)

    def price(self) -> float | None:
        """Of a byte, to ask next: seconds; None where nothing more is to be learnt."""
        if not self._asked:
            return 0.0
        fitting = [p for p in self.points if p.excess <= 0]
        fastest = min(self.points, key=lambda p: (p.seconds, p.excess))
        if fastest in fitting:
            return None
        if not fitting:
            whole = fastest.seconds / max(self.limit, 1.0)
            return next((times * whole for times in STEEPER if times * whole > max(self._asked)), None)
        price = max(self._crossings(fitting), key=self._envelope)
        if any(math.isclose(price, asked, rel_tol=1e-3) for asked in self._asked):
            return None
        return price if self._envelope(price) > self.bound + CLOSE * abs(self.bound) else None

    def learn(self, price: float, bound: float, points: Iterable[Point]) -> None:
        """At a price no choice costs less than `bound`, which is counted against the limit; these choices were found there."""
        self._asked.append(price)
        self.bound = max(self.bound, bound)
        self.points += points

    def _envelope(self, price: float) -> float:
        """What the choices known leave possible at a price."""
        return min(p.at(price) for p in self.points)

    def _crossings(self, fitting: Iterable[Point]) -> Iterable[float]:
        """Prices at which one that fits costs as much as one that does not."""
        others = [p for p in self.points if p.excess > 0]
        for one, other in itertools.product(fitting, others):
            yield max(0.0, (one.seconds - other.seconds) / (other.excess - one.excess))
