"""Chains of like blocks, whose places an assignment problem has once or for every block: what tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from shardwright.compiler.assign import Problem, Use, Value
from shardwright.compiler.assign_apart import Repeated
from shardwright.compiler.parts import parts

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
