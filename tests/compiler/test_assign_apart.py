"""Nodes that stand for several: what no choice costs less than in which each of these chooses by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from shardwright.compiler.assign import AssignError, Problem, Use, Value, solve
from shardwright.compiler.assign_apart import Loose, Repeated, least
from shardwright.compiler.parts import Part, parts

Instance = tuple[int, int]
"""A place, and a block; 0 outside of blocks."""


@dataclass(frozen=True)
class Chain:
    """A chain of blocks: places 1 to `inside` are in each block, 0 is before all and the last one after them.

    operands    by place, where each comes from: ("here", place), ("before", place), whose first is of place 0, or ("outside", 0)
    conversion  of each place's value
    """

    blocks: int
    inside: int
    operands: list[list[tuple[str, int]]]
    costs: list[np.ndarray]
    produced: list[tuple[int, ...]]
    needed: dict[tuple[int, int], tuple[int, ...]]
    conversion: list[np.ndarray]

    def instances(self) -> Iterator[Instance]:
        for place in range(self.inside + 2):
            yield from ((place, block) for block in (range(self.blocks) if 0 < place <= self.inside else (0,)))

    def source(self, reader: Instance, operand: tuple[str, int]) -> Instance:
        (place, block), (kind, source) = reader, operand
        if kind == "outside":
            return 0, 0
        if place > self.inside:
            return source, self.blocks - 1
        return (source, block) if kind == "here" else (source, block - 1) if block else (0, 0)

    def uses(self) -> dict[Instance, dict[tuple[int, int], list[Instance]]]:
        found: dict[Instance, dict[tuple[int, int], list[Instance]]] = {}
        for reader in self.instances():
            for k, operand in enumerate(self.operands[reader[0]]):
                found.setdefault(self.source(reader, operand), {}).setdefault((reader[0], k), []).append(reader)
        return found

    def apart(self) -> Problem:
        """Every block by itself."""
        index = {instance: k for k, instance in enumerate(self.instances())}
        values = []
        for (place, block), uses in self.uses().items():
            asked = tuple(Use(index[reader], self.needed[use]) for use, readers in uses.items() for reader in readers)
            values.append(Value(index[place, block], self.produced[place], self.conversion[place], asked))
        return Problem(tuple(self.costs[place] for place, _ in index), tuple(values))

    def repeated(self) -> Repeated:
        """All blocks as one."""

        def node(instance: Instance) -> Any:
            place, block = instance
            return SimpleNamespace(op="call_function", meta={"block": block if 0 < place <= self.inside else None})

        nodes = {instance: node(instance) for instance in self.instances()}
        found = parts(
            ((maker[0], tuple(uses)), nodes[maker], {use: [nodes[r] for r in readers] for use, readers in uses.items()})
            for maker, uses in self.uses().items()
        )
        values = tuple(
            Value(
                place, self.produced[place], self.conversion[place] * part.makers, tuple(Use(r, self.needed[r, k]) for r, k in uses)
            )
            for (place, uses), part in found.items()
        )
        counts = [1, *[self.blocks] * self.inside, 1]
        problem = Problem(tuple(n * costs for n, costs in zip(counts, self.costs, strict=True)), tuple(values))
        return Repeated(problem, counts, [*found.values()], [(place, *uses) for place, uses in found])


def chain(seed: int) -> Chain:
    dice = np.random.default_rng(seed)
    blocks, inside, types = int(dice.integers(2, 5)), int(dice.integers(1, 4)), int(dice.integers(2, 4))
    whole, impossible = dice.random() < 0.5, (0.0, 0.0, 0.15)[dice.integers(3)]

    def costs(*shape: int) -> np.ndarray:
        found = dice.integers(0, 5, shape).astype(float) if whole else dice.random(shape)
        return np.where(dice.random(shape) < impossible, np.inf, found)

    operands: list[list[tuple[str, int]]] = [[]]
    for place in range(1, inside + 2):
        kinds = ["before"] if place == 1 else ["here", *map(str, dice.choice(["here", "before", "outside"], dice.integers(0, 3)))]
        most = {"here": place, "before": inside + 1, "outside": 1}
        operands.append([(kind, int(dice.integers(kind != "outside", most[kind]))) for kind in kinds])
    strategies = dice.integers(1, 4, inside + 2)
    conversions = [costs(types, types) for _ in range(inside + 2)]
    for conversion in conversions:
        np.fill_diagonal(conversion, 0.0)
    return Chain(
        blocks,
        inside,
        operands,
        [costs(n) + 0.0 for n in strategies],
        [tuple(dice.integers(0, types, n).tolist()) for n in strategies],
        {(p, k): tuple(dice.integers(0, types, strategies[p]).tolist()) for p, of in enumerate(operands) for k in range(len(of))},
        conversions,
    )


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
