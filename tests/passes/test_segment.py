"""A backward graph in parts computes what it computes in one, and its gradients are reduced while later parts run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import compare, emit_all, run
from programs import FAR, case, plan, program, shares
from torch import fx, nn

from shardwright.compiler import emit
from shardwright.compiler.layouts import Layouts, Mixed
from shardwright.passes.graph_tools import named_results, node_bytes
from shardwright.passes.segment import PARTS, segment
from shardwright.runtime import homes
from shardwright.runtime.homes import read_outputs


def backward_of(model: str) -> fx.GraphModule:
    return program(case(model), plan(dp_shard=2)).graphs["backward"].graph


def sizes_of(backward: fx.GraphModule) -> dict[str, int]:
    return {key.removeprefix("grad."): node_bytes(n) for key, n in named_results(backward)}


@pytest.mark.parametrize(("model", "least"), [("mlp", 1), ("mlp", 1000), ("llama", 1), ("llama", 20_000)])
def test_parts_together_give_what_the_graph_gives(model: str, least: int) -> None:
    whole = backward_of(model)
    parts = segment(whole, least, sizes_of(whole))
    assert 1 < len(parts) <= PARTS
    torch.manual_seed(0)
    known = {n.meta["key"]: _random(n) for n in whole.graph.nodes if n.op == "placeholder"}
    expected = dict(zip(whole.meta["outputs"], _run(whole, known), strict=True))
    found: dict[str, Any] = {}
    for part in parts:
        found |= dict(zip(part.meta["outputs"], _run(part, known | found), strict=True))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    gradients = [key for part in parts for key in part.meta["outputs"] if key.startswith("grad.")]
    assert sorted(gradients) == sorted(whole.meta["outputs"]), "each in one part"


def test_few_gradients_stay_in_one_part() -> None:
    whole = backward_of("mlp")
    assert segment(whole, 1 << 20, sizes_of(whole)) == [whole]


@pytest.mark.parametrize("model", ["mlp", "gpt", "resnet"])
@pytest.mark.parametrize(
    "options",
    [
        {"dp_shard": 4},
        {"dp_replicate": 2, "dp_shard": 2, "zero": 2},
        {"dp_shard": 4, "zero": 3},
        {"dp_shard": 2, "tp": 2, "zero": 1, "sequence_parallel": True},
        {"dp_shard": 2, "pp": 2, "zero": 1, "microbatches": 2},
    ],
    ids=str,
)
def test_equals_one_device_in_parts(model: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduced part by part, and where they lie however small they are."""
    monkeypatch.setattr(emit, "SEGMENT_BYTES", 64)
    monkeypatch.setattr(homes, "LARGE", 1)
    options = options | {"microbatches": 1} if model == "resnet" else options
    found, wanted = case(model), plan(**options)
    programs = emit_all(found, wanted, shares(found, wanted))
    assert any("backward_part1" in p.graphs for p in programs)
    compare(found, programs, run(found, programs))


class Twice(nn.Module):
    """Two parameters whose gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.first, self.second = nn.Linear(5, 7), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) + self.first + self.second).square().mean()


def test_gradients_that_are_one_tensor_are_each_reduced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import prepare

    monkeypatch.setattr(homes, "LARGE", 1)
    found = prepare(Twice(), {"x": torch.randn(4, 5)})
    programs = emit_all(found, plan(dp_shard=4), [1, 1, 1, 1])
    compare(found, programs, run(found, programs))
    backward = programs[0].graphs["backward"].graph
    fresh = {key for i, (key, _) in enumerate(named_results(backward)) if i in read_outputs(backward).fresh}
    assert not fresh & {"grad.param.first", "grad.param.second"}
    assert read_outputs(backward_of("llama")).fresh, "there are gradients that are reduced where they lie"


class Tied(nn.Module):
    """Both ends use the same parameters, but not in the same way: what each stage's gradients are made of differs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(shape) / 3) for shape in ((9, 9), (9, 9), (9,)))
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ self.a) @ self.b.t() * self.c
        for layer in self.layers:
            h = h + torch.relu(layer(h))
        return (torch.tanh(h @ self.a.t()) @ self.b + self.c).square().mean()


class Odd(nn.Module):
    """Parameters of which ranks have unequal shards, and some that are not sharded at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))
        self.gates = nn.ParameterList(nn.Parameter(torch.randn(())) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = torch.tanh(layer(x)) * gate
        return x.square().mean()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Tied, {"pp": 2}),
        (Tied, {"pp": 2, "dp_shard": 2, "microbatches": 2}),
        (Odd, {"dp_shard": 2, "zero": 3}),
        (Odd, {"dp_replicate": 2, "dp_shard": 2, "zero": 3}),
        (Odd, {"dp_shard": 2, "tp": 2, "zero": 1}),
    ],
    ids=str,
)
def test_ranks_agree_on_what_is_reduced_together(
    model: type[nn.Module], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import prepare

    monkeypatch.setattr(emit, "SEGMENT_BYTES", 64)
    monkeypatch.setattr(homes, "LARGE", 1)
    found, wanted = prepare(model(), {"x": torch.randn(4, 9 if model is Tied else 3)}), plan(**options)
    programs = emit_all(found, wanted, shares(found, wanted))
    compare(found, programs, run(found, programs))


def _random(node: fx.Node) -> Any:
    value = node.meta["val"]
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return made.normal_() if value.is_floating_point() else made.zero_()


def _run(gm: fx.GraphModule, known: dict[str, Any]) -> Any:
    return fx.Interpreter(gm).run(*(known[n.meta["key"]] for n in gm.graph.nodes if n.op == "placeholder"))


def test_parts_are_even_in_what_a_rank_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tp holds copies of some blocks' parameters and shards those of the others, whose gradients are fewer bytes."""
    monkeypatch.setattr(emit, "SEGMENT_BYTES", 64)
    copied = Layouts(byte_price=0.0, mixed=Mixed((0, 1, 2, 3), Layouts(byte_price=1e-3)))
    found, wanted = case("llama", layers=8), replace(plan(2, topology=FAR.resized(devices=8), dp_shard=2, tp=4), layouts=copied)
    made = program(found, wanted)
    tp = {s.name: any("tp" in c.axis.split("+") and "dp" not in c.axis for c in s.cuts) for s in made.parameters}
    blocks = [{cut for name, cut in tp.items() if f"layers.{k}." in name and "proj" in name} for k in (0, 7)]
    assert blocks == [{True}, {False}]
    sizes = []
    for name, spec in made.graphs.items():
        if name.startswith("backward"):
            sizes.append([node_bytes(n) for key, n in named_results(spec.graph) if key.startswith("grad.param.")])
    assert len(sizes) > 2
    total, largest = sum(map(sum, sizes)), max(map(max, sizes))
    assert max(map(sum, sizes)) <= total / PARTS + largest, [*map(sum, sizes)]
