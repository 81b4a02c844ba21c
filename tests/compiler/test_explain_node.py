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
from shardwright.compiler.explain_node import explain_node, next_best
from shardwright.compiler.layout import with_layout
from shardwright.compiler.layouts import Layouts, Mixed
from shardwright.compiler.tensor_axis import tensor_placement
from shardwright.passes.graph_tools import op_calls
from shardwright.passes.shard import ShardingError
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
    assert re.search(r"next best: \S+, \S+ \S+ (more|less) a step", text)


def test_a_parameter_of_a_block_in_other_layouts(planned: PlannedModel) -> None:
    """It is placed with those of its group, and the next best is searched for there."""
    layouts = Layouts(byte_price=0.0, mixed=Mixed((1,), Layouts(byte_price=1e-3)))
    bare = replace(planned.plan, layouts=layouts, layout={}, topology=CPU)
    text = explain_node(planned.problem, with_layout(planned.problem, bare), CPU, "model.layers.1.mlp.down_proj.weight")
    assert re.search(r"next best: \S+, \S+ \S+ (more|less) a step", text) and "more like it" not in text
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
    found = plan(model, CPU, example_inputs=batch, strategy=Strategy(dp=4, zero=zero))
    text = found.explain("layers.0.weight")
    assert f"between these {what}" in text and f"sharded (ZeRO-{zero})" in text
