"""Stages: what crosses a border, where the border lies, what every stage makes for itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import Case, compare, emit_all, prepare, run
from programs import case, plan, shares
from torch import Tensor, fx, nn

from shardwright.compiler.layouts import Layouts
from shardwright.compiler.plan import Plan
from shardwright.compiler.topology import Device, Level, Topology
from shardwright.passes.graph_tools import extract, named_results
from shardwright.passes.stages import split_stages
from shardwright.runtime.program import RankProgram

LLAMA = {"layers": 3, "num_key_value_heads": 4}


def staged(found: Case, stage_of: dict[str, int]) -> fx.GraphModule:
    """The unsharded graph with its parameters put into stages by name prefix."""
    gm = extract(found.graph, named_results(found.graph), {})
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta["key"].startswith("param."):
            node.meta["stage"] = stage_of_name(node.meta["key"].removeprefix("param."), stage_of)
    return gm


def stage_of_name(name: str, stage_of: dict[str, int]) -> int:
    return next((stage for prefix, stage in stage_of.items() if name.startswith(prefix)), 0)


def sent(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for key, n in named_results(gm) if key.startswith("act.")]


def entering(gm: fx.GraphModule) -> set[str]:
    return {n.meta["key"] for n in gm.graph.nodes if n.op == "placeholder" and n.meta["key"].startswith("act.")}


BY_LAYER = {"model.layers.1.": 1, "model.layers.2.": 2, "model.norm.": 2, "lm_head.": 2}


def test_only_the_residual_stream_crosses_between_layers() -> None:
    found = case("llama", **LLAMA)
    stages = split_stages(staged(found, BY_LAYER), 3)
    for before, after in zip(stages, stages[1:], strict=False):
        (stream,) = sent(before)
        assert tuple(stream.meta["val"].shape) == (4, 12, 32)
        assert entering(after) == {key for key in before.meta["outputs"] if key.startswith("act.")}
    assert found.captured.loss in stages[-1].meta["outputs"]


def test_a_border_within_a_block_carries_what_it_must() -> None:
    """Between attention and MLP: the stream alone again, not the normalized copy of it beside it."""
    half = {"model.layers.0.mlp.": 1, "model.layers.0.post_attention": 1, **dict.fromkeys(BY_LAYER, 1)}
    first, _ = split_stages(staged(case("llama", **LLAMA), half), 2)
    assert [tuple(n.meta["val"].shape) for n in sent(first)] == [(4, 12, 32)]


def test_parameters_stay_in_their_stages() -> None:
    gm = staged(case("llama", **LLAMA), BY_LAYER)
    for k, stage in enumerate(split_stages(gm, 3)):
        names = {
            n.meta["key"].removeprefix("param.") for n in stage.graph.nodes if n.op == "placeholder" if "param." in n.meta["key"]
        }
        assert names and {stage_of_name(n, BY_LAYER) for n in names} == {k}


def test_masks_and_positions_are_made_where_they_are_needed() -> None:
    stages = split_stages(staged(case("llama", **LLAMA), BY_LAYER), 3)
    for stage in stages:
        assert any("cos" in str(n.target) for n in stage.graph.nodes), "rotary tables cross no border"
    assert all(n.meta["val"].is_floating_point() for stage in stages for n in sent(stage))


def test_the_stages_together_are_the_graph() -> None:
    found = case("llama", **LLAMA)
    known: dict[str, Tensor] = {**found.state, **found.inputs}
    for stage in split_stages(staged(found, BY_LAYER), 3):
        args = [known[n.meta["key"]] for n in stage.graph.nodes if n.op == "placeholder"]
        known |= dict(zip(stage.meta["outputs"], fx.Interpreter(stage).run(*args), strict=True))
    assert torch.equal(known[found.captured.loss], found.loss)


class Skip(nn.Module):
    """A tied weight at both ends, and a value that passes over a whole stage."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.last = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.last(torch.tanh(self.middle(x))) + x
        return (y @ self.table.weight.t()).logsumexp(-1).mean()


def pipelined(found: Case, stage_of: dict[str, int], wanted: Plan) -> list[RankProgram]:
    return emit_all(found, replace(wanted, stage_of=stage_of), shares(found, wanted))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_tied_weights_and_values_that_pass_over_a_stage(microbatches: int) -> None:
    torch.manual_seed(0)
    found = prepare(Skip(), {"ids": torch.randint(0, 11, (4, 5))})
    stage_of = {"table.weight": 0, "middle.weight": 1, "middle.bias": 1, "last.weight": 2, "last.bias": 2}
    made = pipelined(found, stage_of, plan(pp=3, microbatches=microbatches))
    holders = [p.rank for p in made if any(s.name == "table.weight" for s in p.parameters)]
    assert holders == [0, 2]
    assert any("pp" in i.axis for i in made[0].schedule if i.kind == "all_reduce"), "the tied gradient is summed over its stages"
    compare(found, made, run(found, made))


def test_borders_lie_alike_where_shares_differ() -> None:
    """Of 25 features one rank has 13 and one 12: what is the least to send must be so for both."""
    found = case("mlp")
    slow = Device("slow", {"float64": 4e7}, 1e12, 1.8e8, launch=1e-7)
    topology = Topology(slow, (Level("near", 8, 3.6e11, 1e-7),))
    wanted = replace(plan(pp=2, tp=2, microbatches=2), layouts=Layouts(byte_price=1e-6), topology=topology)
    made = emit_all(found, wanted, shares(found, wanted))
    sent_keys = [{key.split("[")[0] for key in p.transfers} for p in made]
    shapes = {tuple(shape) for p in made for shape, _ in p.transfers.values()}
    assert len(shapes) > 1, "uneven shares"
    assert all(keys == sent_keys[0] for keys in sent_keys)
    compare(found, made, run(found, made))
