"""At which prices of totals a family of plans is asked for layouts: those that may tell the most come first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from .dual import balance
from .families import Family
from .layouts import Layouts
from .plan import Plan
from .step_cost import rounded_down
from .totals import (
    ACTIVATIONS,
    COMPUTE,
    FIXED,
    HEAVIEST,
    LARGE,
    PARAMETERS,
    READ_AGAIN,
    RUNS,
    SECOND,
    STREAM,
    SUMS,
    TRAFFIC,
    TRAINABLE,
)

GRID = 2**0.125
"""Prices are rounded down to its powers: meshes nearly alike have the same placements, which are found once."""

ALL = 1e-9
"""Of equally fast layouts those that hold fewer parameters are taken: all parameters cost at least this share of a step."""

AROUND = (1.0, 2**0.5, 2**-0.5, 2**0.25, 2**-0.25, 2**0.125, 2**-0.125)
"""So many times the price of a byte at which the prices asked so far tell the most of few gathers: others may tell more."""

STEEPER = (1.0, 1.2, 2.0, 8.0, 64.0)
"""Where the layouts found at a price do not fit, for what has no price takes bytes too, so many times the price is asked."""

STEEPEST = (1.0, 0.1, 10.0, 300.0, 1e4)
"""While nothing known fits: at these prices the bytes of the limit cost so many times the seconds of the fastest layouts."""


def next_plan(family: Family, thoroughly: bool) -> Plan | None:
    """The plan whose layouts are to be found next; None where all are known. thoroughly: at prices that leave out bytes too."""
    plans = itertools.starmap(partial(_priced, family), _tries(family, thoroughly))
    return next((plan for plan in plans if not family.asked.knows(plan.layouts)), None)


def few_gathered(family: Family) -> Layouts | None:
    """At which prices it is to be found next what the family's plans cost at least, whose blocks gather few bytes; None where all
    that may tell is known. What blocks gather has a price by how many they gather at least, or none, for they gather few."""
    if family.prices is None or family.of_bytes is None:
        return None
    for times, gathered in itertools.product(AROUND, (1.0, 0.0)):
        slopes = family.prices + (times - 1) * family.of_bytes
        slopes[[HEAVIEST, SECOND]] *= gathered
        layouts = _priced(family, slopes, exact=True).layouts
        if not family.asked.knows(layouts):
            return layouts
    return None


def smaller_plans(family: Family) -> Iterator[Plan]:
    """Plans whose bytes are the dearer, whatever the seconds."""
    family.look()
    for times in STEEPEST:
        slopes = family.slopes(times * family.unit)
        for found in (slopes, *_partly(family, slopes)):
            plan = _priced(family, found, exact=False)
            if not family.asked.knows(plan.layouts):
                yield plan


def _priced(family: Family, slopes: np.ndarray, exact: bool) -> Plan:
    """The plan with such prices of totals."""

    def price(total: int, per: float) -> float:
        return rounded(max(0.0, float(slopes[total])) / run / per)

    def rounded(x: float) -> float:
        return x if exact else math.copysign(rounded_down(abs(x), GRID), x)

    load, known = family.load, family.explored.known
    run = max(float(slopes[RUNS]) / load.runs, float(slopes[TRAFFIC]) / load.share)
    held = np.array([PARAMETERS, TRAINABLE, READ_AGAIN])
    of_bytes = slopes[held] @ known.low[held] / (known.low[PARAMETERS] or 1.0)
    least = ALL * min(p.seconds for p in family.points) / (known.scale[PARAMETERS] or 1.0)
    slopes = slopes.copy()
    slopes[PARAMETERS] = max(of_bytes, least)
    gathered = price(HEAVIEST, load.runs), price(SECOND, load.runs)
    large = tuple(price(total, load.share) for total in LARGE)
    layouts = Layouts(
        byte_price=price(PARAMETERS, 1.0),
        kept_price=price(ACTIVATIONS, load.share),
        stream_price=price(STREAM, load.share),
        gather_prices=gathered if any(gathered) else (),
        fixed_price=price(FIXED, load.runs),
        large_prices=large if any(large) else (),
        sums_price=rounded(float(slopes[SUMS]) / run),
        compute_price=round(32 * min(1.0, float(slopes[COMPUTE]) / load.share / run)) / 32,
    )
    return replace(family.plan, layouts=layouts)


def _tries(family: Family, thoroughly: bool) -> Iterator[tuple[np.ndarray, bool]]:
    """Prices of totals, and whether they are meant exactly."""
    price = balance(family.look())
    if price is not None:
        prices = [times * price for times in (STEEPER if not family.asked.fits and price else (1.0,))]
    else:
        prices = [times * family.unit for times in (STEEPEST if not family.few else STEEPEST[:3])]
    for y in prices:
        yield family.slopes(y), False
    if family.prices is not None:
        yield family.prices, False
        yield family.prices, True
    first = family.slopes(prices[0])
    yield first, True
    if thoroughly:
        for found in _partly(family, first):
            yield found, False


def _partly(family: Family, slopes: np.ndarray) -> list[np.ndarray]:
    """These prices, but for some of the bytes."""
    time, free = family.slopes(0.0), slopes.copy()
    free[[HEAVIEST, SECOND]] = time[[HEAVIEST, SECOND]]
    found = [free, time]
    for left in ([PARAMETERS, TRAINABLE, READ_AGAIN], [ACTIVATIONS, FIXED, STREAM, *LARGE], [HEAVIEST, SECOND]):
        found.append(time.copy())
        found[-1][left] = slopes[left]
    return found
