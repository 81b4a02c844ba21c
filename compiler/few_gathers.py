"""What placements cost at least whose blocks each gather fewer than so many bytes of parameters.

Blocks are placed each for itself (compiler/assign_apart.py), and what a program has of them is their mean: by it half of them may
gather twice as much. But where no block may gather so many bytes, each gathers no parameter that is as large, at most one of those
that are half as large, and so on. What each block keeps to, their mean keeps to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .assign import Problem, Value
from .assign_apart import Cap, Repeated


@dataclass(frozen=True)
class Gathered:
    """A value of an assignment problem that its conversions may gather: a parameter.

    value    its number; no other is made by its node
    run      of which blocks it is: what has a limit is the sum over one of them
    share    of these, in how many it is one of their own; others read the same
    size     bytes
    whole    bool [types, types], which conversions gather it
    """

    value: int
    run: int
    share: float
    size: int
    whole: np.ndarray


def thresholds(sizes: Sequence[int]) -> list[int]:
    """Bytes below which a block of parameters of these sizes gathers fewer of some size, or of larger ones, than it may."""
    return sorted({k * size for size in {*sizes} for k in range(1, 1 + sum(other >= size for other in sizes))})


def capped(repeated: Repeated, gathers: Sequence[Gathered], below: int) -> Repeated:
    """The problem where a block gathers fewer bytes than `below`.

    Strategies that make a parameter as shards are there twice: of the second, shards are not gathered. So it is the strategies of
    a node that have a limit.
    """
    found, again = repeated.problem, dict[int, np.ndarray]()
    for of in gathers:
        value = found.values[of.value]
        sharded = np.flatnonzero(np.any(of.whole, axis=1).take(value.produced))
        if of.size < below and len(sharded):
            again[value.node] = sharded
    costs = [np.append(cost, cost[again[node]]) if node in again else cost for node, cost in enumerate(found.node_cost)]
    values = [_longer(value, again) for value in found.values]
    for of in gathers:
        value = values[of.value]
        if value.node in again:
            values[of.value] = _ungathered(value, of.whole, len(again[value.node]))
        elif of.size >= below:
            values[of.value] = replace(value, conversion=np.where(of.whole, np.inf, value.conversion))
    loose = [replace(x, costs=np.append(x.costs, x.costs[again[x.node]])) if x.node in again else x for x in repeated.loose]
    gathered = {node: np.append(np.isin(range(len(found.node_cost[node])), own), 0.0 * own) for node, own in again.items()}
    caps = _caps(repeated, [of for of in gathers if found.values[of.value].node in again], gathered, below)
    return replace(repeated, problem=Problem(tuple(costs), tuple(values)), loose=loose, caps=caps)


def _longer(value: Value, again: Mapping[int, np.ndarray]) -> Value:
    """With some strategies of nodes once more, after all of them."""

    def longer(node: int, kinds: tuple[int, ...]) -> tuple[int, ...]:
        return (*kinds, *(kinds[k] for k in again.get(node, ())))

    if value.node not in again and not any(use.node in again for use in value.uses):
        return value
    uses = tuple(replace(use, needed=longer(use.node, use.needed)) for use in value.uses)
    return replace(value, produced=longer(value.node, value.produced), uses=uses)


def _ungathered(value: Value, whole: np.ndarray, count: int) -> Value:
    """With other types for the last `count` strategies of the producer: the same, but never gathered."""
    made, own = value.produced[:-count], value.produced[-count:]
    types, n = sorted({*own}), len(whole)
    conversion = np.full((n + len(types),) * 2, np.inf)
    conversion[:n, :n] = value.conversion
    conversion[n:, :n] = np.where(whole, np.inf, value.conversion)[types]
    np.fill_diagonal(conversion[n:, n:], 0.0)
    return replace(value, produced=(*made, *(n + types.index(t) for t in own)), conversion=conversion)


def _caps(repeated: Repeated, gathers: Sequence[Gathered], gathered: Mapping[int, np.ndarray], below: int) -> list[Cap]:
    """What the mean of blocks keeps to. gathered: of each strategy of a value's node, 1 where the value may be gathered."""
    caps = []
    for run in dict.fromkeys(of.run for of in gathers):
        own = [of for of in gathers if of.run == run]
        nodes = [repeated.problem.values[of.value].node for of in own]
        each = [of.share * gathered[node] for node, of in zip(nodes, own, strict=True)]
        if sum(of.size for of in own) >= below:
            weights = {node: weight * (of.size / below) for node, weight, of in zip(nodes, each, own, strict=True)}
            caps.append(Cap(weights, 1.0))
        for least in sorted({of.size for of in own}):
            large = {node: weight for node, weight, of in zip(nodes, each, own, strict=True) if of.size >= least}
            if len(large) > (most := -(-below // least) - 1):
                caps.append(Cap(large, float(most)))
    return caps
