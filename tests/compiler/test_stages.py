import itertools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from programs import case
from torch import Tensor, fx, nn

from shardwright import Strategy, Topology, emit, plan, verify
from shardwright.compiler.keeping import keeping, kept_where
from shardwright.compiler.memory import program_memory
from shardwright.compiler.stages import StageCuts, Stages, StageShare, cut_stages
from shardwright.compiler.stream import stream
from shardwright.compiler.traffic import received
from shardwright.passes.graph_tools import op_calls


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


def cuts_of(gm: fx.GraphModule) -> StageCuts:
    return StageCuts(gm, stream(op_calls(gm)))


def stages_of(gm: fx.GraphModule, count: int) -> Stages:
    calls = op_calls(gm)
    placeholders = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["key"].startswith("param.")]
    sizes = {n.meta["key"].removeprefix("param."): (float(n.meta["val"].nbytes),) * 3 for n in placeholders}
    return cuts_of(gm).stages(count, sizes, kept_where(calls, keeping(calls)))


def test_stages_share_what_a_model_has() -> None:
    """All of the work, every parameter where it is used, and what is kept by those who need it."""
    gm = case("gpt", layers=4).graph
    found = stages_of(gm, 4)
    assert sum(stage.work for stage in found.shares) == pytest.approx(1.0)
    assert max(stage.work for stage in found.shares) < 0.4, "a stage for each layer"
    assert sum(stage.held for stage in found.shares) == pytest.approx(1.0)
    assert 1.0 <= sum(stage.kept for stage in found.shares) < 1.2
    assert list(found.widths) == pytest.approx([1.0] * 3), "between layers a value of the stream crosses, and nothing else"
    (alone,) = stages_of(gm, 1).shares
    assert (alone.work, alone.held, alone.trained, alone.kept) == pytest.approx((1.0,) * 4)


def test_a_tied_parameter_is_held_by_both_ends() -> None:
    tied = stages_of(case("gpt2", layers=4).graph, 2)
    assert sum(stage.held for stage in tied.shares) > 1.0


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_stages_that_are_left_out_never_need_the_most(rows: list[tuple[int, int, int]], prices: list[int]) -> None:
    stages = Stages([StageShare(0.0, float(h), float(t), 0.0, float(k)) for h, t, k in rows], [])
    counts = tuple(range(len(rows), 0, -1))

    def need(stage: StageShare, at_once: float) -> float:
        return sum(p * x for p, x in zip(prices, (stage.held, stage.trained, stage.kept, at_once), strict=True))

    every = [need(stage, stage.kept * count) for stage, count in zip(stages.shares, counts, strict=True)]
    assert max(need(*each) for each in stages.fullest(counts)) == max(every)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_what_crosses_borders_is_predicted(model: str, stages: int) -> None:
    with torch.device("meta"):
        made, batch = zoo.llama(layers=4, batch=8) if model == "llama" else (zoo.HandGPT(layers=4), None)
        batch = batch or {name: torch.empty(8, 11, dtype=torch.int64) for name in ("tokens", "targets")}
    strategy = Strategy(pp=stages, dp=1, tp=1, microbatches=4)
    planned = plan(made, Topology.preset("h100", devices=stages), example_inputs=batch, strategy=strategy, batch="global")
    assert planned.plan.predicted is not None
    counted = [received(emit(planned, rank))["pp"] for rank in range(stages)]
    assert planned.plan.predicted.traffic["pp"] == pytest.approx(sum(counted) / stages, rel=1e-3)
    taken = max(program_memory(emit(planned, rank)).peak for rank in range(stages))
    assert 0.95 * taken <= planned.plan.predicted.peak_bytes <= 1.3 * taken


class Soft(nn.Module):
    """Two layers and a loss of several terms: of four stages one has nothing to compute but what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softmax(self.a(x), -1)
        g = F.log_softmax(self.b(h), -1)
        return (h * g).sum(-1).mean() + torch.cumsum(h, -1).std()


def test_a_stage_with_nothing_to_compute() -> None:
    torch.manual_seed(0)
    topology, strategy = Topology.preset("h100", devices=4), Strategy(pp=4, dp=1, tp=1)
    planned = plan(Soft(), topology, example_inputs={"x": torch.randn(8, 4, 128)}, strategy=strategy, device="cpu")
    assert verify(planned).largest_error < 1e-9
