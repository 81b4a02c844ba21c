"""What follows of all placements from those that were found."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import FAR, NEAR, adapted, case, machine
from properties import examples

from shardwright.compiler.groups import runs
from shardwright.compiler.keeping import keeping
from shardwright.compiler.layouts import Layouts, Mixed
from shardwright.compiler.tensor_axis import Load, TensorAxis
from shardwright.compiler.topology import Topology
from shardwright.compiler.totals import PARAMETERS, SLACK, TOTALS, TRAINABLE, Envelope, Known, tangent, totals_of
from shardwright.passes.graph_tools import op_calls

SIZE = len(TOTALS)


def known(points: np.ndarray, prices: np.ndarray) -> Known:
    """As if these points were all that there is."""
    found = Known(np.zeros(SIZE), np.full(SIZE, np.inf), np.full(SIZE, 10.0), [])
    for price in prices:
        found.learn(price, float((points @ price).min()))
    return found


@given(st.integers(0, 2**32 - 1), st.floats(1.0, 30.0))
@examples(200)
def test_nothing_is_below_what_is_least(seed: int, limit: float) -> None:
    """Whatever is known of some points, for seconds and bytes that are convex in them."""
    dice = np.random.default_rng(seed)
    points, prices = dice.random((8, SIZE)) * 10, dice.random((6, SIZE)) * dice.integers(0, 2, (6, SIZE))
    seconds, size = dice.random((3, SIZE)), dice.random((3, SIZE))

    def time(totals: np.ndarray) -> float:
        return float((seconds @ totals).max())

    def room(totals: np.ndarray) -> float:
        return float((size @ totals).max())

    least = known(points, prices).least(Envelope(time, room), limit, points[0])
    fitting = [time(p) for p in points if room(p) <= limit]
    assert least.seconds <= min(fitting, default=math.inf) * (1 + 1e-9)


def test_as_much_is_known_as_prices_tell() -> None:
    """Of two points, asked at the price at which they cost the same, the least is their mixture; of fewer bytes there is none."""
    fast, small = np.zeros(SIZE), np.zeros(SIZE)
    fast[[0, PARAMETERS]], small[[0, PARAMETERS]] = (1.0, 30.0), (3.0, 10.0)
    time, size = np.eye(SIZE)[0], np.eye(SIZE)[PARAMETERS]
    found = known(np.array([fast, small]), np.array([time, size, time + 0.1 * size]))

    def least(limit: float) -> float:
        return found.least(Envelope(lambda z: float(z[0]), lambda z: float(z[PARAMETERS])), limit, fast).seconds

    assert least(20.0) == pytest.approx(2.0, rel=2 * SLACK)
    assert least(math.inf) == pytest.approx(1.0, rel=2 * SLACK)
    assert least(9.0) == math.inf


def test_what_holds_of_some_placements_alone_is_sought_among_these() -> None:
    """By their bytes of parameters with gradients."""
    found = known(np.zeros((1, SIZE)), np.zeros((1, SIZE)))
    found.low[TRAINABLE], found.high[TRAINABLE] = 2.0, 9.0

    def least(low: float, high: float) -> float:
        envelope = Envelope(lambda z: float(z[TRAINABLE]), lambda z: 0.0, trainable=(low, high))
        return found.least(envelope, math.inf, found.low).seconds

    assert least(0.0, math.inf) == pytest.approx(2.0, rel=2 * SLACK)
    assert least(4.0, 5.0) == pytest.approx(4.0, rel=2 * SLACK)
    assert least(0.0, 1.0) == math.inf


def test_the_price_that_tells_the_most_is_told() -> None:
    fast = np.zeros(SIZE)
    fast[[0, PARAMETERS]] = 1.0, 30.0
    found = known(np.array([fast]), np.array([np.eye(SIZE)[0] + 0.2 * np.eye(SIZE)[PARAMETERS]]))
    least = found.least(Envelope(lambda z: float(z[0]), lambda z: float(z[PARAMETERS])), 20.0, fast)
    assert least.seconds == pytest.approx(3.0, rel=2 * SLACK)
    assert least.prices is not None
    assert least.prices[[0, PARAMETERS]] == pytest.approx([1.0, 0.2], rel=1e-4)


def test_tangents_are_of_the_larger_of_two() -> None:
    """Where two totals are equal, their maximum has the slope of one, and not of both."""
    line = tangent(lambda z: max(z[1], z[2]), np.zeros(SIZE), np.ones(SIZE))
    assert line.slopes[[1, 2]].sum() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("topology", [NEAR, FAR, machine(1e9)], ids=["near", "far", "slow"])
@pytest.mark.parametrize("model", ["gpt", "gpt2", "t5", "vit", "mixtral", "adapted"])
def test_what_is_known_holds_of_every_placement(model: str, topology: Topology) -> None:
    """Found at any prices and loads, in Megatron's layouts, and with blocks in two of them: within low and high, and above all
    lines; and so of those whose blocks gather few bytes."""
    found = adapted() if model == "adapted" else case(model)
    calls = op_calls(found.graph)
    tensor = TensorAxis(found.graph, found.captured.loss, topology, calls, keeping(calls))
    load = Load(0.5, 2, 0.25)
    layouts = [Layouts(), Layouts(sequence=True)]
    for held, kept, gathered in ((0.0, 0.0, 0.0), (1e-10, 0.0, 0.0), (1e-9, 1e-8, 0.0), (1e-7, 1e-10, 1e-8), (1e-7, 1e-6, 0.0)):
        layouts.append(Layouts(False, held, kept, kept / 10, (gathered, 2 * gathered), 1.0 - 0.5 * (held == 1e-9)))
    costs = [tensor.cost(2, option, other) for option in layouts for other in (load, Load(1.0, 4, 1.0))]
    blocks = sorted(runs(found.graph))
    some = itertools.cycle([blocks[::2], blocks[:1], blocks[1:]])
    for one, other, own in zip(layouts[2:], [*layouts[3:], layouts[2]], some, strict=False):
        costs.append(tensor.cost(2, replace(one, mixed=Mixed(tuple(own), other)), load))
    steps = tensor.gather_thresholds(2)
    for option, below in itertools.product(layouts[3:], steps[:: max(1, len(steps) // 4)]):
        tensor.learn_fewer(2, option, load, below)
    assert len(tensor.explored(2, load).known.lines) > 5
    assert topology is not NEAR or model == "t5" or any(cost.gathered > 0 for cost in costs)
    for cost, below in itertools.product(costs, (None, *steps)):
        if below is not None and cost.gathered >= below:
            continue
        totals, known_ = totals_of(cost), tensor.explored(2, load).within(below)
        assert cost.gathered >= max(cost.heaviest, cost.second)
        assert (totals >= known_.low * (1 - 1e-9)).all()
        assert (totals <= known_.high * (1 + 1e-9)).all()
        for line in known_.lines:
            assert line.at(totals) >= -1e-9 * np.abs(line.slopes * totals).sum()
