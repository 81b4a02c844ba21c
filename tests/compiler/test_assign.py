import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.compiler.assign import AssignError, Problem, Use, Value, solve

INF = float("inf")


@st.composite
def problems(draw, budget: bool = False):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, n_types = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    impossible = draw(st.sampled_from([0.0, 0.1, 0.4]))
    whole = draw(st.booleans())  # integer costs: many ties
    counts = rng.integers(1, 4, n)

    def costs(*shape):
        found = rng.integers(0, 4, shape).astype(float) if whole else rng.random(shape)
        found[rng.random(shape) < impossible] = INF
        return found

    values = []
    for v in range(n - 1):
        for _ in range(rng.integers(0, 3)):
            conversion = costs(n_types, n_types)
            np.fill_diagonal(conversion, 0.0)
            uses = []
            for _ in range(rng.integers(0, 4)):
                node = int(rng.integers(v + 1, n))
                uses.append(Use(node, tuple(rng.integers(0, n_types, counts[node]).tolist())))
            values.append(Value(v, tuple(rng.integers(0, n_types, counts[v]).tolist()), conversion, tuple(uses)))
    node_cost = tuple(costs(c) for c in counts)
    if not budget:
        return Problem(node_cost, tuple(values))
    return Problem(node_cost, tuple(values), tuple(rng.random(c) for c in counts), float(rng.random() * n))


def brute_force(problem: Problem) -> float:
    return min(problem.evaluate(choice) for choice in itertools.product(*(range(len(c)) for c in problem.node_cost)))


def check_against_brute_force(problem: Problem) -> None:
    best = brute_force(problem)
    if best == INF:
        with pytest.raises(AssignError):
            solve(problem)
        return
    solution = solve(problem)
    assert problem.evaluate(solution.choice) == solution.cost
    assert solution.cost == pytest.approx(best, abs=1e-9)
    assert solution.bound == pytest.approx(best, abs=1e-6)


@given(problems())
@settings(max_examples=300, deadline=None)
def test_equals_brute_force(problem):
    check_against_brute_force(problem)


@given(problems(budget=True))
@settings(max_examples=200, deadline=None)
def test_equals_brute_force_under_a_budget(problem):
    check_against_brute_force(problem)


def test_a_conversion_is_paid_once_for_all_uses_that_need_it():
    free, dear = 0.0, 5.0
    conversion = np.array([[0.0, 3.0], [3.0, 0.0]])
    uses = tuple(Use(v, (1, 0)) for v in (1, 2, 3))
    problem = Problem(
        (np.array([0.0]), *(np.array([free, dear]) for _ in range(3))),
        (Value(0, (0,), conversion, uses),),
    )
    solution = solve(problem)
    assert solution.choice == (0, 0, 0, 0)
    assert solution.cost == 3.0


def test_names_the_nodes_that_cannot_meet():
    impossible = np.array([[0.0, INF], [INF, 0.0]])
    cost = tuple(np.zeros(1) for _ in range(5))
    values = (
        Value(0, (0,), impossible, (Use(1, (0,)),)),
        Value(2, (0,), impossible, (Use(3, (1,)), Use(4, (0,)))),
    )
    with pytest.raises(AssignError) as error:
        solve(Problem(cost, values))
    assert error.value.nodes == (2, 3)
    with pytest.raises(AssignError) as error:
        solve(Problem((np.zeros(2), np.full(3, INF)), ()))
    assert error.value.nodes == (1,)


def test_says_what_the_lightest_choice_weighs():
    problem = Problem((np.zeros(2), np.zeros(2)), (), (np.array([4.0, 2.0]), np.array([3.0, 5.0])), 4.5)
    with pytest.raises(AssignError, match="weighs 5, over the budget of 4.5"):
        solve(problem)


def layered_problem(nodes: int, strategies: int, seed: int = 0, with_budget: bool = False) -> Problem:
    """A graph like a transformer's: a chain of ops, values reused at a distance, a parameter for every third op."""
    rng = np.random.default_rng(seed)
    n_types = 6
    values, uses = [], {v: [] for v in range(nodes)}
    for v in range(1, nodes):
        if v % 3 == 0:
            continue  # a parameter
        for source in {v - 1, max(0, v - int(rng.integers(1, 9)))}:
            uses[source].append(v)
    for v in range(nodes):
        conversion = rng.integers(1, 20, (n_types, n_types)) * 1e-5
        conversion[rng.random((n_types, n_types)) < 0.15] = INF
        conversion[:, 0] = conversion[0, :] = 5e-4
        np.fill_diagonal(conversion, 0.0)
        types = tuple(Use(u, (0, *rng.integers(0, n_types, strategies - 1).tolist())) for u in uses[v])
        values.append(Value(v, (0, *rng.integers(0, n_types, strategies - 1).tolist()), conversion, types))
    cost = tuple(rng.random(strategies) * 1e-4 for _ in range(nodes))
    weight = tuple(rng.random(strategies) for _ in range(nodes)) if with_budget else None
    return Problem(cost, tuple(values), weight, 0.45 * nodes if with_budget else None)


@pytest.mark.parametrize("with_budget", [False, True])
def test_is_quick_on_a_large_graph(with_budget):
    problem = layered_problem(150 if with_budget else 500, 8, with_budget=with_budget)
    start = time.perf_counter()
    solution = solve(problem, gap=1e-3, time_limit=20)
    assert time.perf_counter() - start < 40
    assert np.isfinite(solution.cost) and solution.gap <= 2e-3


def test_stops_at_the_time_limit_and_tells_the_gap():
    problem = layered_problem(600, 8, seed=3, with_budget=True)
    start = time.perf_counter()
    solution = solve(problem, time_limit=2.0)
    assert time.perf_counter() - start < 20
    assert np.isfinite(solution.cost) and solution.bound <= solution.cost
