"""The price of a byte at which the fastest choices take as many as there are.

Of choices with seconds S and bytes E over the limit, one that costs the least at a price y of a byte, S + y E, is either over the
limit, and y is too low, or within it, and y may be lower. Where two of them cost the least, one on each side, no other price says
more of what fits (the Lagrangian dual of a problem with one constraint, Everett 1963).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A choice. seconds: what it takes; excess: its bytes over the limit, 0 or below where it fits."""

    seconds: float
    excess: float

    def at(self, price: float) -> float:
        return self.seconds + (price * self.excess if price else 0.0)

    @property
    def fits(self) -> bool:
        return self.excess <= 0


def balance(points: Sequence[Point]) -> float | None:
    """The price, in seconds a byte, at which one of these that fits costs the least, and at any lower price one that does not; 0
    where the fastest fits. None where none fits."""
    fitting = [p for p in points if p.fits]
    if not fitting:
        return None
    over = min(points, key=lambda p: (p.seconds, p.excess))
    if over.fits:
        return 0.0
    within = min(fitting, key=lambda p: (p.seconds, p.excess))
    while True:
        price = (within.seconds - over.seconds) / (over.excess - within.excess)
        least = min(points, key=lambda p: (p.at(price), p.excess))
        if least.at(price) >= over.at(price) * (1 - 1e-12) or least in (over, within):
            return price
        if least.fits:
            within = least
        else:
            over = least
