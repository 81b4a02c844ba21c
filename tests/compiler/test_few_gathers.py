"""Blocks that each gather fewer bytes than a threshold: what no choice of each by itself costs less than."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from chains import Chain, Instance
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from shardwright.compiler.assign import Problem
from shardwright.compiler.assign_apart import least
from shardwright.compiler.few_gathers import Gathered, capped, thresholds

MOST = 4000
"""Choices of all blocks that a test looks at; where there are more, the chain is left out."""


@dataclass(frozen=True)
class Sized:
    """A chain, and bytes of the places whose values are gathered by some conversions, with these conversions."""

    chain: Chain
    sizes: dict[int, int]
    whole: dict[int, np.ndarray]

    def gathers(self) -> list[Gathered]:
        """Of the values that are alike in all blocks."""
        repeated = self.chain.repeated()
        found = []
        for i, (part, (place, *_)) in enumerate(zip(repeated.parts, repeated.places, strict=True)):
            if place in self.sizes and part.makers == repeated.counts[place]:
                found.append(Gathered(i, 0, 1.0, self.sizes[place], self.whole[place]))
        return found

    def most(self, choice: Sequence[int]) -> int:
        """Bytes that the block that gathers the most gathers under a choice of every instance."""
        chosen: dict[Instance, int] = dict(zip(self.chain.instances(), choice, strict=True))
        blocks = [0] * self.chain.blocks
        for (place, block), uses in self.chain.uses().items():
            if place in self.sizes:
                made = self.chain.produced[place][chosen[place, block]]
                needed = {self.chain.needed[use][chosen[reader]] for use, readers in uses.items() for reader in readers}
                blocks[block] += self.sizes[place] * any(self.whole[place][made, t] for t in needed)
        return max(blocks)


def sized(seed: int) -> Sized:
    """Blocks with parameters of their own, and ops that read them one after the other, the first of a block those of the one
    before."""
    dice = np.random.default_rng(seed)
    blocks, parameters, ops, types = (int(dice.integers(*of)) for of in ((2, 4), (1, 4), (1, 3), (2, 4)))
    end = parameters + ops + 1
    operands: list[list[tuple[str, int]]] = [[], *([("outside", 0)] for _ in range(parameters))]
    for place in range(parameters + 1, end):
        source = ("here", place - 1) if place > parameters + 1 else ("before", end - 1)
        operands.append([source, *(("here", p) for p in range(1, parameters + 1) if dice.random() < 0.8)])
    operands.append([("here", end - 1)])
    strategies = [1, *dice.integers(1, 4, end - 1).tolist(), 1]
    conversions = [np.zeros((types, types)), *dice.random((end, types, types))]
    whole = {place: dice.random((types, types)) < 0.6 for place in range(1, parameters + 1)}
    for table, diagonal in [*((table, 0.0) for table in conversions), *((table, False) for table in whole.values())]:
        np.fill_diagonal(table, diagonal)
    for place, gathered in whole.items():
        conversions[place] *= np.where(gathered, 0.3, 1.5)
    made = Chain(
        blocks,
        end - 1,
        operands,
        [dice.random(n) for n in strategies],
        [tuple(dice.integers(0, types, n).tolist()) for n in strategies],
        {(p, k): tuple(dice.integers(0, types, strategies[p]).tolist()) for p, of in enumerate(operands) for k in range(len(of))},
        conversions,
    )
    return Sized(made, {place: int(dice.integers(1, 5)) for place in whole}, whole)


def costs(problem: Problem) -> list[tuple[float, tuple[int, ...]]]:
    """Of all choices; none where these are too many."""
    if math.prod(len(cost) for cost in problem.node_cost) > MOST:
        return []
    choices = itertools.product(*(range(len(cost)) for cost in problem.node_cost))
    return [(cost, choice) for choice in choices if (cost := problem.evaluate(choice)) < math.inf]


@given(st.integers(0, 2**32 - 1))
@examples(150)
def test_no_choice_of_each_block_costs_less(seed: int) -> None:
    """That gathers fewer bytes in each block, whatever the threshold."""
    found = sized(seed)
    repeated, gathers = found.chain.repeated(), found.gathers()
    known = [(cost, found.most(choice)) for cost, choice in costs(found.chain.apart())]
    for below in range(1, 1 + sum(found.sizes.values())) if known else ():
        bound = least(capped(repeated, gathers, below), math.inf)
        assert bound <= min((cost for cost, most in known if most < below), default=math.inf) * (1 + 1e-9)


def test_it_is_nearly_what_the_best_costs() -> None:
    """And more than what is known without a threshold, where the best choice gathers as much."""
    found = []
    for seed in range(250):
        case = sized(seed)
        known = [(cost, case.most(choice)) for cost, choice in costs(case.chain.apart())]
        free, gathered = min(known, default=(0.0, 0))
        best = min((cost for cost, most in known if most < gathered), default=math.inf)
        if free * (1 + 1e-6) < best < math.inf:
            repeated = case.chain.repeated()
            bounds = least(repeated, math.inf), least(capped(repeated, case.gathers(), gathered), math.inf)
            found.append(np.array(bounds) / best)
    without, with_ = np.array(found).T
    assert len(found) > 20
    assert (with_ > without + 1e-3).mean() > 0.5 and with_.mean() > without.mean() + 0.05


def two(blocks: int, sizes: tuple[int, int], costs: tuple[float, ...]) -> tuple[Chain, list[Gathered]]:
    """Blocks with two parameters that lie sharded, and an op that costs less the more of them it has whole. costs: of it, where
    none is whole, the first, the second, and both."""
    none = np.zeros((2, 2))
    made = Chain(
        blocks, 3, [[], [("outside", 0)], [("outside", 0)], [("outside", 0), ("here", 1), ("here", 2)], [("here", 3)]],
        [np.zeros(1), np.zeros(1), np.zeros(1), np.array(costs), np.zeros(1)], [(0,), (1,), (1,), (0,) * 4, (0,)],
        {(1, 0): (0,), (2, 0): (0,), (3, 0): (0,) * 4, (3, 1): (1, 0, 1, 0), (3, 2): (1, 1, 0, 0), (4, 0): (0,)}, [none] * 5,
    )  # fmt: skip
    whole = np.array([[False, False], [True, False]])
    places = [at for at, *_ in made.repeated().places]
    return made, [Gathered(places.index(p), 0, 1.0, size, whole) for p, size in zip((1, 2), sizes, strict=True)]


def test_few_blocks_gather_much_where_none_may() -> None:
    """Of two parameters that no block may gather both, blocks have one in the mean; and none that is too large by itself."""
    found, gathers = two(4, (8, 8), (3.0, 3.0, 3.0, 0.0))
    repeated = found.repeated()
    bounds = [least(capped(repeated, gathers, below), math.inf) for below in (17, 16, 12, 8)]
    assert bounds == pytest.approx([0.0, 6.0, 6.0, 12.0], abs=1e-4)
    assert least(repeated, math.inf) == pytest.approx(0.0, abs=1e-4)


def test_the_others_read_the_same() -> None:
    """A parameter that only a share of the blocks has for its own counts so much of their mean."""
    found, gathers = two(4, (8, 8), (3.0, 3.0, 3.0, 0.0))
    shared = [replace(of, share=0.5) for of in gathers]
    assert least(capped(found.repeated(), shared, 16), math.inf) == pytest.approx(0.0, abs=1e-4)


def test_thresholds_are_where_fewer_are_gathered() -> None:
    assert thresholds([8, 2, 2, 8, 2]) == [2, 4, 6, 8, 10, 16]
    assert thresholds([]) == []
