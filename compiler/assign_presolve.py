"""Make an assignment problem smaller without losing its optimum: the first step of `compiler.assign`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .assign import Problem

INFINITY = float("inf")


class Infeasible(Exception):
    """No choice is possible; `nodes` are some of those involved."""

    def __init__(self, nodes: Iterable[int] = ()):
        self.nodes = tuple(nodes)
        super().__init__()


@dataclass(eq=False)
class Shared:
    """A value with uses in several nodes: the part of the problem that is not pairwise. Type ids as in `conversion`."""

    node: int
    produced: np.ndarray
    conversion: np.ndarray
    uses: list[tuple[int, np.ndarray]]

    def nodes(self) -> set[int]:
        return {self.node, *(node for node, _ in self.uses)}


@dataclass
class Network:
    """The problem while it is reduced: unary costs, pairwise cost matrices, and shared values, over the strategies still alive.

    tied    nodes of which something else depends on the class of their strategy, with these classes: they are not eliminated, and
            no strategy is dropped for one of another class
    """

    problem: Problem
    tied: Mapping[int, Sequence[np.ndarray]] = field(default_factory=dict)
    alive: list[np.ndarray] = field(init=False)
    unary: list[np.ndarray] = field(init=False)
    weight: list[np.ndarray] = field(init=False)
    pairs: list[dict[int, np.ndarray]] = field(init=False)  # pairs[a][b]: [strategies of a, of b]; pairs[b][a] its transpose
    shared: list[Shared] = field(init=False)
    shared_of: list[list[Shared]] = field(init=False)
    gone: list[bool] = field(init=False)
    constant: float = field(init=False)
    eliminated: list[tuple[int, tuple[int, ...], np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        problem = self.problem
        n = len(problem.node_cost)
        self.alive = [np.arange(len(cost)) for cost in problem.node_cost]
        least = [float(np.min(cost)) for cost in problem.node_cost]
        self.constant = sum(least)  # what is left is nowhere negative
        self.unary = [np.asarray(cost, dtype=float) - low for cost, low in zip(problem.node_cost, least, strict=True)]
        weights = problem.node_weight or [np.zeros(len(cost)) for cost in problem.node_cost]
        self.weight = [np.asarray(weight, dtype=float) for weight in weights]
        self.pairs = [{} for _ in range(n)]
        self.shared, self.shared_of = [], [[] for _ in range(n)]
        for value in problem.values:
            uses = dict.fromkeys((use.node, use.needed) for use in value.uses)
            if uses:
                arrays = [(node, np.array(needed)) for node, needed in uses]
                self._add(Shared(value.node, np.array(value.produced), np.asarray(value.conversion, dtype=float), arrays))
        self.gone = [False] * n

    def _add(self, value: Shared) -> None:
        """Enter a value: as a pairwise matrix if one node has all its uses, as shared otherwise."""
        consumers = {node for node, _ in value.uses}
        if len(consumers) > 1:
            self.shared.append(value)
            for node in value.nodes():
                self.shared_of[node].append(value)
            return
        needs = np.stack([needed for _, needed in value.uses])
        matrix = np.zeros((len(value.produced), needs.shape[1]))
        for k, needed in enumerate(needs):
            repeated = (needs[:k] == needed).any(0)
            matrix += np.where(repeated, 0.0, value.conversion[value.produced[:, None], needed])
        self._add_pair(value.node, next(iter(consumers)), matrix)

    def _add_pair(self, a: int, b: int, matrix: np.ndarray) -> None:
        if a == b:
            self.unary[a] = self.unary[a] + np.diagonal(matrix)
            return
        self.pairs[a][b] = self.pairs[a][b] + matrix if b in self.pairs[a] else matrix
        self.pairs[b][a] = self.pairs[a][b].T

    def _restrict(self, v: int, keep: np.ndarray) -> None:
        if not keep.any():
            raise Infeasible({v, *self.pairs[v], *(n for value in self.shared_of[v] for n in value.nodes())})
        self.alive[v], self.unary[v], self.weight[v] = self.alive[v][keep], self.unary[v][keep], self.weight[v][keep]
        for other, matrix in self.pairs[v].items():
            self.pairs[v][other] = matrix[keep]
            self.pairs[other][v] = self.pairs[v][other].T
        for value in self.shared_of[v]:
            if value.node == v:
                value.produced = value.produced[keep]
            value.uses = [(node, needed[keep] if node == v else needed) for node, needed in value.uses]

    def reduce(self) -> None:
        """Apply every reduction until none applies."""
        queue = dict.fromkeys(range(len(self.alive)))
        while queue:
            v = next(iter(queue))
            del queue[v]
            if self.gone[v]:
                continue
            around = {*self.pairs[v], *(n for value in self.shared_of[v] for n in value.nodes())}
            if self._prune(v) | self._settle_shared(v) | self._eliminate(v):
                queue.update(dict.fromkeys([v, *sorted(around)]))

    def _prune(self, v: int) -> bool:
        """Drop strategies of v that are impossible, and those that another one of v beats whatever the rest does."""
        before = len(self.alive[v])
        possible = np.isfinite(self.unary[v])
        for matrix in self.pairs[v].values():
            possible &= np.isfinite(matrix).any(1)
        for value in self.shared_of[v]:
            if value.node == v:
                for _, needed in value.uses:
                    possible &= np.isfinite(value.conversion[value.produced[:, None], _distinct(needed)]).any(1)
            for node, needed in value.uses:
                if node == v:
                    possible &= np.isfinite(value.conversion[_distinct(value.produced)[:, None], needed]).any(0)
        if not possible.all():
            self._restrict(v, possible)
        if len(self.alive[v]) > 1:
            beats = self._beats(v)
            if beats.any():
                mutual = beats & beats.T
                self._restrict(v, np.asarray(~(beats & ~mutual).any(0) & ~np.triu(mutual, 1).any(0)))
        return len(self.alive[v]) < before

    def _beats(self, v: int) -> np.ndarray:
        """[a, b]: taking a in place of b never costs more (dead-end elimination, Desmet et al. 1992, for the shared values too)."""
        extra = self.unary[v][:, None] - self.unary[v][None, :]
        for matrix in self.pairs[v].values():
            with np.errstate(invalid="ignore"):
                difference = matrix[:, None, :] - matrix[None, :, :]
            difference[:, ~np.isfinite(matrix)] = -INFINITY
            extra += difference.max(2)
        for value in self.shared_of[v]:
            if value.node == v:
                asked = _distinct(np.concatenate([needed for _, needed in value.uses]))
                costs = value.conversion[value.produced[:, None], asked]
                with np.errstate(invalid="ignore"):
                    difference = np.where(np.isfinite(costs)[None], costs[:, None, :] - costs[None, :, :], 0.0)
                extra += np.maximum(difference, 0.0).sum(2)
            for node, needed in value.uses:
                if node == v:
                    costs = value.conversion[_distinct(value.produced)[:, None], needed].T
                    worst = np.where(np.isfinite(costs)[None], costs[:, None, :], 0.0).max(2)
                    extra += np.where(needed[:, None] == needed[None, :], 0.0, worst)
        beats = (extra <= 0.0) & (self.weight[v][:, None] <= self.weight[v][None, :])
        for classes in self.tied.get(v, ()):
            own = classes[self.alive[v]]
            beats &= own[:, None] == own[None, :]
        np.fill_diagonal(beats, False)
        return beats

    def _settle_shared(self, v: int) -> bool:
        """A use of v that always needs the same type pays for it always: the producer takes the cost, other uses have it free."""
        changed = False
        for value in list(self.shared_of[v]):
            settled = [needed[0] for node, needed in value.uses if node == v and (needed == needed[0]).all()]
            if not settled:
                continue
            changed = True
            for t in set(settled):
                column = value.conversion[:, t]
                self.unary[value.node] = self.unary[value.node] + column[value.produced]
                value.conversion = value.conversion.copy()
                value.conversion[:, t] = np.where(np.isfinite(column), 0.0, INFINITY)
            value.uses = [(node, needed) for node, needed in value.uses if node != v or not (needed == needed[0]).all()]
            for node in {*value.nodes(), v}:
                self.shared_of[node].remove(value)
            self.shared.remove(value)
            if value.uses:
                self._add(value)
        return changed

    def _eliminate(self, v: int) -> bool:
        """Take v out of the problem if it has at most two neighbours, and leaving its place to one matrix makes it smaller."""
        if v in self.tied or self.shared_of[v] or len(self.pairs[v]) > 2 or np.ptp(self.weight[v]) > 0:
            return False
        neighbours = tuple(self.pairs[v])
        sizes = [len(self.problem.node_cost[n]) for n in neighbours]
        if not neighbours:
            costs = self.unary[v]
        elif len(neighbours) == 1:
            costs = self.unary[v][:, None] + self.pairs[v][neighbours[0]]
        else:
            a, b = neighbours
            costs = self.unary[v][:, None, None] + self.pairs[v][a][:, :, None] + self.pairs[v][b][:, None, :]
            joined = costs.min(0) + self.pairs[a].get(b, 0.0)
            before = len(self.unary[v]) + sum(_class_count(m) for m in self.pairs[v].values())
            if _class_count(joined) > before + (_class_count(self.pairs[a][b]) if b in self.pairs[a] else 0):
                return False
        table = np.zeros(sizes, dtype=int)
        table[np.ix_(*(self.alive[n] for n in neighbours))] = self.alive[v][costs.argmin(0)]
        self.eliminated.append((v, neighbours, table))
        self.gone[v] = True
        for n in neighbours:
            del self.pairs[n][v]
        self.pairs[v] = {}
        best = costs.min(0)
        if not neighbours:
            self.constant += float(best)
        elif len(neighbours) == 1:
            self.unary[neighbours[0]] = self.unary[neighbours[0]] + best
        else:
            self._add_pair(neighbours[0], neighbours[1], best)
        return True

    def least_weight(self) -> float:
        return sum(float(weight.min()) for weight in self.weight)

    def remaining(self) -> list[int]:
        return [v for v, gone in enumerate(self.gone) if not gone]

    def expand(self, reduced: dict[int, int]) -> tuple[int, ...]:
        """The whole choice from positions among the living strategies of the remaining nodes."""
        choice = {v: int(self.alive[v][k]) for v, k in reduced.items()}
        for v, neighbours, table in reversed(self.eliminated):
            choice[v] = int(table[tuple(choice[n] for n in neighbours)])
        return tuple(choice[v] for v in range(len(self.alive)))

    def heuristic(self, starts: Iterable[dict[int, int]]) -> dict[int, int] | None:
        """A good possible choice of the remaining nodes, from the given ones and the first strategies; None where none is found."""
        best: tuple[float, dict[int, int]] | None = None
        for start in (*starts, dict.fromkeys(self.remaining(), 0)):
            for price in self._weight_prices():
                choice = self.descend(start, price)
                cost = self.problem.evaluate(self.expand(choice))
                if cost < INFINITY:
                    best = (cost, choice) if best is None or cost < best[0] else best
                    break
        return None if best is None else best[1]

    def _weight_prices(self) -> list[float]:
        """Rising prices for a unit of weight: 0 where there is no budget."""
        if self.problem.budget is None:
            return [0.0]
        cost = sum(float(u[np.isfinite(u)].max()) for u in self.unary)
        unit = cost / max(sum(float(np.ptp(w)) for w in self.weight), 1e-300)
        return [0.0, *(unit * 2.0**k for k in range(-3, 9))]

    def descend(self, start: dict[int, int], weight_price: float = 0.0) -> dict[int, int]:
        """Improve a choice of the remaining nodes one node at a time until none improves. May start from an impossible one."""
        choice, big = dict(start), 1e3 * (1.0 + sum(float(np.max(u)) for u in self.unary))
        for _ in range(20):
            changed = False
            for v in choice:
                costs = self._costs_around(v, choice, big) + weight_price * self.weight[v]
                best = int(costs.argmin())
                if costs[best] < costs[choice[v]]:
                    choice[v], changed = best, True
            if not changed:
                break
        return choice

    def _costs_around(self, v: int, choice: dict[int, int], big: float) -> np.ndarray:
        costs = self.unary[v].copy()
        for other, matrix in self.pairs[v].items():
            costs += np.minimum(matrix[:, choice[other]], big)
        for value in self.shared_of[v]:
            for k in range(len(costs)):
                picked = {**choice, v: k}
                produced = value.produced[picked[value.node]]
                costs[k] += sum(min(value.conversion[produced, t], big) for t in {int(need[picked[u]]) for u, need in value.uses})
        return costs


def _distinct(types: np.ndarray) -> np.ndarray:
    """Type ids, each once, in order: `np.unique` of what are few small numbers."""
    return np.flatnonzero(np.bincount(types))


def _class_count(matrix: np.ndarray) -> int:
    """How many flow variables a pairwise matrix needs: distinct rows x distinct columns."""
    return len({row.tobytes() for row in matrix}) * len({column.tobytes() for column in matrix.T})
