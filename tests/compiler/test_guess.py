"""The guess of a deep model's data ranks: a few layers give the whole's costs, and it is captured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright import Topology, plan
from shardwright.compiler import api, guess
from shardwright.compiler.bind import bind
from shardwright.compiler.candidates import Search
from shardwright.compiler.choose import choose
from shardwright.compiler.emit import Problem
from shardwright.compiler.strategy import resolve

LAYERS, WIDTH, ROWS = guess.DEEP + 12, 64, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    """`first`: a layer of another kind before the others."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


EXAMPLE = {"x": torch.empty(ROWS, 512, WIDTH, device="meta")}


def problem(model: nn.Module, batches: Sequence[int] = (ROWS,)) -> Problem:
    return bind(model, (), EXAMPLE, batches, ("input.x",)).problem


def test_a_few_layers_give_the_costs_of_all() -> None:
    with torch.device("meta"):
        model = Deep()
    with guess.shallow(model) as left_out:
        assert left_out == {"layers": LAYERS - guess.CAPTURED} and len(model.layers) == guess.CAPTURED
        few = problem(model)
    assert len(model.layers) == LAYERS
    deep = guess.deepened(few, left_out)
    assert deep is not None
    deep.graph.graph.lint()
    whole, topology = problem(model), Topology.preset("h100", devices=8)
    facts: dict[str, Any] = {"rows": ROWS, "memory_limit": None, "batch": "local"}
    plans = [choose(p, resolve((8,), "auto"), topology, **facts) for p in (whole, deep)]
    assert plans[0].predicted == plans[1].predicted
    assert plans[0].mesh == plans[1].mesh and [a.name for a in plans[0].alternatives] == [a.name for a in plans[1].alternatives]


def test_a_plan_that_costs_the_same_is_not_searched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the places of the model's own parameters. Layers that do other things are found out."""
    searched: list[Search] = []
    honest = Search.candidates
    monkeypatch.setattr(Search, "candidates", lambda self: searched.append(self) or honest(self))
    strategy, topology = api.Strategy(tp=2), Topology.preset("h100", devices=8)
    with torch.device("meta"):
        model, other = Deep(), Deep()
    other.layers[LAYERS // 2].forward = lambda x: x + other.layers[0].down(torch.relu(other.layers[0].up(x)))  # type: ignore[method-assign]
    found = plan(model, topology, example_inputs=EXAMPLE, strategy=strategy)
    assert len(searched) == 1
    whole = choose(found.problem, resolve((8,), strategy), topology, rows=ROWS, memory_limit=None, batch="local")
    assert replace(found.plan, device="cpu", predicted=None) == replace(whole, predicted=None)
    assert whole.layout.keys() == dict(model.named_parameters()).keys()
    searched.clear()
    plan(other, topology, example_inputs=EXAMPLE, strategy=strategy)
    assert len(searched) == 2


def test_the_model_is_captured_once_at_the_chosen_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory forbids what is most often best, and more tensor parallelism is needed."""
    with torch.device("meta"):
        model = Deep()
    captures: list[tuple[int, int]] = []
    honest = api.bind
    monkeypatch.setattr(
        api,
        "bind",
        lambda m, a, k, batches, *rest, **o: captures.append((len(m.layers), len(batches))) or honest(m, a, k, batches, *rest, **o),
    )
    topology = Topology.preset("h100", devices=8)
    free = plan(model, topology, example_inputs=EXAMPLE, strategy=api.Strategy(pp=1))
    assert free.plan.data_size == 8
    captures.clear()
    assert free.plan.predicted is not None
    tight = plan(
        model, topology, example_inputs=EXAMPLE, strategy=api.Strategy(pp=1), memory_limit=0.25 * free.plan.predicted.peak_bytes
    )
    assert tight.plan.data_size < 8
    assert captures == [(guess.CAPTURED, 8), (LAYERS, tight.plan.data_size)]


def test_models_that_need_their_layers_are_captured_whole() -> None:
    class Indexed(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[LAYERS - 1](x)).square().mean()

    with torch.device("meta"):
        model = Indexed()
    found = plan(model, Topology.preset("h100", devices=4), example_inputs=EXAMPLE)
    assert found.plan.mesh.world_size == 4


def test_unlike_layers_are_left_alone() -> None:
    model = Deep(8)
    model.layers.extend(nn.Linear(WIDTH, WIDTH) for _ in range(guess.DEEP))
    with guess.shallow(model) as left_out:
        assert left_out == {} and len(model.layers) == guess.DEEP + 8
