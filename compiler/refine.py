"""Layouts that fit: on the meshes where they may be the fastest, searched for at prices of a byte of the peak.

A family is a mesh and a number of micro-batches, with the levels of ZeRO that were tried there. What its fastest layouts take is
known from loads like it. From the family that may have the fastest plan on, each is asked at prices (compiler/dual.py) until what
it can have is known to be slower than the best plan found.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .dual import CLOSE, Dual, Point
from .plan import Plan
from .step_cost import Marginal, rounded_down, sums_count
from .tensor_axis import Layouts

if TYPE_CHECKING:
    from .candidates import Candidate, Search

ASKED = 48
"""Placements that are found at most, beside the first ones. What is not known then is in the bound."""

GRID = 2**0.125
"""Prices are rounded down to its powers: meshes nearly alike have the same placements, which are found once."""

LEAST = 1e-9
"""Of equally fast layouts those that hold fewer parameters are taken: all parameters cost at least this share of a step."""


ROUGH = 0.01
"""How large a share of the seconds of the fastest layouts may be too much before a family is asked: they were found for a load
rounded to powers of two."""


@dataclass
class Family:
    """Plans that differ in their level of ZeRO and in their layouts over tp. Seconds are of a step.

    fastest     of each level, with layouts that were found at no price
    marginals   of each level
    least       seconds that no layouts go below, as far as is known: an estimate until it was asked
    """

    fastest: list[Candidate]
    marginals: list[Marginal]
    dual: Dual
    least: float

    @property
    def samples(self) -> int:
        return self.fastest[0].samples

    @property
    def plan(self) -> Plan:
        return self.fastest[0].plan


@dataclass
class Refinement:
    """best     seconds a sample of the fastest plan that fits
    bound    seconds a sample: about what layouts that fit take at least, in any family; once all candidates were made
    """

    search: Search
    best: float
    bound: float = math.inf
    _waiting: list[tuple[float, int, Family]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)
    _known: set[tuple[object, int]] = field(default_factory=set)

    def candidates(self, fastest: Iterable[Candidate]) -> Iterator[Candidate]:
        """Further plans of the families of these, which are placed at no price."""
        levels: dict[tuple[object, int], list[Candidate]] = {}
        for c in fastest:
            levels.setdefault((c.plan.mesh, c.plan.microbatches), []).append(c)
        self._known = set(levels)
        for found in levels.values():
            yield from self._enter(found)
        most = self.search.tensor.placed + ASKED
        while self._waiting:
            least, _, family = heapq.heappop(self._waiting)
            if least >= self.best * (1 - CLOSE) or self.search.tensor.placed >= most:
                self.bound = min(self.bound, least)
                continue
            price = family.dual.price()
            if price is None:
                self.bound = min(self.bound, least)
                continue
            first = not family.dual.points
            yield from self._ask(family, price, first)
            self._wait(family)
            if first:
                yield from self._more_microbatches(family)

    def _enter(self, fastest: list[Candidate]) -> Iterator[Candidate]:
        search, size = self.search, fastest[0].plan.mesh.size("tp")
        least = search.tensor.least(size)
        marginals, estimates, smallest = [], [], []
        for c in fastest:
            cost = search.tensor.cost(size, Layouts.of(c.plan), search.load(c.plan))
            m = search.steps.marginal(c.plan, cost, least)
            marginals.append(m)
            graph = cost.seconds(search.batch.share(c.plan.mesh), c.plan.microbatches, sums_count(c.plan))
            estimates.append(m.runs * graph + m.held_seconds * least.parameters + m.seconds)
            smallest.append(m.bytes + m.held_bytes * least.parameters + m.kept_bytes * least.activations)
        family = Family(fastest, marginals, Dual(search.limit), (1 - ROUGH) * min(estimates))
        if min(smallest) <= search.limit:
            self._wait(family)
        else:
            yield from self._more_microbatches(family)

    def _wait(self, family: Family) -> None:
        heapq.heappush(self._waiting, (family.least / family.samples, next(self._order), family))

    def _ask(self, family: Family, price: float, first: bool) -> Iterator[Candidate]:
        """The layouts of a family that are best at a price of a byte of the peak, in seconds."""
        search, bounds, points = self.search, [], []
        for c, m in zip(family.fastest, family.marginals, strict=True):
            plan = self._priced(c, m, price)
            candidate, placement = search.price(plan), search.placement(plan)
            assert placement is not None
            bounds.append(self._bound(plan, m, price, placement.bound))
            points.append(Point(candidate.predicted.step_seconds, candidate.predicted.peak_bytes - search.limit))
            yield from self._seen(search.completed(candidate))
            if first and search.request.strategy.layouts is None and not search.fits(c):
                # Megatron's gather no parameters for an op, which has no price.
                yield from self._seen(search.like(search.price(replace(plan, byte_price=None, sequence_parallel=True))))
        family.dual.learn(price, min(bounds), points)
        family.least = family.dual.bound

    def _prices(self, plan: Plan, m: Marginal, price: float) -> tuple[float, float]:
        """Of a byte of parameters held, and of a byte that a micro-batch keeps, where one of the peak has a price: seconds that the
        graph runs."""
        kept = price * m.kept_bytes / self.search.batch.share(plan.mesh)
        return (m.held_seconds + price * m.held_bytes) / m.runs, kept / m.runs

    def _priced(self, c: Candidate, m: Marginal, price: float) -> Plan:
        held, kept = self._prices(c.plan, m, price)
        whole = c.plan.mesh.size("tp") * self.search.tensor.least(c.plan.mesh.size("tp")).parameters
        least = LEAST * c.predicted.step_seconds / max(whole, 1.0) / m.runs
        return replace(c.plan, byte_price=rounded_down(max(held, least), GRID), kept_price=rounded_down(kept, GRID))

    def _bound(self, plan: Plan, m: Marginal, price: float, placed: float) -> float:
        """Seconds of a step, and of the bytes beyond the limit at their price, that no placement is below: `placed` is the least at
        the plan's prices, and by what these are lower, what every placement holds and keeps costs more."""
        search = self.search
        least = search.tensor.least(plan.mesh.size("tp"))
        held, kept = self._prices(plan, m, price)
        more = max(0.0, held - (plan.byte_price or 0.0)) * least.parameters
        more += max(0.0, kept - plan.kept_price) * search.batch.share(plan.mesh) * least.activations
        return m.runs * (placed + more) + m.seconds + (price * (m.bytes - search.limit) if price else 0.0)

    def _more_microbatches(self, family: Family) -> Iterator[Candidate]:
        """Of a family whose fastest layouts do not all fit, the one with twice the micro-batches."""
        plan = family.plan
        wanted = 2 * plan.microbatches
        fit = all(map(self.search.fits, family.fastest))
        if not fit and (plan.mesh, wanted) not in self._known and self.search.may_accumulate(plan, wanted):
            self._known.add((plan.mesh, wanted))
            fastest = [self.search.price(replace(c.plan, microbatches=wanted)) for c in family.fastest]
            yield from self._seen(fastest)
            yield from self._enter(fastest)

    def _seen(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        for candidate in candidates:
            if self.search.fits(candidate):
                self.best = min(self.best, candidate.per_sample)
            yield candidate
