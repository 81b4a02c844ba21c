import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.compiler.stages import cut_stages


def slowest(costs, crossing, cuts, per_byte=0.0):
    edges = [0, *cuts, len(costs)]
    transfer = [0.0, *crossing, 0.0]
    return max(sum(costs[a:b]) + (transfer[a] + transfer[b]) * per_byte for a, b in itertools.pairwise(edges))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.5]),
)
def test_equals_brute_force(segments, n, per_byte):
    costs, crossing = [c for c, _ in segments], [b for _, b in segments][:-1]
    n = min(n, len(costs))
    best = min(slowest(costs, crossing, cuts, per_byte) for cuts in itertools.combinations(range(1, len(costs)), n - 1))
    cuts = cut_stages(costs, crossing, n, per_byte)
    assert len(cuts) == n - 1 and list(cuts) == sorted(set(cuts)) and all(0 < c < len(costs) for c in cuts)
    assert slowest(costs, crossing, cuts, per_byte) == pytest.approx(best)


def test_equal_segments_are_cut_equally_and_ties_go_to_the_least_traffic():
    assert cut_stages([1.0] * 8, [1.0] * 7, 4) == (2, 4, 6)
    assert cut_stages([1, 1, 1], [9, 1], 2) == (2,)
    assert cut_stages([3, 1, 1, 1], [5, 1, 1], 2, seconds_per_byte=1.0) == (2,)


def test_refuses_more_stages_than_segments():
    with pytest.raises(ValueError, match="3 segments cannot be cut into 4 stages: use at most 3"):
        cut_stages([1, 1, 1], [1, 1], 4)


def test_is_quick():
    start = time.perf_counter()
    cut_stages(np.random.default_rng(0).random(500), np.ones(499), 16)
    assert time.perf_counter() - start < 2
