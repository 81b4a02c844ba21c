"""Layouts over a tensor axis by time: what is found, at what price, and where a plan uses it."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from harness import compare, emit_all, mesh, prepare, problem_of, run
from lockstep_module import double, on_ranks
from programs import FAR, NEAR, case, machine, shares
from torch import Tensor, fx, nn

from shardwright import Strategy, Topology, emit, plan
from shardwright.compiler.cost import Seconds
from shardwright.compiler.emit import emit as emit_rank
from shardwright.compiler.keeping import keeping
from shardwright.compiler.layouts import Layouts, Mixed
from shardwright.compiler.place import Policy
from shardwright.compiler.placed_cost import PlacedCost, placed_cost
from shardwright.compiler.plan import Plan
from shardwright.compiler.tensor_axis import Load, TensorAxis, load_for, policy_of, tensor_placement, totals_prices
from shardwright.compiler.topology import Device, Level
from shardwright.compiler.totals import totals_of
from shardwright.compiler.traffic import received
from shardwright.passes.graph_tools import named_results, op_calls
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.program import Mesh
from shardwright.runtime.sharded import full_tensor

MODELS = ("gpt", "llama", "gpt2", "bert", "t5", "vit", "mixtral", "resnet")


def tensor_axis(model: str, topology: Topology) -> TensorAxis:
    graph = case(model).graph
    calls = op_calls(graph)
    return TensorAxis(graph, case(model).captured.loss, topology, calls, keeping(calls))


def seconds(cost: PlacedCost) -> float:
    """Of a step with the captured batch."""
    return float(totals_prices(Layouts(byte_price=0.0), Load()) @ totals_of(cost))


@pytest.mark.parametrize("topology", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("model", MODELS)
def test_by_time_never_slower_than_megatron(model: str, topology: Topology) -> None:
    tensor = tensor_axis(model, topology)
    free = tensor.cost(4, Layouts(byte_price=0.0), Load())
    megatron = [tensor.cost(4, Layouts(sequence=s), Load()) for s in (False, True)]
    assert seconds(free) <= min(map(seconds, megatron)) * (1 + 1e-9)
    dearer = [tensor.cost(4, Layouts(byte_price=price), Load()) for price in (0.0, 1e-10, 1e-9, 1e-8)]
    assert [c.parameters for c in dearer] == sorted((c.parameters for c in dearer), reverse=True)
    assert [*map(seconds, dearer)] == pytest.approx(sorted(map(seconds, dearer)))


@pytest.mark.parametrize("topology", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_least_is_what_is_priced(model: str, topology: Topology) -> None:
    """The sum that the search minimizes is what the placement takes, at the prices of its totals."""
    tensor = tensor_axis(model, topology)
    priced = Layouts(byte_price=1e-10, stream_price=1e-8, gather_prices=(1e-9, 2e-9), compute_price=0.6)
    at_once = Layouts(byte_price=1e-10, fixed_price=1e-9, large_prices=(3e-8, 1e-8, 2e-9, 1e-9))
    plain = [Layouts(byte_price=0.0), Layouts(byte_price=1e-9), Layouts(byte_price=1e-8, kept_price=1e-8)]
    for layouts, load in itertools.product((*plain, priced, at_once), (Load(), Load(2.0, 4, 0.25))):
        placement, cost = tensor.placement(4, layouts, load), tensor.cost(4, layouts, load)
        assert placement is not None and placement.gap == 0.0
        assert placement.cost == pytest.approx(totals_prices(layouts, load_for(layouts, load)) @ totals_of(cost), rel=1e-9)
        least = tensor.least(4)
        assert 0 < max(cost.large) <= cost.temporaries * (1 + 1e-9)
        assert all(low <= size * (1 + 1e-9) for low, size in zip(least.large, cost.large, strict=True))


@pytest.mark.parametrize("topology", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_that_may_lie_otherwise_take_no_more(model: str, topology: Topology) -> None:
    """Two groups of blocks at one group's prices: what the search minimizes is what the placement takes, and no more than alike."""
    tensor = tensor_axis(model, topology)
    alike = Layouts(byte_price=1e-9, kept_price=1e-9, stream_price=1e-8, compute_price=0.6)
    grouped = replace(alike, mixed=Mixed((1,), alike))
    for load in (Load(), Load(2.0, 4, 0.25)):
        placement, cost = tensor.placement(4, grouped, load), tensor.cost(4, grouped, load)
        assert placement is not None and placement.gap == 0.0
        assert placement.cost == pytest.approx(totals_prices(alike, load) @ totals_of(cost), rel=1e-9)
        assert placement.cost <= tensor.placement(4, alike, load).cost * (1 + 1e-9)  # type: ignore[union-attr]


def test_a_smaller_share_of_the_batch_leaves_parameters_where_they_are() -> None:
    """Samples cut, every gradient has to be summed: worth it for many samples, not for few."""
    tensor = tensor_axis("gpt2", NEAR)

    def sums(share: float, runs: int = 1) -> float:
        return tensor.cost(4, Layouts(byte_price=0.0), Load(share, runs)).sums

    assert sums(64.0) > 10 * sums(1 / 64)
    assert sums(64.0, 64) >= sums(64.0), "a sum is made once a step, for all its micro-batches"


def test_a_micro_batch_is_placed_by_its_own_prices() -> None:
    """Emission places one micro-batch, the search a step of several: it pays as many times the prices of all but parameters."""
    layouts = Layouts(
        byte_price=1e-9, kept_price=2e-9, stream_price=3e-9, gather_prices=(4e-9, 5e-9), fixed_price=6e-9, large_prices=(7e-9,) * 4
    )
    step, one = policy_of(layouts, None, {}, share=0.5, runs=8), policy_of(layouts, None, {}, share=0.5 / 8)

    def prices(policy: Policy) -> list[float]:
        return [policy.kept_price, policy.stream_price, policy.fixed_price, *policy.gather_prices, *policy.large_prices]

    assert prices(step) == pytest.approx([8 * price for price in prices(one)])


def test_time_needs_a_machine() -> None:
    with pytest.raises(ValueError, match="needs the topology"):
        emit_rank(problem_of(case("gpt"), [case("gpt").batch]), Plan(mesh(tp=2), layouts=Layouts(byte_price=0.0)), 0)


def planned(strategy: Strategy, **options: Any) -> Plan:
    model, batch = zoo.MODELS["gpt2"]()
    return plan(model, machine(1e9), example_inputs=batch, strategy=strategy, batch="global", **options).plan


def test_who_pins_the_axis_gets_megatron_s_layouts() -> None:
    assert not planned(Strategy(tp=4)).layouts.any
    assert planned(Strategy(dp=1, pp=1)).layouts.any, "nobody asked for tp"
    assert planned(Strategy(tp=4, layouts="any")).layouts.any
    assert not planned(Strategy(dp=1, pp=1, layouts="megatron")).layouts.any
    assert not planned(Strategy(dp=1, pp=1, sequence_parallel=True)).layouts.any


def test_a_plan_by_time_says_where_parameters_lie_and_survives_json() -> None:
    found = planned(Strategy(tp=4, layouts="any"))
    model, _ = zoo.MODELS["gpt2"]()
    assert set(found.layout) <= {name for name, _ in model.named_parameters()} and found.layout
    assert "any layouts" in found.name
    assert Plan.from_json(found.to_json()) == found
    assert replace(found, layouts=Layouts()).hash != found.hash


def test_less_memory_takes_a_dearer_price() -> None:
    """Whole tables and weights where there is room; shards where there is none."""
    free = planned(Strategy(tp=4, layouts="any"))
    assert free.predicted is not None
    tight = planned(Strategy(tp=4, layouts="any"), memory_limit=0.55 * free.predicted.peak_bytes)
    assert tight.predicted is not None and tight.layouts.byte_price is not None and free.layouts.byte_price is not None
    assert tight.layouts.byte_price > free.layouts.byte_price
    assert tight.predicted.parts["state bytes"] < 0.9 * free.predicted.parts["state bytes"]
    assert tight.predicted.step_seconds > free.predicted.step_seconds


@pytest.mark.parametrize("topology", [machine(1e9), FAR], ids=["one node", "far"])
@pytest.mark.parametrize("model", ["gpt2", "mixtral"])
def test_what_is_kept_has_its_price(model: str, topology: Topology) -> None:
    """The dearer a kept byte, the fewer; and what has no price is kept where that is fastest."""
    tensor = tensor_axis(model, topology)
    costs = [tensor.cost(4, Layouts(byte_price=0.0, kept_price=price), Load()) for price in (0.0, 1e-9, 1e-7, 1e-5)]
    kept, taken = [c.activations for c in costs], [*map(seconds, costs)]
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.8 * kept[0]
    assert taken == pytest.approx(sorted(taken))
    assert kept[-1] < 0.8 * tensor.cost(4, Layouts(sequence=True), Load()).activations, "fewer than sequence parallelism"


def test_where_the_fastest_do_not_fit_fewer_activations_are_kept() -> None:
    model, batch = zoo.MODELS["gpt2"]()

    def found(limit: float | None) -> Plan:
        pins = Strategy(dp=1, pp=1, microbatches=1)
        return plan(model, FAR, example_inputs=batch, strategy=pins, batch="global", memory_limit=limit).plan

    free = found(None)
    assert free.predicted is not None and free.layouts.kept_price == 0.0
    tight = found(0.7 * free.predicted.peak_bytes)
    assert tight.predicted is not None and tight.layouts.kept_price > 0.0
    assert tight.predicted.step_seconds < 1.05 * free.predicted.step_seconds
    assert Plan.from_json(tight.to_json()) == tight
    assert replace(tight, layouts=replace(tight.layouts, kept_price=0.0)).hash != tight.hash


def gathers(gm: fx.GraphModule) -> list[fx.Node]:
    """Of parameters."""
    return [n for n in gm.graph.nodes if "all_gather" in str(n.target) and n.meta.get("parameter")]


def test_a_parameter_gathered_for_an_op_is_not_kept_for_its_backward() -> None:
    """As under ZeRO-3, but over the tensor axis: where samples are many and weights small and dear, these travel."""
    found = case("mlp", batch=256)
    wanted = Plan(mesh(tp=4), layouts=Layouts(byte_price=1e-3), topology=NEAR)
    programs = emit_all(found, wanted, shares(found, wanted))
    forward, backward = programs[0].graphs["forward"], programs[0].graphs["backward"]
    assert gathers(forward.graph) and gathers(backward.graph)
    kept = [n for k, n in named_results(forward.graph) if k.startswith("saved.")]
    assert not any("all_gather" in str(n.target) for n in kept)
    compare(found, programs, run(found, programs))


@pytest.mark.parametrize(("axis", "byte_price"), [("dp_replicate", 0.0), ("dp_shard", 1e-6)])
def test_one_sample_on_one_data_rank(axis: str, byte_price: float) -> None:
    """What it cannot cut, a rank with more must not: the fewest samples decide."""
    slow = Topology(Device("slow", {"float64": 7.75e8}, 1e12, 3.8e11, launch=9e-8), (Level("near", 4, 2.15e9, 4e-7),))
    found = case("t5", batch=3)
    programs = emit_all(found, Plan(mesh(**{axis: 2, "tp": 2}), layouts=Layouts(byte_price=byte_price), topology=slow), [2, 1])
    compare(found, programs, run(found, programs))


@pytest.mark.parametrize("model", ["gpt", "gpt2"])
def test_micro_batches_of_other_sizes(model: str) -> None:
    """Of two samples and of one: their outputs are joined, so they are cut alike."""
    found = case(model, batch=6)
    wanted = Plan(mesh(dp_shard=2, tp=2), layouts=Layouts(byte_price=0.0), topology=NEAR, microbatches=2)
    programs = emit_all(found, wanted, [3, 3])
    compare(found, programs, run(found, programs))


@pytest.mark.parametrize("strategy", [Strategy(tp=2, layouts="any"), Strategy(tp=2, layouts="any", microbatches=2)], ids=str)
def test_outputs_are_whole_again(strategy: Strategy) -> None:
    """Samples of micro-batches stay in order: over tp they are not cut within each."""
    model, batch = double(*zoo.MODELS["gpt"](batch=8))
    wanted = copy.deepcopy(model)(**batch)["logits"].detach()

    def body(parallel: ParallelModule, rank: int) -> Tensor:
        return full_tensor(parallel(**batch)["logits"].detach())

    made = on_ranks(model, strategy, body, example=batch, world_size=2, batch="global", outputs="all", topology=NEAR)
    for logits in made:
        assert torch.allclose(logits, wanted, rtol=0, atol=1e-12)


class Penalized(nn.Module):
    """The head's weight is used before the blocks, sharded, and after them, gathered beside another parameter."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)) for _ in range(3)
        )
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        penalty = self.head.weight.square().sum()
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.mse_loss(self.head(x), y) + 1e-3 * penalty


def test_gathers_over_two_axes() -> None:
    """Of ZeRO-3, and over tp of what that gathered: those of a block are merged, whatever the order they were made in."""
    torch.manual_seed(0)
    found = prepare(Penalized(), {"x": torch.randn(256, 16), "y": torch.randn(256, 16)})
    slow = Topology(Device("slow", {"float64": 1e9}, 1e12, 1e9, launch=1e-9), (Level("near", 4, 1e9, 1e-9),))
    programs = emit_all(found, Plan(mesh(dp_shard=2, tp=2), zero=3, layouts=Layouts(byte_price=1e-3), topology=slow), [128, 128])
    assert any(n.args[1] == "tp" for n in gathers(programs[0].graphs["forward"].graph))
    compare(found, programs, run(found, programs))


def test_a_cast_of_a_parameter_is_one() -> None:
    """In half precision it is the cast that is gathered: again for the backward, at a price that does not grow with the batch."""
    model, batch = zoo.MODELS["mlp"](batch=256)
    strategy = Strategy(dp=2, tp=2, zero=0, layouts="any")
    options: dict[str, Any] = {"example_inputs": batch, "strategy": strategy, "batch": "global", "precision": torch.bfloat16}
    found = plan(model, NEAR, **options)
    graph, calls = found.problem.graph, op_calls(found.problem.graph)
    dear = Layouts(byte_price=1e-3)
    placement = tensor_placement(graph, found.problem.loss, 2, dear, Seconds(NEAR, Mesh(("tp",), (2,))), calls)
    cost = placed_cost(graph, Seconds(NEAR, Mesh(("tp",), (2,))), placement, calls)
    assert cost.gathers > 0 and cost.gathered > 0
    program = emit(replace(found, plan=replace(found.plan, layouts=dear, layout={})), 0)
    values = [n.meta["val"] for n in gathers(program.graphs["backward"].graph)]
    whole = [t for value in values for t in (value if isinstance(value, (tuple, list)) else (value,))]
    assert whole and {t.dtype for t in whole} == {torch.bfloat16}
    counted = Counter[str]()
    for axis, size in received(program).items():
        counted[axis] += size
    predicted = cost.received / 2 + cost.received_gathers + cost.received_once
    assert predicted == pytest.approx(counted["tp"], rel=0.05)
