"""Prices of bytes: what is found and proven of choices that are known in full."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st
from properties import examples

from shardwright.compiler.dual import CLOSE, STEEPER, Dual, Point

CHOICES = st.lists(st.tuples(st.floats(1.0, 100.0), st.floats(0.0, 100.0)), min_size=1, max_size=12)
"""Seconds and bytes."""


def asked(choices: Sequence[tuple[float, float]], limit: float) -> tuple[Dual, int]:
    """All that can be learnt, and in how many questions."""
    dual, count = Dual(limit), 0
    while (price := dual.price()) is not None:
        points = [Point(seconds, size - limit) for seconds, size in choices]
        best = min(points, key=lambda p: p.at(price))
        dual.learn(price, best.at(price), [best])
        count += 1
    return dual, count


def hull(choices: Sequence[tuple[float, float]], limit: float) -> float:
    """The least seconds that a mixture of choices takes whose bytes are within the limit: that of one or of two of them."""
    found = [seconds for seconds, size in choices if size <= limit]
    for s, b in choices:
        for t, c in choices:
            if b <= limit < c:
                found.append(s + (t - s) * (limit - b) / (c - b))
    return min(found, default=math.inf)


@given(CHOICES, st.floats(1.0, 100.0))
@example([(1.0, 50.0), (2.0, 10.0)], 20.0)
@example([(1.0, 50.0), (90.0, 10.0)], 20.0)
@examples(400)
def test_the_bound_is_one_and_as_near_as_prices_come(choices: list[tuple[float, float]], limit: float) -> None:
    dual, count = asked(choices, limit)
    fitting = [seconds for seconds, size in choices if size <= limit]
    best = min(fitting, default=math.inf)
    found = min((p.seconds for p in dual.points if p.excess <= 0), default=math.inf)
    assert count <= 12
    assert dual.bound <= best * (1 + 1e-9), "no choice that fits takes less"
    assert found >= best
    if found < math.inf:
        assert dual.bound >= hull(choices, limit) * (1 - 10 * CLOSE) - 1e-9
    else:  # what fits is dearer than the highest price makes it
        fastest, size = min(choices)
        highest = max(STEEPER) * fastest / limit
        assert all(s + highest * (b - limit) >= fastest + highest * (size - limit) or size > limit for s, b in choices)
        assert best == math.inf or best > fastest + highest * (min(b for _, b in choices if b > limit) - limit)


def test_the_fastest_that_fits_needs_one_question() -> None:
    dual, count = asked([(1.0, 10.0), (2.0, 5.0)], 20.0)
    assert (count, dual.bound) == (1, 1.0)


def test_between_two_choices_the_bound_is_a_mixture_of_them() -> None:
    dual, _ = asked([(1.0, 30.0), (3.0, 10.0)], 20.0)
    assert dual.bound == 2.0
