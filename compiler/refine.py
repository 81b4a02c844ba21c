"""Layouts that fit: on the meshes where they may be the fastest, searched for at prices of a byte of the peak.

A family is plans alike but for their layouts over tp, and for how many blocks ZeRO-3 keeps whole. What its plans take at least
follows from what is known of all placements over as many ranks (compiler/totals.py). From the family that may have the fastest plan
on, each is opened: it is split until the number of blocks is one, and asked for layouts at the price of a byte that divides the
fastest of them into those that fit and those that do not (compiler/dual.py). What is found says more of all placements. The search
ends where no family may have a plan that is faster than the best one found.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .dual import Point, balance
from .heaviest import COUNT
from .layouts import Layouts
from .plan import Plan
from .step_cost import rounded_down
from .tensor_axis import Explored
from .totals import (
    ACTIVATIONS,
    COMPUTE,
    HEAVIEST,
    PARAMETERS,
    READ_AGAIN,
    RUNS,
    SECOND,
    STREAM,
    TRAFFIC,
    TRAINABLE,
    Function,
    Least,
    tangent,
    totals_of,
)

if TYPE_CHECKING:
    from .candidates import Candidate, Search

CLOSE = 1e-3
"""Plans that may be faster by a smaller share are not searched for."""

FAR = 0.01
"""Where plans may be faster by a larger share, they are searched for at prices that leave out bytes too."""

ASKED = 128
"""Placements that are found at most, beside the first ones. What is not known then is in the bound."""

GRID = 2**0.125
"""Prices are rounded down to its powers: meshes nearly alike have the same placements, which are found once."""

SMALLEST = 3
"""Of so many families the smallest plans are searched for where nothing fits."""

VAIN = 8
"""So many prices are asked in vain, one after the other, before a family is left as it is."""

ALIKE = 0.02
"""Prices that differ by a smaller share are not both asked."""

ALL = 1e-9
"""Of equally fast layouts those that hold fewer parameters are taken: all parameters cost at least this share of a step."""

STEEPER = (1.0, 1.2, 2.0, 8.0, 64.0)
"""Where the layouts found at a price do not fit, for what has no price takes bytes too, so many times the price is asked."""

STEEPEST = (1.0, 0.1, 10.0, 300.0, 1e4)
"""While nothing known fits: at these prices the bytes of the limit cost so many times the seconds of the fastest layouts."""


@dataclass
class Family:
    """plan       one of its plans, with layouts at no price, and no block whole
    few, many  how many blocks ZeRO-3 keeps whole, at least and at most (`StepCost.whole`)
    least      seconds of a step that no plan is below
    prices     of totals, at which this is found
    known      how many placements this was found from; None before the fastest layouts were found
    points     of these placements: seconds and bytes, if a plan had them
    asked      what layouts were asked for, with any number of blocks whole
    """

    plan: Plan
    samples: int
    few: int
    many: int
    least: float
    prices: np.ndarray | None = None
    known: int | None = None
    points: list[Point] = field(default_factory=list)
    asked: _Asked = field(default_factory=lambda: _Asked())

    @property
    def per_sample(self) -> float:
        return self.least / self.samples


@dataclass
class _Asked:
    """prices    of plans: for a byte of parameters, kept, of the stream and gathered, and for a second of compute
    fits      whether layouts found at any of them fit
    vain      how many of the last ones told next to nothing
    """

    prices: list[np.ndarray] = field(default_factory=list)
    fits: bool = False
    vain: int = 0

    def knows(self, prices: np.ndarray) -> bool:
        return any(np.allclose(prices, others, rtol=ALIKE, atol=0) for others in self.prices)


@dataclass
class Refinement:
    """best     seconds a sample of the fastest plan that fits
    bound    seconds a sample: no plan that fits takes less, in any family; once all candidates were made
    """

    search: Search
    best: float
    bound: float = math.inf
    _waiting: list[tuple[float, int, Family]] = field(default_factory=list)
    _opened: list[Family] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)

    def candidates(self, fastest: Iterable[Candidate]) -> Iterator[Candidate]:
        """Further plans of the families of these, which are placed at no price."""
        for c in fastest:
            yield from self._open(c)
        yield from self._search()
        if math.isinf(self.best):
            yield from self._smallest()
        self.bound = min(self.bound, self.best)

    def _search(self) -> Iterator[Candidate]:
        most = self.search.tensor.placed + ASKED
        while self._waiting:
            family = heapq.heappop(self._waiting)[-1]
            if family.per_sample >= self.best * (1 - CLOSE):
                self.bound = min(self.bound, family.per_sample)
                return
            if family.known is None:
                c = self.search.price(family.plan)
                yield from self._seen(self.search.completed(c))
                yield from self._open(c, family.least)
            elif family.known < len(self._explored(family.plan).costs):
                self._estimate(family)
                self._wait(family)
            elif family.few < family.many:
                middle = (family.few + family.many) // 2
                for few, many in ((family.few, middle), (middle + 1, family.many)):
                    self._wait(replace(family, few=few, many=many, known=0, points=[]))
            elif self._may_ask(family, most) and (plan := self._next(family)) is not None:
                yield from self._ask(family, plan)
                self._wait(family)
            else:
                self.bound = min(self.bound, family.per_sample)

    def _open(self, fastest: Candidate, least: float = 0.0) -> Iterator[Candidate]:
        """The families of a level of ZeRO, a mesh and a number of micro-batches, whose fastest layouts were found; and of twice the
        micro-batches, which take no less time, whatever fits."""
        search, plan = self.search, fastest.plan
        counts = [(0, 0)]
        whole = search.steps.whole(plan.stages)
        if search.keeps_whole(plan) and len(whole) > 1:
            counts.append((1, len(whole) - 1))
        unlimited = math.inf
        for few, many in counts:
            family = Family(plan, fastest.samples, few, many, least, known=0)
            family.least = max(least, self._least(family, math.inf).seconds)
            unlimited = min(unlimited, family.least)
            self._wait(family)
            if not few:
                self._opened.append(family)
        if search.may_accumulate(plan, 2 * plan.microbatches):
            self._wait(Family(replace(plan, microbatches=2 * plan.microbatches), fastest.samples, 0, 0, unlimited))
        if search.request.strategy.layouts is None and not search.fits(fastest):
            yield from self._megatron(plan)

    def _megatron(self, plan: Plan) -> Iterator[Candidate]:
        """In Megatron's layouts, which gather no parameters for an op."""
        sequence = replace(plan, layouts=Layouts(sequence=True))
        yield from self._seen(self.search.completed(self.search.price(sequence)))

    def _wait(self, family: Family) -> None:
        if family.least < math.inf:
            heapq.heappush(self._waiting, (family.per_sample, next(self._order), family))

    def _explored(self, plan: Plan) -> Explored:
        return self.search.tensor.explored(plan.mesh.size("tp"), self.search.load(plan))

    def _functions(self, family: Family) -> tuple[Function, Function]:
        search, plan = self.search, family.plan
        whole = search.steps.whole(plan.stages)[family.few : family.many + 1]
        return search.steps.at_least(plan, whole, search.tensor.least(plan.mesh.size("tp")))

    def _estimate(self, family: Family) -> None:
        least = self._least(family, self.search.limit)
        family.least, family.prices = max(family.least, least.seconds), least.prices
        family.known = len(self._explored(family.plan).costs)

    def _least(self, family: Family, limit: float) -> Least:
        explored = self._explored(family.plan)
        return explored.known.least(*self._functions(family), limit, totals_of(explored.costs[-1]))

    def _may_ask(self, family: Family, most: int) -> bool:
        return self.search.tensor.placed < most and family.asked.vain < VAIN

    def _next(self, family: Family) -> Plan | None:
        """The plan whose layouts are to be found next; None where they are all known."""
        priced = itertools.starmap(partial(self._priced, family), self._tries(family))
        return next((plan for plan in priced if not self._known(family, plan)), None)

    def _tries(self, family: Family) -> Iterator[tuple[np.ndarray, bool]]:
        """Prices of totals, and whether they are meant exactly: those first that may tell the most."""
        self._look(family)
        price = balance(family.points)
        if price is not None:
            prices = [times * price for times in (STEEPER if not family.asked.fits and price else (1.0,))]
        else:
            prices = [times * self._unit(family) for times in (STEEPEST if not family.few else STEEPEST[:3])]
        for y in prices:
            yield self._slopes(family, y), False
        if family.prices is not None:
            yield family.prices, False
            yield family.prices, True
        first = self._slopes(family, prices[0])
        yield first, True
        if family.per_sample < self.best * (1 - FAR):
            for found in self._partly(family, first):
                yield found, False

    def _partly(self, family: Family, slopes: np.ndarray) -> list[np.ndarray]:
        """These prices, but for some of the bytes."""
        time, free = self._slopes(family, 0.0), slopes.copy()
        free[[HEAVIEST, SECOND]] = time[[HEAVIEST, SECOND]]
        found = [free, time]
        for left in ([PARAMETERS, TRAINABLE, READ_AGAIN], [ACTIVATIONS, STREAM], [HEAVIEST, SECOND]):
            found.append(time.copy())
            found[-1][left] = slopes[left]
        return found

    def _look(self, family: Family) -> None:
        """What the family's plans would take with the layouts that were found since."""
        search, plan = self.search, family.plan
        whole = search.steps.whole(plan.stages)[family.few]
        kept = replace(plan, whole=whole.names)
        for cost in self._explored(plan).costs[len(family.points) :]:
            found = search.steps.predict(kept, cost, whole)
            family.points.append(Point(found.step_seconds, found.peak_bytes - search.limit))

    def _unit(self, family: Family) -> float:
        """Of a price of a byte: at it the bytes of the limit cost as much as the fastest layouts take."""
        return min(p.seconds for p in family.points) / max(self.search.limit, 1.0)

    def _smallest(self) -> Iterator[Candidate]:
        """Where nothing fits: what is small, of the families whose plans miss by the least."""
        for family in self._opened:
            self._look(family)
        smallest = sorted(self._opened, key=lambda f: min(p.excess for p in f.points))
        for family in smallest[:SMALLEST]:
            if self.search.request.strategy.layouts == "any":
                yield from self._megatron(family.plan)
            for times in STEEPEST:
                slopes = self._slopes(family, times * self._unit(family))
                for found in (slopes, *self._partly(family, slopes)):
                    priced = self._priced(family, found, exact=False)
                    if not self._known(family, priced):
                        yield from self._ask(family, priced)
            if self.best < math.inf:
                return

    def _known(self, family: Family, plan: Plan) -> bool:
        return family.asked.knows(self._prices(plan))

    @staticmethod
    def _prices(plan: Plan) -> np.ndarray:
        found = plan.layouts
        gathered = found.gather_prices or (0.0,) * COUNT
        return np.array([found.byte_price or 0.0, found.kept_price, found.stream_price, *gathered, found.compute_price])

    def _slopes(self, family: Family, price: float) -> np.ndarray:
        """Of seconds, and of bytes at their price: about the placement that costs the least of those known."""
        self._look(family)
        explored = self._explored(family.plan)
        _, best = min(zip(family.points, explored.costs, strict=True), key=lambda found: found[0].at(price))
        seconds, size = (tangent(of, totals_of(best), explored.known.scale).slopes for of in self._functions(family))
        slopes = seconds + (price * size if price else 0.0)
        slopes[[HEAVIEST, SECOND]] = max(slopes[HEAVIEST], slopes[SECOND])  # else the other one would gather what this does not
        return slopes

    def _priced(self, family: Family, slopes: np.ndarray, exact: bool) -> Plan:
        """The plan with such prices of totals."""

        def price(total: int, per: float) -> float:
            x = max(0.0, float(slopes[total])) / run / per
            return x if exact or not x else rounded_down(x, GRID)

        load, known = self.search.load(family.plan), self._explored(family.plan).known
        run = max(float(slopes[RUNS]) / load.runs, float(slopes[TRAFFIC]) / load.share)
        held = np.array([PARAMETERS, TRAINABLE, READ_AGAIN])
        of_bytes = slopes[held] @ known.low[held] / (known.low[PARAMETERS] or 1.0)
        least = ALL * min(p.seconds for p in family.points) / (known.scale[PARAMETERS] or 1.0)
        slopes = slopes.copy()
        slopes[PARAMETERS] = max(of_bytes, least)
        gathered = price(HEAVIEST, load.runs), price(SECOND, load.runs)
        layouts = Layouts(
            byte_price=price(PARAMETERS, 1.0),
            kept_price=price(ACTIVATIONS, load.share),
            stream_price=price(STREAM, load.share),
            gather_prices=gathered if any(gathered) else (),
            compute_price=round(32 * min(1.0, float(slopes[COMPUTE]) / load.share / run)) / 32,
        )
        return replace(family.plan, layouts=layouts)

    def _ask(self, family: Family, plan: Plan) -> Iterator[Candidate]:
        before, asked = (family.least, self.best), family.asked
        asked.prices.append(self._prices(plan))
        for candidate in self._seen(self.search.completed(self.search.price(plan))):
            asked.fits = asked.fits or self.search.fits(candidate)
            yield candidate
        self._estimate(family)
        told = family.least > before[0] * (1 + CLOSE) or self.best < before[1]
        asked.vain = 0 if told else asked.vain + 1

    def _seen(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        for candidate in candidates:
            if self.search.fits(candidate):
                self.best = min(self.best, candidate.per_sample)
            yield candidate
