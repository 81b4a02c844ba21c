"""The collectives of emitted programs are those of the published schemes, and no others.

Tensor parallelism: Shoeybi et al. 2019, "Megatron-LM", section 3 (two all-reduces a layer each way). Sequence parallelism:
Korthikanti et al. 2022, section 4.2.2 (an all-gather and a reduce-scatter for each of them). ZeRO: Rajbhandari et al. 2020,
section 7 (reduce-scatter and all-gather of all parameters; stage 3 gathers them once more for the backward).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
from harness import problem_of
from programs import NEAR, case, lowered, plan, program, shares
from zoo import BATCH, LENGTH

from shardwright.compiler.choose import choose
from shardwright.compiler.cost import op_flops
from shardwright.compiler.emit import emit
from shardwright.compiler.layout import with_layout
from shardwright.compiler.strategy import Strategy, resolve
from shardwright.compiler.topology import Topology
from shardwright.compiler.traffic import Collective, graph_collectives, received, traffic
from shardwright.passes.graph_tools import op_call
from shardwright.passes.ops.collectives import join_shards, take_shard
from shardwright.passes.types import Sections, Varying

LAYERS, WIDTH, RANKS = 2, 32, 4
ACTIVATION = 8.0 * BATCH * LENGTH * WIDTH
"""Bytes of b*s*h in float64."""
SMALL = 8 * BATCH * LENGTH * RANKS
"""Less than one number a token and rank: what the loss exchanges (token counts, and with a sharded vocabulary its log-sum-exp)."""


@cache
def llama_traffic(**options: int) -> list[Collective]:
    return traffic(program(case("llama", layers=LAYERS, num_key_value_heads=4), plan(**options)))


def large(found: Iterable[Collective]) -> list[Collective]:
    return [c for c in found if c.size > SMALL]


def count(found: Iterable[Collective]) -> Counter[tuple[str, str, float]]:
    return Counter((c.phase, c.kind, c.size) for c in found)


def parameter_bytes(prefix: str = "") -> float:
    state = case("llama", layers=LAYERS, num_key_value_heads=4).state
    return float(sum(8 * v.numel() for k, v in state.items() if k.startswith(f"param.{prefix}")))


@pytest.mark.parametrize("sections", [((2, 1),), ((1, 1), (1, 0))], ids=str)
def test_joined_shards_are_contiguous(sections: Sections) -> None:
    """Also where torch.cat would keep the shards' memory format: what follows was traced as a view of a contiguous value."""
    whole = torch.randn(2, 4, 5, 3)
    parts = [take_shard(whole, 3, sections, rank).contiguous(memory_format=torch.channels_last) for rank in range(2)]
    joined = join_shards(parts, 3, sections)
    assert joined.is_contiguous() and torch.equal(joined, whole)


def test_tensor_parallel_layer_has_two_all_reduces_each_way() -> None:
    found = llama_traffic(tp=RANKS)
    for block in range(LAYERS):
        assert count(c for c in found if c.block == block) == {
            ("forward", "all_reduce", ACTIVATION): 2,
            ("backward", "all_reduce", ACTIVATION): 2,
        }
    rest = count(large(c for c in found if c.block is None))
    # The embedding's sum, and the gradient of what enters the head.
    assert rest == {("forward", "all_reduce", ACTIVATION): 1, ("backward", "all_reduce", ACTIVATION): 1}


def test_sequence_parallel_has_the_same_volume_in_gathers_and_scatters() -> None:
    found = llama_traffic(tp=RANKS, sequence_parallel=True)
    for block in range(LAYERS):
        assert count(c for c in found if c.block == block) == {
            (phase, kind, ACTIVATION): 2 for phase in ("forward", "backward") for kind in ("all_gather", "reduce_scatter")
        }
    (reduction,) = [c for c in found if c.phase == "schedule"]
    norms = 2 * LAYERS + 1
    assert (reduction.kind, reduction.axis, reduction.size) == ("all_reduce", "tp", 8.0 * WIDTH * norms)


def test_vocabulary_parallel_loss_exchanges_numbers_per_token_only() -> None:
    found = [c for c in llama_traffic(tp=RANKS) if c.block is None and c.size <= SMALL]
    assert count(found) == {
        ("forward", "all_gather", 8.0 * BATCH * LENGTH * RANKS): 1,  # the ranks' log-sum-exps
        ("forward", "all_reduce", 8.0 * BATCH * LENGTH): 1,  # the logits at the labels
    }


@pytest.mark.parametrize("axes", [{"dp_shard": RANKS}, {"dp_replicate": 2, "dp_shard": 2}], ids=["dp", "hsdp"])
def test_data_parallel_reduces_each_bucket_once(axes: dict[str, int]) -> None:
    found = llama_traffic(**axes)
    assert count(large(found)) == {("schedule", "all_reduce", parameter_bytes()): 1}
    assert {c.axis for c in large(found)} == {"+".join(axes)}
    loss, *tokens = [c for c in reversed(found) if c.size <= SMALL]
    assert (loss.phase, loss.kind, loss.size) == ("schedule", "all_reduce", 8.0)
    assert {c.phase for c in tokens} == {"forward"}, "labels are counted over the global batch"


@pytest.mark.parametrize("pp", [1, 2])
def test_the_loss_is_summed_while_backwards_go_on(pp: int) -> None:
    """After the last forward of the stage that makes it."""
    wanted = plan(dp_shard=2, pp=pp, microbatches=2) if pp > 1 else plan(dp_shard=2, microbatches=2)
    found = program(case("llama", layers=LAYERS, num_key_value_heads=4), wanted, rank=wanted.mesh.world_size - 1)
    steps = [i for i in found.schedule if i.kind in ("run", "all_reduce")]
    (at,) = [k for k, i in enumerate(steps) if i.kind == "all_reduce" and i.keys[0].startswith("out.")]
    before, after = steps[at - 1], steps[at + 1]
    assert before.graph.startswith("forward") and after.graph.startswith("backward")
    assert not any(i.graph.startswith("forward") for i in steps[at:])


def test_data_parallel_graphs_communicate_nothing() -> None:
    """Where the loss is a mean over a number known beforehand."""
    found = traffic(program(case("mlp"), plan(dp_shard=RANKS)))
    assert {c.phase for c in found} == {"schedule"} and len(found) == 2


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_gathers_and_scatters_each_bucket_once(zero: int) -> None:
    found = large(llama_traffic(dp_shard=RANKS, zero=zero))
    assert count(found) == {
        ("schedule", "all_gather", parameter_bytes()): 1,
        ("schedule", "reduce_scatter", parameter_bytes()): 1,
    }


def test_zero_3_gathers_each_block_twice_and_scatters_it_once() -> None:
    found = llama_traffic(dp_shard=RANKS, zero=3)
    for block in range(LAYERS):
        size = parameter_bytes(f"model.layers.{block}.")
        assert count(c for c in found if c.block == block) == {
            ("forward", "all_gather", size): 1,
            ("backward", "all_gather", size): 1,
            ("backward", "reduce_scatter", size): 1,
        }
    moved = Counter()
    for c in large(found):
        moved[c.phase, c.kind] += c.size
    everything = parameter_bytes()
    embedding = parameter_bytes("model.embed_tokens.")  # its backward needs no row of it
    assert moved == {
        ("forward", "all_gather"): everything,
        ("backward", "all_gather"): everything - embedding,
        ("backward", "reduce_scatter"): everything,
    }


def test_zero_3_holds_one_block_at_a_time() -> None:
    """Each block is gathered when its turn comes, and what lies outside of them when it is used."""
    graphs = program(case("llama", layers=LAYERS, num_key_value_heads=4), plan(dp_shard=RANKS, zero=3)).graphs
    order = {name: [(c.kind, c.block) for c in graph_collectives(graphs[name].graph, name) if c.size > SMALL] for name in graphs}
    assert order["forward"] == [("all_gather", block) for block in (None, 0, 1, None)]
    backward = [(kind, block) for block in (None, 1, 0) for kind in ("all_gather", "reduce_scatter")]
    assert order["backward"] == [*backward, ("reduce_scatter", None)]


def test_zero_3_with_tensor_parallelism_moves_the_shards_of_tp_only() -> None:
    found = llama_traffic(dp_shard=2, tp=2, zero=3)
    (gather,) = [c for c in found if c.block == 0 and c.axis == "dp_shard" and (c.phase, c.kind) == ("forward", "all_gather")]
    norms = 2 * 8.0 * WIDTH
    assert gather.size == (parameter_bytes("model.layers.0.") - norms) / 2 + norms
    activations = count(c for c in found if c.block == 0 and c.axis == "tp")
    assert activations == {("forward", "all_reduce", ACTIVATION / 2): 2, ("backward", "all_reduce", ACTIVATION / 2): 2}


@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_sends_the_residual_stream_only(stage: int) -> None:
    found = case("llama", layers=LAYERS, num_key_value_heads=4)
    behind = ("model.layers.1.", "model.norm.", "lm_head.")
    names = (k.removeprefix("param.") for k in found.state)
    wanted = replace(plan(pp=2, microbatches=2), stage_of={n: int(n.startswith(behind)) for n in names})
    sent = [c for c in traffic(program(found, wanted, stage)) if c.kind == "send"]
    assert [(c.axis, c.size) for c in sent] == [("pp", ACTIVATION / 2)] * 2


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "gpt"])
def test_tensor_parallelism_shards_the_products(model: str) -> None:
    options = {"num_key_value_heads": 4} if model == "llama" else {}
    _, _, found = lowered(case(model, **options), plan(tp=RANKS))
    whole = sharded = 0.0
    for node in found.graph.graph.nodes:
        if node.op == "call_function" and "tp" in node.meta.get("calls", {}):
            flops = op_flops(node.meta["calls"]["tp"][0])
            whole += flops
            sharded += flops * (op_flops(op_call(node)[0]) < 0.75 * flops)
    assert whole and sharded >= 0.95 * whole, f"{sharded / whole:.1%} of the FLOPs of products are sharded"


def test_fused_projection_is_cut_by_heads() -> None:
    _, wanted, _ = lowered(case("gpt2"), plan(tp=RANKS))
    cut = wanted.layout["transformer.h.0.attn.c_attn.weight"]
    assert cut == Varying(1, ((8, 8, 8, 8),) * 3), f"columns of queries, keys and values each by heads, not {cut}"
    assert wanted.layout["transformer.h.0.attn.c_proj.weight"] == Varying(0, ((8, 8, 8, 8),))


PREDICTED = {
    "dp4": Strategy(dp=4, zero=0),
    "zero2": Strategy(dp=4, zero=2),
    "zero3": Strategy(dp=4, zero=3),
    "hsdp": Strategy(dp_replicate=2, dp_shard=2, zero=2),
    "tp4": Strategy(tp=4, sequence_parallel=False),
    "sp4": Strategy(tp=4, sequence_parallel=True),
    "zero3tp2": Strategy(dp=2, tp=2, zero=3),
    "pp2": Strategy(pp=2, dp=2, zero=1, microbatches=2),
    "tp2pp2": Strategy(pp=2, tp=2, microbatches=2),
    "any": Strategy(tp=4, layouts="any"),
    "zero3any": Strategy(dp=2, tp=2, zero=3, layouts="any"),
    "zero2sp2": Strategy(dp=2, tp=2, zero=2, sequence_parallel=True),
    "sp2": Strategy(dp_replicate=2, tp=2, sequence_parallel=True),
    "anypp2": Strategy(pp=2, tp=2, microbatches=2, layouts="any"),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_plans_predict_the_bytes_of_their_programs(name: str) -> None:
    """By axis, the mean over ranks; what a loss exchanges, a few numbers per token, apart."""
    found = case("llama", layers=LAYERS, num_key_value_heads=4, vocab_size=128)
    topology = NEAR if "any" in name else Topology.preset("cpu", devices=RANKS)
    request = resolve("auto", PREDICTED[name], RANKS)
    problem = problem_of(found, [found.batch])
    chosen = choose(problem, request, topology, rows=found.batch, memory_limit=None, batch="global")
    problem = problem_of(found, shares(found, chosen))
    chosen = with_layout(problem, chosen)
    counted: Counter[str] = Counter()
    for rank in range(RANKS):
        for axis, size in received(emit(problem, chosen, rank)).items():
            counted[axis.partition(":")[0]] += size / RANKS
    assert chosen.predicted is not None and set(chosen.predicted.traffic) >= set(chosen.mesh.axes)
    for axis, size in chosen.predicted.traffic.items():
        assert size == pytest.approx(counted[axis], rel=0.01, abs=4 * SMALL), axis
