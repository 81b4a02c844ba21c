"""The factors of a reshape, as a property: whatever the shapes, a factor that is offered may be sharded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.compiler.check_rule import Sample, check_strategy, run_whole, splits_of
from shardwright.passes.rules.base import Axis, strategies
from shardwright.passes.rules.views import split_dims

aten = torch.ops.aten


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of one size, from two ways of grouping the same small primes, with dims of 1 strewn in."""

    def grouped(primes: list[int]) -> list[int]:
        shape = [1]
        for p in primes:
            if draw(st.booleans()):
                shape[-1] *= p
            else:
                shape.append(p)
        for _ in range(draw(st.integers(0, 2))):
            shape.insert(draw(st.integers(0, len(shape))), 1)
        return shape

    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), max_size=5))
    before = grouped(primes)
    return before, grouped(draw(st.permutations(primes)) if draw(st.booleans()) else primes)


@settings(max_examples=150, deadline=None)
@given(reshapes(), st.sampled_from([2, 3]))
def test_every_factor_of_a_reshape_may_be_sharded(shapes: tuple[list[int], list[int]], ranks: int) -> None:
    before, after = shapes
    sample = Sample(aten.reshape.default, (torch.randn(before, dtype=torch.float64), after))
    whole, axis = run_whole(sample, grad=True), Axis("x", ranks)
    for strategy in strategies(whole.call, axis, splits_of(whole.call, ranks)):
        check_strategy(sample, whole, axis, strategy)


@settings(max_examples=300, deadline=None)
@given(reshapes())
def test_factors_multiply_up_to_their_dims(shapes: tuple[list[int], list[int]]) -> None:
    before, after = (tuple(s) for s in shapes)
    for size, here, there in split_dims(before, after):
        for slot, shape in ((here, before), (there, after)):
            assert slot.outer * size * slot.inner == shape[slot.dim]


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        ((4, 12, 96), (4, 12, 8, 12), [4, 12, 8, 12]),  # heads apart
        ((4, 8, 12, 12), (4, 8, 144), [4, 8, 12, 12]),
        ((4, 12, 96), (48, 96), [4, 12, 96]),  # tokens joined
        ((4, 12, 3, 8), (4, 12, 24), [4, 12, 3, 8]),  # a fused projection
        ((6, 4), (4, 6), []),  # the dims interleave: no factor
        ((5, 6, 4), (5, 4, 6), [5]),
        ((1, 6), (6, 1, 1), [6]),
        ((0, 3), (3, 0), []),
    ],
)
def test_factors_of_known_reshapes(before: tuple[int, ...], after: tuple[int, ...], sizes: list[int]) -> None:
    assert math.prod(before) == math.prod(after)
    assert [size for size, _, _ in split_dims(before, after)] == sizes
