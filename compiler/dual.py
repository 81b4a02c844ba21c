"""The price of a byte at which the fastest choices take as many as there are.

Of choices with seconds S and bytes E over the limit, one that costs the least at a price y of a byte, S + y E, is either over the
limit, and y is too low, or within it, and y may be lower. Where two of them cost the least, one on each side, no other price says
more of what fits (the Lagrangian dual of a problem with one constraint, Everett 1963).
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Between:
    """Two choices, by number, of which a share of the second and the rest of the first would take these seconds and fit."""

    over: int
    within: int
    share: float
    seconds: float


def between(points: Sequence[Point]) -> Between | None:
    """The two whose mixture that fits is the fastest; None where one is faster, or nothing fits."""
    fitting = [k for k, p in enumerate(points) if p.fits]
    found: Between | None = None
    least = min((points[k].seconds for k in fitting), default=math.inf)
    for i, over in enumerate(points):
        for j in fitting:
            within = points[j]
            if over.fits or over.seconds >= within.seconds:
                continue
            share = over.excess / (over.excess - within.excess)
            seconds = over.seconds + share * (within.seconds - over.seconds)
            if seconds < least:
                found, least = Between(i, j, share, seconds), seconds
    return found


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
