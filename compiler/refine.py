"""Layouts that fit: on the meshes where they may be the fastest, searched for at prices of a byte of the peak.

A family (compiler/families.py) is plans alike but for their layouts over tp, and for how many parameters ZeRO-3 keeps whole. What
its plans take at least follows from what is known of all placements over as many ranks (compiler/totals.py). From the family that
may have the fastest plan on, each is opened: it is split until it has one such number, and asked for layouts at the prices that may
tell the most (compiler/asking.py). What is found says more of all placements. Where the fastest plan would lie between two layouts,
these are mixed (compiler/mixing.py). Where plans may still be faster by far, a family is split by the bytes that the block gathers
that gathers the most (compiler/few_gathers.py). The search ends where no family may have a plan faster than the best one found.

What families take at least holds of plans that place each block for itself: lines are of all these (compiler/assign_apart.py).
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .asking import few_gathered, next_plan, smaller_plans
from .families import Family, smallest
from .layouts import Layouts
from .mixing import mixtures
from .plan import Plan

if TYPE_CHECKING:
    from .candidates import Candidate, Search

CLOSE = 1e-3
"""Plans that may be faster by a smaller share are not searched for."""

FAR = 0.01
"""Where plans may be faster by a larger share, they are searched for at prices that leave out bytes too."""

ASKED = 128
"""Placements that are found at most, beside the first ones. What is not known then is in the bound."""

SMALLEST = 3
"""Of so many families the smallest plans are searched for where nothing fits."""

VAIN = 8
"""So many prices are asked in vain, one after the other, before a family is left as it is."""

VAIN_FEW = 4
"""The same of prices at which blocks gather few bytes."""


@dataclass
class Refinement:
    """best     seconds a sample of the fastest plan that fits
    bound    seconds a sample: no plan that fits takes less, in any family, however its blocks lie; once all candidates were made
    """

    search: Search
    best: float
    bound: float = math.inf
    _learned: int = 0
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
            elif family.known < family.told:
                family.estimate()
                self._wait(family)
            elif family.few < family.many:
                middle = (family.few + family.many) // 2
                self._wait(family.part(family.few, middle))
                self._wait(family.part(middle + 1, family.many))
            elif self._may_learn(family) and (layouts := few_gathered(family)) is not None:
                self._learn(family, layouts)
                self._wait(family)
            elif family.below is None and self._may_ask(family, most) and (plan := next_plan(family, self._is_far(family))):
                yield from self._ask(family, plan)
                self._wait(family)
            else:
                if family.below is None and not family.gathered:
                    yield from self._seen(mixtures(family, self.best * (1 - CLOSE) * family.samples, self._is_far(family)))
                parts = self._by_gathers(family) if self._may_split(family) else ()
                for part in parts:
                    self._wait(part)
                if not parts:
                    self.bound = min(self.bound, family.per_sample)

    def _by_gathers(self, family: Family) -> Sequence[Family]:
        """Its plans whose blocks all gather fewer bytes than a threshold, and the others: the least at which these are too slow, or
        the largest. None where no threshold is left."""
        steps = self.search.tensor.gather_thresholds(family.plan.mesh.size("tp"))
        between = [step for step in steps if family.gathered < step and (family.below is None or step < family.below)]
        if not between or not (family.gathered or family.below or self._is_slow(family.gathering(0, between[0]))):
            return ()

        def more(step: int) -> Family:
            found = family.gathering(step, family.below)
            found.estimate()
            return found

        slow = bisect_left(between, True, key=lambda step: more(step).per_sample >= self.best * (1 - CLOSE))
        step = between[min(slow, len(between) - 1)]
        return family.gathering(family.gathered, step), more(step)

    def _is_slow(self, family: Family) -> bool:
        """Whether a family's plans are whose blocks gather the least: else there is nothing to divide the family by."""
        family.estimate()
        while self._may_learn(family) and (layouts := few_gathered(family)) is not None:
            self._learn(family, layouts)
        return not self._is_far(family)

    def _learn(self, family: Family, layouts: Layouts) -> None:
        before, below = family.least, family.below
        assert below is not None
        family.asked.note(layouts)
        self._learned += 1
        self.search.tensor.learn_fewer(family.plan.mesh.size("tp"), layouts, family.load, below)
        family.estimate()
        family.asked.vain = 0 if family.least > before * (1 + CLOSE) else family.asked.vain + 1

    def _open(self, fastest: Candidate, least: float = 0.0) -> Iterator[Candidate]:
        """The families of a level of ZeRO, a mesh and a number of micro-batches, whose fastest layouts were found; and of twice the
        micro-batches, which take no less time, whatever fits."""
        search, plan = self.search, fastest.plan
        counts = [(0, 0)]
        whole = search.steps.whole(plan.stages)
        if search.keeps_whole(plan) and len(whole) > 2:
            counts.append((1, len(whole) - 2))  # all of them: that is ZeRO-2
        unlimited = math.inf
        for few, many in counts:
            family = Family(search, plan, fastest.samples, few, many, least, known=0)
            family.least = max(least, family.least_within(math.inf).seconds)
            unlimited = min(unlimited, family.least)
            self._wait(family)
            if not few:
                self._opened.append(family)
        if search.may_accumulate(plan, 2 * plan.microbatches):
            more = replace(plan, microbatches=2 * plan.microbatches)
            self._wait(Family(search, more, fastest.samples, 0, 0, unlimited))
        if search.request.strategy.layouts is None and not search.fits(fastest):
            yield from self._megatron(plan)

    def _megatron(self, plan: Plan) -> Iterator[Candidate]:
        """In Megatron's layouts, which gather no parameters for an op."""
        sequence = replace(plan, layouts=Layouts(sequence=True))
        yield from self._seen(self.search.completed(self.search.price(sequence)))

    def _wait(self, family: Family) -> None:
        if family.least < math.inf:
            heapq.heappush(self._waiting, (family.per_sample, next(self._order), family))

    def _may_ask(self, family: Family, most: int) -> bool:
        return self.search.tensor.placed < most and family.asked.vain < VAIN

    def _may_learn(self, family: Family) -> bool:
        return family.below is not None and self._may_split(family) and family.asked.vain < VAIN_FEW

    def _may_split(self, family: Family) -> bool:
        return self._learned < ASKED and self._is_far(family)

    def _is_far(self, family: Family) -> bool:
        return family.per_sample < self.best * (1 - FAR)

    def _smallest(self) -> Iterator[Candidate]:
        """Where nothing fits: what is small, of the families whose plans miss by the least."""
        for family in smallest(self._opened, SMALLEST):
            if self.search.request.strategy.layouts == "any":
                yield from self._megatron(family.plan)
            for plan in smaller_plans(family):
                yield from self._ask(family, plan)
            if self.best < math.inf:
                return

    def _ask(self, family: Family, plan: Plan) -> Iterator[Candidate]:
        before, asked = (family.least, self.best), family.asked
        asked.note(plan.layouts)
        for candidate in self._seen(self.search.completed(self.search.price(plan))):
            asked.fits = asked.fits or self.search.fits(candidate)
            yield candidate
        family.estimate()
        told = family.least > before[0] * (1 + CLOSE) or self.best < before[1]
        asked.vain = 0 if told else asked.vain + 1

    def _seen(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        for candidate in candidates:
            if self.search.fits(candidate):
                self.best = min(self.best, candidate.per_sample)
            yield candidate
