"""Nodes that stand for several: what no choice costs less than in which each of these chooses by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chains import Chain, chain
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from shardwright.compiler.assign import AssignError, solve
from shardwright.compiler.assign_apart import Loose, Repeated, least
from shardwright.compiler.parts import Part


@given(st.integers(0, 2**32 - 1))
@examples(400)
def test_no_choice_of_each_block_by_itself_costs_less(seed: int) -> None:
    found = chain(seed)
    repeated = found.repeated()
    try:
        alike = solve(repeated.problem)
    except AssignError:
        return
    apart = solve(found.apart())
    assert apart.cost <= alike.cost * (1 + 1e-9)
    assert least(repeated, alike.bound) <= apart.cost * (1 + 1e-9)


def test_it_is_nearly_what_the_best_costs() -> None:
    """On average, and in most cases just that."""
    found = []
    for seed in range(300):
        repeated = chain(seed).repeated()
        try:
            alike = solve(repeated.problem)
        except AssignError:
            continue
        best = solve(chain(seed).apart()).cost
        if best > 0:
            found.append((least(repeated, alike.bound) / best, alike.cost / best))
    bounds, costs = np.array(found).T
    assert (costs > 1 + 1e-6).mean() > 0.2, "in many cases blocks placed apart cost less"
    assert (bounds > 1 - 1e-5).mean() > 0.6 and bounds.mean() > 0.9


def swapping(blocks: int) -> Chain:
    """Each block takes one type and makes the other, whichever it takes: alike, every border pays."""
    dear = 10 * (1 - np.eye(2))
    return Chain(
        blocks, 1, [[], [("before", 1)], [("here", 1)]], [np.zeros(1), np.array([1.0, 1.5]), np.zeros(2)], [(0,), (1, 0), (0, 0)],
        {(1, 0): (0, 1), (2, 0): (0, 1)}, [dear, dear, dear],
    )  # fmt: skip


def test_blocks_that_alternate_may_cost_less() -> None:
    found = swapping(4)
    alike, apart = solve(found.repeated().problem), solve(found.apart())
    assert (alike.cost, apart.cost) == (34.0, 5.0)
    assert 4.0 <= least(found.repeated(), alike.bound) <= 5.0 * (1 + 1e-9)


def test_without_blocks_it_is_what_was_known() -> None:
    found = swapping(4)
    problem = found.apart()
    counted = [Part(1, (1,) * len(v.uses)) for v in problem.values]
    places = [tuple(range(1 + len(v.uses))) for v in problem.values]
    assert least(Repeated(problem, [1] * len(problem.node_cost), counted, places), 4.5) == 4.5


@pytest.mark.parametrize(("count", "most"), [(1, 0.0), (2, 0.0), (3, 2.0), (4, 4.0)])
def test_some_nodes_may_cost_more_than_others(count: int, most: float) -> None:
    """So many of four pay for the second strategy; without dear conversions, two of them take it."""
    found = swapping(4).repeated()
    problem = replace(found.problem, node_cost=(found.problem.node_cost[0], np.zeros(2), found.problem.node_cost[2]))
    loose = [Loose("some", 1, np.array([0.0, 2.0 * count]), count)]
    bound = least(replace(found, problem=problem, loose=loose), 100.0)
    assert most / 2 * (1 - 1e-5) <= bound <= most
