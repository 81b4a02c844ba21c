"""What a plan is predicted to hold: nothing but itself of a frozen parameter; in a stage no less than the largest parameter."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from shardwright import Strategy, Topology, emit, plan
from shardwright.compiler.choose import DoesNotFit
from shardwright.compiler.memory import program_memory
from shardwright.compiler.plan import Plan
from shardwright.passes.segment import PARTS


class Tables(nn.Module):
    """A large table and a large head around small layers."""

    def __init__(self, rows: int = 5000, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, rows, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.table(x)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return nn.functional.cross_entropy(self.head(hidden), y)


def held(model: nn.Module, rank: int, strategy: Strategy, **options: Any) -> tuple[float, float]:
    """Bytes of state that the plan predicts, and those counted in the program of a rank."""
    example = {"x": torch.randint(9, (4,)), "y": torch.randint(9, (4,))}
    made = plan(model, Topology.preset("cpu", devices=4), example_inputs=example, strategy=strategy, device="cpu", **options)
    assert made.plan.predicted is not None
    memory = program_memory(emit(made, rank))
    gradients = sum(s.dtype.itemsize * torch.Size(s.shape).numel() for s in emit(made, rank).parameters if s.trainable)
    return made.plan.predicted.parts["state bytes"], memory.parameters + memory.optimizer + gradients


def test_frozen_parameters_have_no_gradients() -> None:
    model = Tables()
    model.table.weight.requires_grad_(False)
    predicted, counted = held(model, 0, Strategy(dp=4, tp=1, pp=1, zero=0))
    assert abs(predicted - counted) < 0.01 * counted


def test_the_stage_of_the_largest_parameter() -> None:
    predicted, counted = held(Tables(), 0, Strategy(dp=1, tp=1, pp=4, microbatches=2))
    assert abs(predicted - counted) < 0.1 * counted


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_peak_is_that_of_the_program(zero: Any, microbatches: int) -> None:
    """Under ZeRO-1 and 2 with the gradients that are whole until they are scattered, under 3 with the parameters that are gathered
    and their gradients."""
    example = {"x": torch.randint(9, (4,)), "y": torch.randint(9, (4,))}
    strategy = Strategy(dp=4, tp=1, pp=1, zero=zero, microbatches=microbatches)
    made = plan(Tables(), Topology.preset("cpu", devices=4), example_inputs=example, strategy=strategy, device="cpu")
    assert made.plan.predicted is not None
    assert made.plan.predicted.peak_bytes == pytest.approx(program_memory(emit(made, 0)).peak, rel=0.05)


class LanguageModel(nn.Module):
    """A table of 50 MB, its head, perhaps the same, and layers of 1 MB."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(25_000, 512)
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(8))
        self.head = nn.Linear(512, 25_000, bias=False)
        if tied:
            self.head.weight = self.table.weight

    forward = Tables.forward


def language_model(tied: bool, strategy: Strategy, rows: int = 4, **options: Any) -> Any:
    with torch.device("meta"):
        model = LanguageModel(tied)
    example = {name: torch.zeros(rows, dtype=torch.int64) for name in ("x", "y")}
    topology = Topology.preset("h100", devices=4)
    return plan(model, topology, example_inputs=example, strategy=strategy, device="cpu", **options)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_the_peak_with_parameters_larger_than_a_bucket(tied: bool, zero: Any) -> None:
    """They are gathered, made and scattered whole; of a tied one the gradient of one use waits for that of the other."""
    made = language_model(tied, Strategy(dp=4, tp=1, pp=1, zero=zero))
    counted = program_memory(emit(made, 0)).peak
    assert 0.95 * counted <= made.plan.predicted.peak_bytes <= 1.2 * counted


class LongLoss(nn.Module):
    """Logits that are larger than all else, as numbers of another type or as they are; returned beside the loss, or not."""

    def __init__(self, wide: bool, shown: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 4096)
        self.wide, self.shown = wide, shown

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.head(self.table(x))
        loss = nn.functional.cross_entropy(logits.float() if self.wide else logits, y)
        return (loss, logits) if self.shown else loss


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_the_peak_where_the_loss_is_largest(wide: bool, shown: bool) -> None:
    """Its gradient is written over the logits, unless someone sees them."""
    with torch.device("meta"):
        model = LongLoss(wide, shown).to(torch.bfloat16 if wide else torch.float32)
    example = {name: torch.zeros(512, dtype=torch.int64) for name in ("x", "y")}
    topology = Topology.preset("h100", devices=2)
    made = plan(model, topology, example_inputs=example, strategy=Strategy(dp=2, tp=1, pp=1, zero=0), device="cpu")
    counted = program_memory(emit(made, 0)).peak
    assert 0.95 * counted <= made.plan.predicted.peak_bytes <= 1.1 * counted


def test_the_peak_where_the_backward_is_not_cut() -> None:
    """Ranks of other batches run other graphs: one sum at the end."""
    even, uneven = (language_model(False, Strategy(dp=4, tp=1, pp=1, zero=2), rows, batch="global") for rows in (8, 6))
    assert uneven.plan.predicted.peak_bytes > 1.05 * even.plan.predicted.peak_bytes
    assert uneven.plan.predicted.peak_bytes >= 0.95 * program_memory(emit(uneven, 0)).peak


def test_small_blocks_are_kept_whole_where_a_large_one_does_not_fit() -> None:
    pinned = Strategy(dp_shard=4, dp_replicate=1, tp=1, pp=1)
    least = language_model(False, replace(pinned, zero=3)).plan.predicted.peak_bytes
    found = language_model(False, pinned, memory_limit=1.2 * least).plan
    assert any(name.startswith("layers.") for name in found.whole) and "head.weight" not in found.whole


def test_blocks_are_kept_whole_beside_a_tied_table() -> None:
    """Its gradient waits for the other use once, whatever is kept."""
    pinned = Strategy(dp_shard=4, dp_replicate=1, tp=1, pp=1)
    least = language_model(True, replace(pinned, zero=3)).plan.predicted.peak_bytes
    found = language_model(True, pinned, memory_limit=1.2 * least)
    assert found.plan.whole
    counted = program_memory(emit(found, 0)).peak
    assert 0.95 * counted <= found.plan.predicted.peak_bytes <= 1.1 * counted


class Layers(nn.Module):
    """A small table and layers, of half a megabyte in all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.table(x)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return nn.functional.cross_entropy(hidden, y)


def test_zero_3_keeps_whole_what_memory_is_left_for() -> None:
    example = {"x": torch.randint(9, (4,)), "y": torch.randint(9, (4,))}

    def chosen(limit: float | None = None, zero: Any = None) -> Any:
        strategy = Strategy(dp_shard=4, dp_replicate=1, tp=1, pp=1, zero=zero)
        return plan(
            Layers(),
            Topology.preset("h100", devices=4),
            example_inputs=example,
            strategy=strategy,
            memory_limit=limit,
            device="cpu",
        )

    least, most = (chosen(zero=zero).plan.predicted for zero in (3, 2))
    assert chosen().plan.zero < 3, "there is room for all"
    counts = []
    for room in (0.1, 0.4, 0.7):
        limit = least.peak_bytes + room * (most.peak_bytes - least.peak_bytes)
        found = chosen(limit)
        assert found.plan.zero == 3 and found.plan.predicted.peak_bytes <= limit
        assert found.plan.predicted.step_seconds <= least.step_seconds
        counted = program_memory(emit(found, 0)).peak  # a bucket holds all of this model: packed, it counts twice
        assert 0.98 * counted <= found.plan.predicted.peak_bytes <= 1.4 * counted
        counts.append(len(found.plan.whole))
        assert Plan.from_json(found.plan.to_json()).whole == found.plan.whole
    assert 0 < counts[1] < counts[2] < len(list(Layers().parameters()))
    assert "whole" in found.plan.name and "ZeRO-2" in found.plan.explain(found.plan.whole[0])


class Pairs(nn.Module):
    """Blocks of two weights, equally large."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x.square().mean()


def test_zero_3_keeps_one_parameter_of_a_block_whole_and_gathers_the_other() -> None:
    def chosen(limit: float | None, zero: Any = None) -> Any:
        strategy = Strategy(dp_shard=4, dp_replicate=1, tp=1, pp=1, zero=zero)
        example, topology = {"x": torch.randn(4, 128)}, Topology.preset("h100", devices=4)
        return plan(Pairs(), topology, example_inputs=example, strategy=strategy, memory_limit=limit, device="cpu")

    least, most = (chosen(None, zero).plan.predicted.peak_bytes for zero in (3, 2))
    found = [chosen(least + room * (most - least)) for room in (0.3, 0.35, 0.4, 0.45, 0.5)]
    counts = [len(made.plan.whole) for made in found]
    assert counts == sorted(counts) and {count % 2 for count in counts} == {0, 1}, counts
    halved = next(made for made in found if len(made.plan.whole) % 2)
    blocks = Counter(name.split(".")[1] for name in halved.plan.whole)
    assert sorted(blocks.values())[:2] in ([1], [1, 2]), "the parameters of one block after those of another"
    assert halved.plan.predicted.peak_bytes >= 0.98 * program_memory(emit(halved, 0)).peak


class Scaled(nn.Module):
    """Nowhere as narrow as most of its values are, which are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.scale = nn.Linear(8, 8, bias=False), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.wide(x) * self.scale.tanh().exp().sin()).sum()


class Summed(nn.Module):
    """One op, and no input that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.sum()


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("make", [Scaled, Summed, lambda: Scaled().requires_grad_(False)], ids=["scaled", "one op", "frozen"])
def test_models_that_are_narrow_nowhere_are_planned(make: Any, zero: int | None) -> None:
    strategy = Strategy(dp_shard=2, dp_replicate=1, tp=1, pp=1, zero=zero) if zero else Strategy()
    example, topology = {"x": torch.randn(8, 8)}, Topology.preset("h100", devices=2)
    made = plan(make(), topology, example_inputs=example, strategy=strategy, device="cpu")
    assert emit(made, 1).graphs


def test_a_parameter_that_no_op_uses_has_no_optimizer_state() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.layer = nn.Parameter(torch.randn(256, 256)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().mean()

    example, topology = {"x": torch.randn(8, 8)}, Topology.preset("h100", devices=2)
    made = plan(Idle(), topology, example_inputs=example, strategy=Strategy(dp=2, zero=0), device="cpu")
    counted = program_memory(emit(made, 0))
    assert counted.optimizer == 2 * 4 * (8 * 8 + 8)
    assert made.plan.predicted.peak_bytes == pytest.approx(counted.peak, rel=0.1)


def test_blocks_of_every_stage_are_kept_whole() -> None:
    example = {"x": torch.randint(9, (8,)), "y": torch.randint(9, (8,))}

    def chosen(limit: float | None, zero: Any = None) -> Any:
        return plan(
            Layers(),
            Topology.preset("h100", devices=4),
            example_inputs=example,
            strategy=Strategy(dp_shard=2, dp_replicate=1, tp=1, pp=2, microbatches=2, zero=zero),
            memory_limit=limit,
            device="cpu",
        )

    least, most = (chosen(None, zero).plan.predicted for zero in (3, 2))
    found = chosen(least.peak_bytes + 0.6 * (most.peak_bytes - least.peak_bytes))
    stages = [found.plan.stage_of[name] for name in found.plan.whole]
    assert found.plan.zero == 3 and abs(stages.count(0) - stages.count(1)) <= 2 and set(stages) == {0, 1}
    counted = max(program_memory(emit(found, rank)).peak for rank in (0, 2))
    assert 0.9 * counted <= found.plan.predicted.peak_bytes <= 1.4 * counted
    assert found.plan.predicted.step_seconds < least.step_seconds


def test_micro_batches_where_memory_asks_for_them() -> None:
    """As few as fit; none where the parameters alone do not."""
    example = {"x": torch.randint(9, (256,)), "y": torch.randint(9, (256,))}

    def chosen(limit: float | None) -> Any:
        options = {"memory_limit": limit, "device": "cpu"}
        return plan(Layers(), Topology.preset("cpu", devices=1), example_inputs=example, mesh=(1,), **options)

    most = chosen(None).plan
    assert most.microbatches == 1
    state = most.predicted.parts["state bytes"]
    found = [chosen(state + room * (most.predicted.peak_bytes - state)) for room in (0.6, 0.3)]
    assert [made.plan.microbatches for made in found] == [2, 4]
    assert "4 micro-batches" in found[1].plan.name
    for made in found:
        # The sums that the backward rebuilds all stand at its start, which the prediction does not know.
        assert made.plan.predicted.peak_bytes == pytest.approx(program_memory(emit(made, 0)).peak, rel=0.15)
    with pytest.raises(DoesNotFit):
        chosen(0.9 * state)


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(tp=2, layouts="any")], ids=["auto", "tp"])
def test_what_is_said_to_fit_fits(strategy: Strategy) -> None:
    """The memory that is named where nothing fits is that of a plan: with as much one is found."""
    options = {"example_inputs": {"x": torch.randint(9, (16,)), "y": torch.randint(9, (16,))}, "strategy": strategy}

    def named(limit: float) -> int:
        with pytest.raises(DoesNotFit) as refused:
            plan(Tables(), Topology.preset("h100", devices=4), memory_limit=limit, **options)
        return int(re.findall(r"memory_limit=(\d+)", str(refused.value))[0])

    least = named(0.0)
    assert least > 0
    found = plan(Tables(), Topology.preset("h100", devices=4), memory_limit=least, **options).plan.predicted
    assert found is not None and found.peak_bytes <= least
    assert named(0.9 * least) >= 0.9 * least


def data_seconds(overlap: float, zero: Any) -> tuple[float, float]:
    """Seconds that a plan predicts for traffic over the data axes, and for compute."""
    with torch.device("meta"):
        model = Tables(rows=300_000)  # gradients of 150 MB: a backward in several parts
    topology = replace(Topology.preset("h100", devices=4), overlap={"data": overlap})
    example = {"x": torch.zeros(512, dtype=torch.int64), "y": torch.zeros(512, dtype=torch.int64)}
    found = plan(model, topology, example_inputs=example, strategy=Strategy(dp=4, tp=1, pp=1, zero=zero)).plan.predicted
    assert found is not None
    return found.parts["data"], found.parts["compute"]


@pytest.mark.parametrize("zero", [0, 2])
def test_sums_beside_the_backward_take_no_time_of_their_own(zero: int) -> None:
    """No more of them than the backward hides, and never the last part's."""
    exposed, compute = data_seconds(0.0, zero)
    half, _ = data_seconds(0.5, zero)
    least, _ = data_seconds(1.0, zero)
    assert exposed - half == pytest.approx(half - least)
    assert 0 < exposed - least <= min(exposed, compute * 2 / 3) * (PARTS - 1) / PARTS * 1.001


def test_what_zero_3_scatters_in_its_graphs_is_waited_for() -> None:
    assert data_seconds(1.0, 3) == data_seconds(0.0, 3)


def test_a_pinned_zero_3_shards_over_all_data_ranks() -> None:
    """Two replicas of two shards would gather less, and hold twice as much."""
    made = language_model(False, Strategy(dp=4, tp=1, pp=1, zero=3))
    assert made.plan.mesh.size("dp_shard") == 4


@pytest.mark.parametrize(
    ("rows", "limit", "strategy", "kinds"),
    [
        (64, 11_000, Strategy(dp=4, zero=0), {"strategy"}),
        (4096, 60_000, Strategy(dp=4, tp=1, pp=1, microbatches=1), {"rows"}),
        (4, 4000, None, {"devices"}),
    ],
    ids=["pins", "rows", "devices"],
)
def test_each_change_that_is_proposed_fits(rows: int, limit: int, strategy: Strategy | None, kinds: set[str]) -> None:
    model, _ = zoo.MODELS["mlp"]()

    def planned(rows: int = rows, devices: int = 4, memory_limit: float = limit, strategy: Strategy | None = strategy) -> float:
        example = zoo.MODELS["mlp"](batch=rows)[1]
        topology = Topology.preset("h100", devices=devices)
        found = plan(
            model, topology, example_inputs=example, strategy=strategy or "auto", memory_limit=memory_limit, batch="global"
        )
        assert found.plan.predicted is not None
        return found.plan.predicted.peak_bytes

    with pytest.raises(DoesNotFit) as refused:
        planned()
    seen = set()
    for change in refused.value.changes:
        changed = {k: getattr(change, k) for k in ("rows", "devices", "memory_limit", "strategy")}
        changed = {k: v for k, v in changed.items() if v is not None}
        assert planned(**changed) <= (change.memory_limit or limit)
        seen |= changed.keys()
        assert change.text in str(refused.value)
    assert seen >= {"memory_limit", *kinds}


def test_more_devices_of_a_machine_that_has_them() -> None:
    """Of eight, of which the mesh takes four, or three."""
    model, example = zoo.MODELS["mlp"](batch=24)
    for devices in (4, 3):
        with pytest.raises(DoesNotFit) as refused:
            plan(
                model,
                Topology.preset("h100", devices=8),
                example_inputs=example,
                mesh=(devices,),
                memory_limit=2000,
                batch="global",
            )
        assert "memory_limit=" in str(refused.value)
