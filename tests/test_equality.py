"""Every model under every strategy: loss, every gradient and their norm are those of one device, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import zoo
from harness import Case, compare, emit_all, mesh, prepare, problem_of, run
from programs import FAR, NEAR
from properties import pairs
from torch import Tensor, nn

from shardwright.compiler.choose import choose
from shardwright.compiler.gathers import gather_groups
from shardwright.compiler.layouts import Layouts, Mixed
from shardwright.compiler.plan import Plan
from shardwright.compiler.strategy import Strategy, resolve
from shardwright.compiler.topology import Topology
from shardwright.passes.differentiate import Templates
from shardwright.passes.graph_tools import Values
from shardwright.passes.types import balanced_sizes

M2, M4 = {"microbatches": 2}, {"microbatches": 4}
STRATEGIES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp4": ({"dp_shard": 4}, {}),
    "hsdp": ({"dp_replicate": 2, "dp_shard": 2}, {"zero": 3}),
    "zero1": ({"dp_shard": 4}, {"zero": 1}),
    "zero2": ({"dp_shard": 4}, {"zero": 2}),
    "zero3": ({"dp_shard": 4}, {"zero": 3}),
    "tp4": ({"tp": 4}, {}),
    "sp4": ({"tp": 4}, {"layouts": Layouts(sequence=True)}),
    "dp2tp2": ({"dp_shard": 2, "tp": 2}, {}),
    "zero3tp2": ({"dp_shard": 2, "tp": 2}, {"zero": 3}),
    "pp2": ({"pp": 2}, M2),
    "pp4": ({"pp": 4}, M4),
    "gpipe": ({"pp": 2, "dp_shard": 2}, {"schedule": "gpipe", **M2}),
    "dp2pp2": ({"pp": 2, "dp_shard": 2}, M2),
    "tp2pp2": ({"pp": 2, "tp": 2}, M2),
    "sp2pp2": ({"pp": 2, "tp": 2}, {"layouts": Layouts(sequence=True), "microbatches": 3}),
    "dp2tp2pp2": ({"pp": 2, "dp_shard": 2, "tp": 2}, M2),
    "zero3pp2": ({"pp": 2, "dp_shard": 2}, {"zero": 3, **M2}),
    "zero3tp2pp2": ({"pp": 2, "dp_shard": 2, "tp": 2}, {"zero": 3, **M2}),
}
MODELS = ("mlp", "gpt", "llama", "gpt2", "bert", "t5", "vit", "mixtral", "resnet")
COUPLED = ("resnet",)
"""Models whose samples see each other: one micro-batch."""

WHOLE = ("mlp", "gpt", "llama")
"""Models that are run under all strategies; the others each under half."""

TEMPLATES = Templates(Values())


@cache
def case_of(model: str, **options: Any) -> Case:
    return prepare(*zoo.MODELS[model](**options))


def check(case: Case, plan: Plan) -> None:
    programs = emit_all(case, plan, balanced_sizes(case.batch, plan.data_size), TEMPLATES)
    compare(case, programs, run(case, programs))


def test_values_that_cross_stages_transposed() -> None:
    """A query that crosses lies in memory as its transpose: attention's result follows it, and what views that."""
    found, wanted = prepare(*zoo.MODELS["t5"](layers=4)), Plan(mesh(pp=2), microbatches=2)
    programs = emit_all(found, wanted, [found.batch], TEMPLATES)
    entries = [n for g in programs[1].graphs.values() for n in g.graph.graph.nodes if n.op == "placeholder"]
    received = [n.meta["val"] for n in entries if n.meta["key"].startswith(("act.", "grad.act."))]
    assert received and all(value.is_contiguous() for value in received)
    compare(found, programs, run(found, programs))


@pytest.mark.parametrize(("model", "strategy"), pairs(MODELS, list(STRATEGIES), WHOLE))
def test_equals_one_device(model: str, strategy: str) -> None:
    axes, options = STRATEGIES[strategy]
    if model in COUPLED and "microbatches" in options:
        options = {**options, "microbatches": 1}
    check(case_of(model), Plan(mesh(**axes), **options))


@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}], ids=["dp2", "tp2", "dp2tp2"])
def test_an_lstm_equals_one_device(axes: dict[str, int]) -> None:
    """Captured as its cells, whose batch stays cut over the data axis: no activation is gathered."""
    case, plan = case_of("lstm"), Plan(mesh(**axes))
    assert "mkldnn_rnn_layer" not in str(case.graph.graph)
    programs = emit_all(case, plan, balanced_sizes(case.batch, plan.data_size), TEMPLATES)
    if "tp" not in axes:
        calls = [n for g in programs[0].graphs.values() for n in g.graph.graph.nodes if n.op == "call_function"]
        assert not [n for n in calls if "all_gather" in str(n.target)]
    compare(case, programs, run(case, programs))


@pytest.mark.parametrize("strategy", ["hsdp", "zero3tp2", "zero3pp2"])
@pytest.mark.parametrize("model", MODELS)
def test_equals_one_device_with_parameters_kept_whole(model: str, strategy: str) -> None:
    """Under ZeRO-3 the parameters of every second group, and every second one of the others, are gathered once a step, of two
    micro-batches where there are samples."""
    axes, options = STRATEGIES[strategy]
    case = case_of(model)
    names = tuple(p.name for k, group in enumerate(gather_groups(case.graph)) for p in group.parts[:: 1 + k % 2])
    times = 2 if strategy in ("zero3tp2", "zero3pp2") and model not in COUPLED else 1
    plan = Plan(mesh(**axes), whole=names, **{**options, "microbatches": times})
    programs = emit_all(case, plan, balanced_sizes(case.batch, plan.data_size), TEMPLATES)
    for spec in programs[0].parameters:
        sharded, gathered = (
            any("dp_shard" in axis.split("+") for axis in axes) for axes in ([cut.axis for cut in spec.cuts], spec.gathered)
        )
        assert gathered == (sharded and spec.name in names)
    compare(case, programs, run(case, programs))


BY_TIME = [("tp4", NEAR, 0.0, 0.0), ("zero3tp2", NEAR, 1e-6, 0.0), ("tp2pp2", FAR, 0.0, 1e-7)]


@pytest.mark.parametrize(("strategy", "topology", "byte_price", "kept_price"), BY_TIME, ids=[row[0] for row in BY_TIME])
@pytest.mark.parametrize("model", MODELS)
def test_equals_one_device_in_any_layouts(
    model: str, strategy: str, topology: Topology, byte_price: float, kept_price: float
) -> None:
    """Placed by time: by what is near or far, and by the prices of bytes, values lie in most ways there are."""
    axes, options = STRATEGIES[strategy]
    if model in COUPLED and "microbatches" in options:
        options = {**options, "microbatches": 1}
    layouts = Layouts(byte_price=byte_price, kept_price=kept_price)
    check(case_of(model), Plan(mesh(**axes), layouts=layouts, topology=topology, **options))


MIXED = [
    ("tp4", NEAR, Mixed((0,), Layouts(byte_price=1e-3))),
    ("zero3tp2", FAR, Mixed((1, 2), Layouts(byte_price=0.0, kept_price=1e-5))),
]


@pytest.mark.parametrize(("strategy", "topology", "mixed"), MIXED, ids=[row[0] for row in MIXED])
@pytest.mark.parametrize("model", [m for m in MODELS if m not in COUPLED])
def test_equals_one_device_with_blocks_in_other_layouts(model: str, strategy: str, topology: Topology, mixed: Mixed) -> None:
    axes, options = STRATEGIES[strategy]
    layouts = Layouts(byte_price=1e-9, mixed=mixed)
    check(case_of(model, layers=4), Plan(mesh(**axes), layouts=layouts, topology=topology, **options))


class FrozenScale(nn.Module):
    """A frozen parameter that meets no input: its product is computed once a step, before the micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(12, 12), nn.Parameter(torch.randn(12), requires_grad=False)
        self.register_buffer("offset", torch.randn(12))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.linear(x + self.offset * self.scale), y)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_frozen_parameter_before_the_micro_batches(zero: int) -> None:
    torch.manual_seed(0)
    case = prepare(FrozenScale(), {"x": torch.randn(4, 12), "y": torch.randn(4, 12)})
    check(case, Plan(mesh(dp_shard=2), zero=zero, microbatches=2))


WITH_DROPOUT = [m for m in MODELS if m not in COUPLED]
MIXES = ["sp4", "zero3tp2", "dp2tp2pp2"]


@pytest.mark.parametrize(
    ("model", "strategy"), [(m, s) for i, m in enumerate(WITH_DROPOUT) for k, s in enumerate(MIXES) if (i + k) % 3]
)
def test_equals_one_device_with_dropout(model: str, strategy: str) -> None:
    """Four layers: repeated ones share every decision, and no number that they draw. Two mixes for each model."""
    axes, options = STRATEGIES[strategy]
    check(case_of(model, layers=4, dropout=0.2), Plan(mesh(**axes), **options))


@pytest.mark.parametrize("model", MODELS)
def test_the_chosen_plan_equals_one_device(model: str) -> None:
    case = case_of(model)
    problem = problem_of(case, [case.batch])
    plan = choose(
        problem,
        resolve("auto", Strategy(), 4),
        Topology.preset("cpu", devices=4),
        rows=case.batch,
        memory_limit=None,
        batch="global",
    )
    check(case, plan)
