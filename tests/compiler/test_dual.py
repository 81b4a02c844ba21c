"""The price of a byte that divides choices into those that fit and those that do not, of choices that are known in full."""

from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st
from properties import examples

from shardwright.compiler.dual import Point, balance, between

CHOICES = st.lists(st.tuples(st.floats(1.0, 100.0), st.floats(0.0, 100.0)), min_size=1, max_size=12)
"""Seconds and bytes."""


def hull(points: list[Point]) -> float:
    """The least seconds that a mixture of choices takes whose bytes are within the limit: that of one or of two of them."""
    found = [p.seconds for p in points if p.fits]
    for p in points:
        for q in points:
            if p.fits and not q.fits:
                found.append(p.seconds + (q.seconds - p.seconds) * -p.excess / (q.excess - p.excess))
    return min(found, default=math.inf)


@given(CHOICES, st.floats(1.0, 100.0))
@example([(1.0, 50.0), (2.0, 10.0)], 20.0)
@example([(1.0, 50.0), (90.0, 10.0)], 20.0)
@example([(1.0, 50.0), (1.0, 10.0)], 20.0)
@examples(400)
def test_no_price_says_more(choices: list[tuple[float, float]], limit: float) -> None:
    points = [Point(seconds, size - limit) for seconds, size in choices]
    price = balance(points)
    if price is None:
        assert not any(p.fits for p in points)
        return
    assert price >= 0
    least = min(p.at(price) for p in points)
    assert math.isclose(least, hull(points), rel_tol=1e-9)
    cheapest = [p for p in points if p.at(price) <= least + 1e-9 * abs(least)]
    assert any(p.fits for p in cheapest)
    assert price == 0 or any(not p.fits for p in cheapest)


@given(CHOICES, st.floats(1.0, 100.0))
@examples(400)
def test_the_best_mixture_is_of_two(choices: list[tuple[float, float]], limit: float) -> None:
    """So fast that no other mixture of two is faster, and within the limit; none where a choice is as fast."""
    points = [Point(seconds, size - limit) for seconds, size in choices]
    found = between(points)
    fitting = min((p.seconds for p in points if p.fits), default=math.inf)
    if found is None:
        assert hull(points) >= fitting * (1 - 1e-9)
        return
    over, within = points[found.over], points[found.within]
    assert found.seconds < fitting and math.isclose(found.seconds, hull(points), rel_tol=1e-9)
    assert math.isclose(over.excess + found.share * (within.excess - over.excess), 0.0, abs_tol=1e-9 * limit)
    assert math.isclose(over.seconds + found.share * (within.seconds - over.seconds), found.seconds, rel_tol=1e-9)


def test_the_fastest_that_fits_needs_no_price() -> None:
    assert balance([Point(1.0, -10.0), Point(2.0, -15.0)]) == 0.0


def test_between_two_choices_the_price_is_what_a_byte_saves() -> None:
    assert balance([Point(1.0, 10.0), Point(3.0, -10.0)]) == 0.1


def test_no_limit_has_no_price() -> None:
    assert balance([Point(1.0, -math.inf), Point(2.0, -math.inf)]) == 0.0
    assert Point(1.0, -math.inf).at(0.0) == 1.0
