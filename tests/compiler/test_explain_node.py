"""What a plan says of one op or parameter: where it lies, what that costs, and what the next best would."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import pytest
import torch
import zoo
from torch import nn

from shardwright import Strategy, Topology, plan
from shardwright.compiler.api import PlannedModel
from shardwright.compiler.cost import Seconds
from shardwright.compiler.emit import Lowered, lower_for
from shardwright.compiler.explain_node import explain_node
from shardwright.compiler.layout import with_layout
from shardwright.compiler.layouts import Layouts, Mixed
from shardwright.compiler.levels import Level, Parameter, levels
from shardwright.compiler.lowered_cost import LoweredCost
from shardwright.compiler.placed_cost import placed_cost
from shardwright.compiler.plan import Plan
from shardwright.compiler.runner_up import next_best, next_best_along
from shardwright.compiler.tensor_axis import tensor_placement
from shardwright.compiler.topology import Level as Network
from shardwright.passes.graph_tools import metas, op_calls
from shardwright.passes.rules.base import Axis
from shardwright.passes.shard import ShardingError
from shardwright.passes.types import shard
from shardwright.runtime.program import Mesh

CPU = Topology.preset("cpu", devices=4)


@pytest.fixture(scope="module")
def planned() -> PlannedModel:
    model, batch = zoo.MODELS["llama"](layers=3)
    return plan(model, CPU, example_inputs=batch, strategy=Strategy(dp=2, tp=2, pp=1))


def test_a_parameter(planned: PlannedModel) -> None:
    text = planned.explain("model.layers.1.mlp.down_proj.weight")
    assert "over dp_shard=2: Replicate, gradient summed once a step" in text
    assert "over tp=2: Shard(1)" in text
    assert "more like it in other blocks" in text
    assert re.search(r"next best: .+: \S+ \S+ (more|less) a step", text)


def test_a_parameter_of_a_block_in_other_layouts(planned: PlannedModel) -> None:
    """It is placed with those of its group, and the next best is searched for there."""
    layouts = Layouts(byte_price=0.0, mixed=Mixed((1,), Layouts(byte_price=1e-3)))
    bare = replace(planned.plan, layouts=layouts, layout={}, topology=CPU)
    text = explain_node(planned.problem, with_layout(planned.problem, bare), CPU, "model.layers.1.mlp.down_proj.weight")
    assert re.search(r"next best: .+: \S+ \S+ (more|less) a step", text) and "more like it" not in text
    text = explain_node(planned.problem, with_layout(planned.problem, bare), CPU, "model.layers.0.mlp.down_proj.weight")
    assert "; 1 more like it in other blocks" in text


def test_an_op_with_its_source(planned: PlannedModel) -> None:
    name = next(n.name for n in planned.problem.graph.graph.nodes if "shardwright.attention" in str(n.target))
    text = planned.explain(name)
    assert "self_attn" in text and "sdpa_attention.py" in text
    assert "over dp_shard=2: takes V(0), V(0), V(0); gives V(0), V(0)" in text
    assert "over tp=2: takes V(1), V(1), V(1); gives V(1), V(1)" in text


def test_a_module_lists_its_ops(planned: PlannedModel) -> None:
    text = planned.explain("model.layers.0.self_attn")
    ops = [n.name for n in planned.problem.graph.graph.nodes if n.meta.get("module") == "model.layers.0.self_attn"]
    assert "attention" in text and text.splitlines()[0].startswith("model.layers.0.self_attn: ")
    assert sum(line.split()[0] in ops for line in text.splitlines()[1:]) == len(text.splitlines()) - 1
    assert re.match(r"[\w.]+: \d+ ops, [\d.]+ us a step on each rank", text)


def test_what_there_is_not_is_named_with_what_is_near(planned: PlannedModel) -> None:
    with pytest.raises(KeyError, match=r"model.layers.1.mlp.down_proj.weight"):
        planned.explain("layers.1.mlp.down_proj.weight")


def test_the_next_best_is_the_best_of_the_others(planned: PlannedModel) -> None:
    """Against every other type that the node's results may have, each searched for by itself."""
    graph, calls = planned.problem.graph, op_calls(planned.problem.graph)
    problem, layouts = planned.problem, Layouts()
    seconds = Seconds(CPU, Mesh(("tp",), (2,)))
    chosen = tensor_placement(graph, problem.loss, 2, layouts, seconds, calls)
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and n.name in chosen.choice]
    looked_at = 0
    for node in nodes[:: max(1, len(nodes) // 12)]:
        outs, barred, found = chosen.choice[node.name].outs, [], []
        while True:  # leave out one after the other until none is left
            try:
                one = tensor_placement(graph, problem.loss, 2, layouts, seconds, calls, {node.name: (outs, *barred)})
            except ShardingError:
                break
            found.append(one)
            barred.append(one.choice[node.name].outs)
        if not found:
            with pytest.raises(ShardingError):
                next_best(planned.problem, planned.plan, CPU, node)
            continue
        looked_at += 1
        assert next_best(planned.problem, planned.plan, CPU, node).outs == found[0].choice[node.name].outs
        assert chosen.cost <= found[0].cost * (1 + 1e-9)
        assert [p.cost for p in found] == sorted(p.cost for p in found)
    assert looked_at >= 6


def test_one_device_says_so() -> None:
    model, batch = zoo.MODELS["mlp"]()
    found = plan(model, Topology.preset("cpu", devices=1), example_inputs=batch)
    assert "whole: no axis" in found.explain("layers.0.weight")


def test_a_mesh_in_the_topology_s_place_is_refused() -> None:
    with pytest.raises(TypeError, match="Topology.preset"):
        plan(nn.Linear(2, 2), (4,), example_inputs=torch.randn(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(("zero", "what"), [(2, "its gradient and optimizer state are"), (3, "it, its gradient")])
def test_what_zero_shards_of_a_parameter(zero: Literal[2, 3], what: str) -> None:
    model, batch = zoo.MODELS["mlp"]()
    found = plan(model, CPU, example_inputs=batch, strategy=Strategy(dp_shard=4, zero=zero))
    text = found.explain("layers.0.weight")
    assert f"between its uses {what}" in text and f"sharded over dp_shard (ZeRO-{zero})" in text


class Squared(nn.Sequential):
    """The mean square of what it gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


def test_what_ops_take_is_what_the_search_counts() -> None:
    """A lowered graph's ops and conversions, one by one, and the totals that a placement over tp is priced by."""
    model, batch = zoo.MODELS["llama"](layers=2)
    for layouts in ("megatron", "any"):
        found = plan(model, CPU, example_inputs=batch, strategy=Strategy(dp=1, tp=4, pp=1, layouts=layouts))
        lowered, cost = lower_and_cost(found)
        placement, seconds = lowered.placements["tp"], Seconds(CPU, Mesh(("tp",), (4,)))
        counted = placed_cost(found.problem.graph, seconds, placement, op_calls(found.problem.graph))
        of_ops = counted.compute + counted.launches + counted.traffic + counted.latencies + counted.gathers
        assert cost.step == pytest.approx(of_ops, rel=1e-9)
        assert cost.received == pytest.approx(counted.received + counted.received_gathers, rel=1e-9)
        assert sum(map(cost.of, lowered.graph.graph.nodes)) >= cost.step * (1 - 1e-9)


def lower_and_cost(found: PlannedModel) -> tuple[Lowered, LoweredCost]:
    lowered = lower_for(found.problem, found.plan)
    return lowered, LoweredCost(lowered.graph, found.plan, CPU)


def test_the_next_best_over_data_ranks_costs_what_its_conversions_do() -> None:
    """Of an op between two others its value cut elsewhere: what it is exchanged for, and back, in both directions."""
    model = Squared(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    found = plan(model, CPU, example_inputs=torch.randn(8, 64), strategy=Strategy(dp=4, zero=0))
    lowered, cost = lower_and_cost(found)
    (axis,) = lowered.placements
    node = next(n for n in found.problem.graph.graph.nodes if "tanh" in str(n.target))
    runner = next_best_along(found.problem, found.plan, CPU, node, axis, lowered, cost)
    (value,), over = metas(node), Axis(axis, 4)
    seconds, cut, whole = Seconds(CPU, found.plan.mesh), shard(0, 8, 4), runner.outs[0]
    assert whole == shard(1, 64, 4)
    exchanged = sum(seconds.conversion_timing(src, dst, value, over).once for src, dst in ((cut, whole), (whole, cut)))
    assert runner.seconds == pytest.approx(exchanged, rel=1e-9) and exchanged > 0


@pytest.mark.parametrize("axes", [{"dp": 4}, {"dp_replicate": 2, "dp_shard": 2}], ids=["plain", "two"])
def test_levels_of_a_parameter_are_those_of_plans(axes: dict[str, int]) -> None:
    """Of a model that is one parameter, plans at other levels take as many seconds over the data axes, and bytes, as are told."""
    with torch.device("meta"):
        model = Squared(nn.Linear(2048, 4096, bias=False))
    topology, pinned = replace(CPU, overlap={}), (2, 3) if "dp_shard" in axes else (0, 2, 3)
    plans = {
        zero: plan(model, topology, example_inputs=torch.zeros(8, 2048), strategy=Strategy(tp=1, pp=1, zero=zero, **axes))
        for zero in pinned
    }
    size = 4.0 * 2048 * 4096
    for zero, found in plans.items():
        own, *others = levels(found.plan, topology, "0.weight", Parameter(size, trained=True, again=False, copied=False))
        assert own.zero == zero and [level.zero for level in others] == sorted({0, 2, 3} - {zero}, key=lambda z: places(others, z))
        for level in (own, *others):
            if level.zero in plans:
                predicted = plans[level.zero].plan.predicted
                assert predicted is not None
                assert level.seconds == pytest.approx(predicted.parts["data"], rel=0.02)  # its latencies aside
                assert level.held == pytest.approx(predicted.parts["state bytes"], rel=1e-9)


def test_of_small_copies_a_rank_holds_less() -> None:
    slow = Topology(CPU.device, (Network("network", 8, 1e9, 1.0),))
    fast = Plan(Mesh(("dp_shard", "tp"), (2, 4)), zero=2)
    copied = Parameter(1e3, trained=True, again=False, copied=True)
    held = [levels(p, slow, "norm.weight", copied)[0].held for p in (fast, replace(fast, small_copies=True))]
    assert held[1] < 0.6 * held[0]


def places(found: list[Level], zero: int) -> tuple[float, float]:
    return next((level.seconds, level.held) for level in found if level.zero == zero)
