"""Choose one strategy per node of a graph so that the sum of node costs and conversion costs is least. Arrays in, arrays out.

The problem. Node v takes one strategy s, at `node_cost[v][s]`. A value is produced with a type that its producer's strategy
fixes, and each use needs it in a type that the consumer's strategy fixes. Converting a value from type p to type t costs
`conversion[p, t]`, once, whatever the number of uses that need t. Optionally the sum of `node_weight` stays within `budget`.

The way to the optimum:

1. Presolve, exact (`assign_presolve.Network`): strategies that cannot be part of any solution, or that another one dominates, are
   dropped; nodes with at most two neighbours are eliminated by a min-plus product, which leaves their best strategy as a table.
2. The linear relaxation of the mixed-integer program (`Program`), over x[v, s] (strategy taken), f[u, p, t] (use u converts p
   to t) and c[value, p, t] (the conversion is paid):

       minimize    sum cost[v, s] x[v, s] + sum conversion[p, t] c[value, p, t]
       (one)       sum_s x[v, s] = 1
       (rows)      sum_t f[u, p, t] = sum of x[producer, s] over s producing p
       (columns)   sum_p f[u, p, t] = sum of x[consumer, s] over s needing t
       (shared)    c[value, p, t] >= f[u, p, t] for each use u; where one use only can ask for it, f takes its place
       (budget)    sum weight[v, s] x[v, s] <= budget

3. Branch and bound over x (HiGHS) only where the relaxation is fractional.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np

from .assign_presolve import INFINITY, Infeasible, Network, Shared

_SCALE = 1e4  # the largest cost as HiGHS sees it: its tolerances (1e-7) are absolute
_INTEGRAL = 1e-6
_ROUNDING = 1e-9


class AssignError(ValueError):
    """No choice of strategies works. `nodes` are the indices of the nodes involved."""

    def __init__(self, message: str, nodes: Iterable[int] = ()):
        self.nodes = tuple(sorted(set(nodes)))
        super().__init__(f"{message} (nodes {', '.join(map(str, self.nodes))})" if self.nodes else message)


@dataclass(frozen=True)
class Use:
    """`needed[s]` is the type id in which strategy s of `node` needs the value."""

    node: int
    needed: tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A value of the graph: `produced[s]` is the type id that strategy s of its producer `node` gives it.

    conversion      float [types, types], the cost from row to column; inf where impossible, 0 on the diagonal, never negative
    """

    node: int
    produced: tuple[int, ...]
    conversion: np.ndarray
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Problem:
    """`node_cost[v]`: float [strategies of v], inf for a strategy that may not be taken. `node_weight`: likewise, with `budget`."""

    node_cost: tuple[np.ndarray, ...]
    values: tuple[Value, ...]
    node_weight: tuple[np.ndarray, ...] | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if (self.node_weight is None) != (self.budget is None):
            raise ValueError("node_weight and budget come together")
        for v, cost in enumerate(self.node_cost):
            if not len(cost):
                raise ValueError(f"node {v} has no strategies")
        for value in self.values:
            for node, types in [(value.node, value.produced), *((use.node, use.needed) for use in value.uses)]:
                if len(types) != len(self.node_cost[node]):
                    raise ValueError(
                        f"node {node} has {len(self.node_cost[node])} strategies, but {len(types)} types are given for it"
                    )

    def evaluate(self, choice: Sequence[int]) -> float:
        """The cost of a choice; inf if it is impossible or over the budget."""
        total = sum(float(cost[s]) for cost, s in zip(self.node_cost, choice, strict=True))
        for value in self.values:
            produced = value.produced[choice[value.node]]
            total += sum(float(value.conversion[produced, t]) for t in {use.needed[choice[use.node]] for use in value.uses})
        if self.node_weight is not None and self.budget is not None:
            weight = sum(float(w[s]) for w, s in zip(self.node_weight, choice, strict=True))
            if weight > self.budget * (1 + 1e-9):
                return INFINITY
        return total


@dataclass(frozen=True)
class Solution:
    """`choice[v]` is the strategy taken, `cost` its cost. No choice costs less than `bound`: the same where proven optimal."""

    choice: tuple[int, ...]
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """Relative distance between cost and bound."""
        return relative_gap(self.cost, self.bound)


def relative_gap(cost: float, bound: float) -> float:
    """How far above `bound`, relative to itself, `cost` is; 0 where the difference is no more than the solver's rounding."""
    gap = 0.0 if cost <= bound else (cost - bound) / abs(cost)
    return gap if gap > _ROUNDING else 0.0


def solve(problem: Problem, *, gap: float = 0.0, time_limit: float = 60.0) -> Solution:
    """The cheapest choice, or within relative `gap` of it; after `time_limit` seconds the best found, with its bound.

    Raises AssignError where no choice is possible, naming the nodes whose needs cannot meet.
    """
    deadline = time.monotonic() + time_limit
    for v, cost in enumerate(problem.node_cost):
        if not np.isfinite(cost).any():
            raise AssignError("a node has no strategy that may be taken", [v])
    try:
        network = Network(problem)
        network.reduce()
        if problem.budget is not None and network.least_weight() > problem.budget * (1 + 1e-9):
            raise Infeasible()
        reduced, bound = _solve_reduced(network, gap, deadline)
    except Infeasible as found:
        raise _explain(problem, found.nodes, time_limit) from None
    choice = network.expand(reduced)
    cost = problem.evaluate(choice)
    return Solution(choice, cost, min(cost, network.constant + bound))


def _explain(problem: Problem, nodes: Sequence[int], time_limit: float) -> AssignError:
    """Find out what cannot meet: allow what is impossible at a price of 1 and see what is bought."""
    free = tuple(np.where(np.isfinite(cost), 0.0, INFINITY) for cost in problem.node_cost)
    elastic = Problem(free, tuple(replace(v, conversion=np.where(np.isfinite(v.conversion), 0.0, 1.0)) for v in problem.values))
    choice = solve(elastic, time_limit=time_limit).choice
    involved: set[int] = set()
    for value in problem.values:
        for use in value.uses:
            if not np.isfinite(value.conversion[value.produced[choice[value.node]], use.needed[choice[use.node]]]):
                involved |= {value.node, use.node}
    if involved:
        return AssignError("no choice of strategies gives every use a type that its value can be converted to", involved)
    if problem.node_weight is None or problem.budget is None:
        return AssignError("no choice of strategies is possible", nodes)
    weights = tuple(np.where(np.isfinite(c), w, INFINITY) for c, w in zip(problem.node_cost, problem.node_weight, strict=True))
    lightest = solve(
        Problem(weights, tuple(replace(v, conversion=np.where(np.isfinite(v.conversion), 0.0, INFINITY)) for v in problem.values))
    )
    return AssignError(f"the lightest choice weighs {lightest.bound:.6g}, over the budget of {problem.budget:.6g}")


def _solve_reduced(network: Network, gap: float, deadline: float) -> tuple[dict[int, int], float]:
    """Strategy positions of the remaining nodes, and a lower bound on the cost of what remains."""
    if not network.remaining():
        return {}, 0.0
    program = Program(network)
    relaxed, bound = run_highs(program.model(), deadline)
    if relaxed is not None and program.is_integral(relaxed):
        return program.positions(relaxed), bound / program.scale
    start = network.heuristic([] if relaxed is None else [program.positions(relaxed)])
    solution, tree_bound = run_highs(program.model(integer=True), deadline, gap, None if start is None else program.point(start))
    bound = max(bound, tree_bound) / program.scale
    if solution is not None:
        found = [program.positions(solution), *([] if start is None else [start])]
        return min(found, key=lambda positions: network.problem.evaluate(network.expand(positions))), bound
    if start is not None:
        return start, bound
    raise AssignError("no solution was found within the time limit: allow more time")


class Program:
    """The mixed-integer program of a reduced network. Columns: x of every remaining node, then f and c."""

    def __init__(self, network: Network):
        self.network = network
        self.nodes = network.remaining()
        counts = [len(network.unary[v]) for v in self.nodes]
        self.first = dict(zip(self.nodes, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        self.strategies = self.columns = sum(counts)
        self._costs: list[np.ndarray] = [np.concatenate([network.unary[v] for v in self.nodes])]
        self._entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._lower: list[np.ndarray] = []
        self._upper: list[np.ndarray] = []
        self._rows = 0
        self._one_strategy_each()
        for a in self.nodes:
            for b, matrix in network.pairs[a].items():
                if a < b:
                    self._pairwise(a, b, matrix)
        for value in network.shared:
            self._shared(value)
        self._budget()
        costs = np.concatenate(self._costs)
        self.scale = _SCALE / max(float(costs.max()), 1e-300)

    def _x(self, v: int) -> np.ndarray:
        return self.first[v] + np.arange(len(self.network.unary[v]))

    def _new_columns(self, costs: np.ndarray) -> np.ndarray:
        self._costs.append(costs)
        self.columns += len(costs)
        return np.arange(self.columns - len(costs), self.columns)

    def _new_rows(self, count: int, lower: float, upper: float) -> np.ndarray:
        self._lower.append(np.full(count, lower))
        self._upper.append(np.full(count, upper))
        self._rows += count
        return np.arange(self._rows - count, self._rows)

    def _enter(self, rows: np.ndarray, columns: np.ndarray, coefficient: float | np.ndarray) -> None:
        self._entries.append((rows, columns, np.broadcast_to(np.asarray(coefficient, dtype=float), rows.shape)))

    def _one_strategy_each(self) -> None:
        """(one)"""
        rows = self._new_rows(len(self.nodes), 1.0, 1.0)
        counts = [len(self.network.unary[v]) for v in self.nodes]
        self._enter(np.repeat(rows, counts), np.arange(self.strategies), 1.0)

    def _flow(
        self, a: int, class_a: np.ndarray, b: int, class_b: np.ndarray, costs: np.ndarray, possible: np.ndarray
    ) -> np.ndarray:
        """(rows) and (columns): f between the classes of strategies of a and of b. Returns its columns, [possible entries]."""
        p, t = np.nonzero(possible)
        f = self._new_columns(costs[p, t])
        by_row, by_column = self._new_rows(possible.shape[0], 0.0, 0.0), self._new_rows(possible.shape[1], 0.0, 0.0)
        self._enter(by_row[p], f, 1.0)
        self._enter(by_row[class_a], self._x(a), -1.0)
        self._enter(by_column[t], f, 1.0)
        self._enter(by_column[class_b], self._x(b), -1.0)
        return f

    def _pairwise(self, a: int, b: int, matrix: np.ndarray) -> None:
        rows, class_a = np.unique(matrix, axis=0, return_inverse=True)
        costs, class_b = np.unique(rows, axis=1, return_inverse=True)
        self._flow(a, class_a.reshape(-1), b, class_b.reshape(-1), costs, np.isfinite(costs))

    def _shared(self, value: Shared) -> None:
        """(shared): a conversion asked for by several uses is a column of its own; by one use, its flow pays."""
        produced, class_a = np.unique(value.produced, return_inverse=True)
        needs = [np.unique(needed, return_inverse=True) for _, needed in value.uses]
        asked = np.bincount(np.concatenate([types for types, _ in needs]), minlength=len(value.conversion))
        conversion = value.conversion[produced]
        joint = np.isfinite(conversion) & (conversion > 0) & (asked > 1)
        c = np.full(conversion.shape, -1)
        c[joint] = self._new_columns(conversion[joint])
        for (node, _), (types, class_b) in zip(value.uses, needs, strict=True):
            possible = np.isfinite(conversion[:, types])
            paid = c[:, types]
            f = self._flow(value.node, class_a, node, class_b, np.where(paid < 0, conversion[:, types], 0.0), possible)
            paid = paid[possible]
            rows = self._new_rows(int((paid >= 0).sum()), 0.0, INFINITY)
            self._enter(rows, paid[paid >= 0], 1.0)
            self._enter(rows, f[paid >= 0], -1.0)

    def couple(self, v: int, classes: np.ndarray, parts: Sequence[tuple[int, float]]) -> None:
        """(coupled) of compiler/assign_apart.py: parts, with the share that each is of v, take no more of a class than v does."""
        for t in np.unique(classes):
            row = self._new_rows(1, 0.0, INFINITY)
            for node, coefficient, kinds in ((v, 1.0, classes), *((n, -share, np.arange(len(classes))) for n, share in parts)):
                taken = self._x(node)[kinds[self.network.alive[node]] == t]
                self._enter(np.repeat(row, len(taken)), taken, coefficient)

    def cap(self, weights: Mapping[int, np.ndarray], most: float) -> None:
        """(capped) of compiler/assign_apart.py: the strategies of these nodes weigh no more than `most` together."""
        row = self._new_rows(1, -INFINITY, most)
        for v, of in weights.items():
            self._enter(np.repeat(row, len(self.network.alive[v])), self._x(v), of[self.network.alive[v]])

    def _budget(self) -> None:
        """(budget), less what the eliminated nodes weigh whatever they choose; in units of the budget."""
        network = self.network
        if network.problem.budget is None:
            return
        spent = sum(float(network.weight[v][0]) for v, *_ in network.eliminated)
        unit = max(abs(network.problem.budget), 1e-300)
        weights = np.concatenate([network.weight[v] for v in self.nodes])
        row = self._new_rows(1, -INFINITY, (network.problem.budget - spent) / unit)
        self._enter(np.repeat(row, self.strategies), np.arange(self.strategies), weights / unit)

    def model(self, integer: bool = False) -> highspy.HighsLp:
        rows, columns, coefficients = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        order = np.argsort(rows, kind="stable")
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self.columns, self._rows
        model.col_cost_ = np.concatenate(self._costs) * self.scale
        model.col_lower_, model.col_upper_ = np.zeros(self.columns), np.ones(self.columns)
        model.row_lower_, model.row_upper_ = np.concatenate(self._lower), np.concatenate(self._upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self._rows))]).astype(np.int32)
        model.a_matrix_.index_ = columns[order].astype(np.int32)
        model.a_matrix_.value_ = coefficients[order]
        if integer:
            kinds = highspy.HighsVarType
            model.integrality_ = [kinds.kInteger] * self.strategies + [kinds.kContinuous] * (self.columns - self.strategies)
        return model

    def is_integral(self, point: np.ndarray) -> bool:
        x = point[: self.strategies]
        return bool((np.abs(x - np.round(x)) < _INTEGRAL).all())

    def positions(self, point: np.ndarray) -> dict[int, int]:
        """For each node the strategy with the largest share of it."""
        return {v: int(point[self._x(v)].argmax()) for v in self.nodes}

    def point(self, positions: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of x for a choice; HiGHS completes f and c."""
        x = np.zeros(self.strategies)
        x[[self.first[v] + k for v, k in positions.items()]] = 1.0
        return np.arange(self.strategies, dtype=np.int32), x


def run_highs(
    model: highspy.HighsLp, deadline: float = math.inf, gap: float = 0.0, start: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray | None, float]:
    """The best point found, if any, and a lower bound (0 where none is known: no cost is negative here)."""
    solver, is_integer = highspy.Highs(), len(model.integrality_) > 0
    options = {"output_flag": False, "parallel": "off", "time_limit": max(0.05, deadline - time.monotonic())}
    for option, setting in (options | {"mip_rel_gap": max(gap, 1e-9), "mip_abs_gap": 1e-6}).items():
        solver.setOptionValue(option, setting)
    solver.passModel(model)
    if start is not None:
        solver.setSolution(len(start[0]), *start)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
        raise Infeasible()
    optimal = status == highspy.HighsModelStatus.kOptimal
    if not is_integer:
        return (np.asarray(solver.getSolution().col_value), info.objective_function_value) if optimal else (None, 0.0)
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    bound = info.objective_function_value if optimal and gap == 0.0 else info.mip_dual_bound
    return (np.asarray(solver.getSolution().col_value) if found else None), (max(0.0, bound) if np.isfinite(bound) else 0.0)
