"""What no choice of strategies costs less than, where a node of an assignment problem stands for several that choose apart.

The problem of compiler/assign.py counts the nodes at the same place of repeated blocks as one. Let each of them choose by itself.
Draw one block of each run at random: what its nodes chose, with what those outside of blocks chose, is a choice for the problem. Of
a value that all nodes of a place make, and that all those of other places take, each in its own block, the costs are the mean of
what the problem says they are for such draws. They are more where one node is read by several blocks: what any of them needs is
paid for. So are the costs of nodes. And what the problem leaves out as useless, or puts into a table (assign_presolve.py), can be
so for each draw.

Let x be how often strategies are drawn: (one), (rows), (columns) and (shared) hold of it, as they do of each draw. Of a value
between some of the nodes, as at the borders of blocks, or of what the last block gives to the loss, types are drawn for themselves,
of so many nodes: y is how often. With n of the N nodes at a place,

    (coupled)    sum over parts of n y[part, t] <= N sum of x[s] over s of type t

since no node is in two parts. The least cost of such x and y is a linear program, and no choice costs less.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .assign import Problem, Program, Use, Value, run_highs
from .assign_presolve import Infeasible, Network
from .parts import Part

SLACK = 1e-6
"""The share by which a bound may be too high for the solver's rounding."""


@dataclass(frozen=True)
class Loose:
    """Costs of some nodes of a place, of `count`: by strategy, for all of these. Those of one place are of different nodes."""

    place: Hashable
    node: int
    costs: np.ndarray
    count: int


@dataclass(frozen=True)
class Cap:
    """What is at most `most`, whatever the strategies: of some nodes, the sum of their strategies' weights."""

    weights: Mapping[int, np.ndarray]
    most: float


@dataclass(frozen=True)
class Repeated:
    """counts    by node of the problem: for how many nodes it stands
    parts     by value: of which of them it is
    places    by value: where it is made, and where it is taken. What is said of one place is of different nodes there
    loose     costs of some nodes of a place
    caps      what the mean of the nodes of places keeps to
    """

    problem: Problem
    counts: Sequence[int]
    parts: Sequence[Part]
    places: Sequence[tuple[Hashable, ...]]
    loose: Sequence[Loose] = ()
    caps: Sequence[Cap] = ()


@dataclass(frozen=True)
class Coupling:
    """parts      nodes that stand for some of those at a place, of `count`, in some values; and for how many
    node       that stands for all of them
    classes    by its strategy, which of theirs is meant
    """

    node: int
    count: int
    classes: np.ndarray
    parts: list[tuple[int, int]] = field(default_factory=list)


def least(repeated: Repeated, alike: float) -> float:
    """alike: what no choice costs less than in which the nodes of a place take the same; inf where that is not known."""
    apart = _Apart(repeated)
    if not apart.couplings and math.isfinite(alike):
        return alike
    free: dict[int, list[np.ndarray]] = {c.node: [] for c in apart.couplings.values()}
    for c in apart.couplings.values():
        free[c.node].append(c.classes)
        free |= {node: [np.arange(len(apart.costs[node]))] for node, _ in c.parts}
    for cap in repeated.caps:
        for node, weights in cap.weights.items():
            free.setdefault(node, []).append(weights)
    network = Network(Problem(tuple(apart.costs), tuple(apart.values)), free)
    try:
        network.reduce()
        if not network.remaining():
            return min(alike, network.constant)
        program = Program(network)
        for c in apart.couplings.values():
            program.couple(c.node, c.classes, [(node, n / c.count) for node, n in c.parts])
        for cap in repeated.caps:
            program.cap(cap.weights, cap.most)
        _, bound = run_highs(program.model())
    except Infeasible:  # by rounding: the nodes of a place may take the same
        return network.constant
    return min(alike, network.constant + bound / program.scale * (1 - SLACK))


class _Apart:
    """The problem with nodes of their own for values that are of some nodes of a place."""

    def __init__(self, repeated: Repeated) -> None:
        self.repeated = repeated
        self.costs = list(repeated.problem.node_cost)
        self.couplings: dict[Hashable, Coupling] = {}
        self.values = [self._value(*of) for of in zip(repeated.problem.values, repeated.parts, repeated.places, strict=True)]
        for loose in repeated.loose:
            own, each = self._part((loose.place, "loose"), loose.node, loose.costs, loose.count, True)
            self.costs[own] = self.costs[own] + each

    def _value(self, value: Value, part: Part, places: tuple[Hashable, ...]) -> Value:
        at, *others = places
        node, produced = self._part((at, "made"), value.node, np.array(value.produced), part.makers, part.together)
        uses = []
        for use, count, place in zip(value.uses, part.readers, others, strict=True):
            reader, needed = self._part((place, "taken"), use.node, np.array(use.needed), count, part.together)
            uses.append(Use(reader, tuple(needed.tolist())))
        return Value(node, tuple(produced.tolist()), value.conversion, tuple(uses))

    def _part(self, place: Hashable, node: int, kinds: np.ndarray, count: int, together: bool) -> tuple[int, np.ndarray]:
        """The node that stands for so many of a place, and of which kind its strategies are. kinds: of the place's node."""
        most = self.repeated.counts[node]
        if count == most and (together or most == 1):
            return node, kinds
        _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
        order = np.argsort(first)
        classes = np.argsort(order)[inverse]
        own = len(self.costs)
        self.costs.append(np.zeros(len(order)))
        coupling = self.couplings.setdefault((place, classes.tobytes()), Coupling(node, most, classes))
        coupling.parts.append((own, count))
        return own, kinds[first[order]]
