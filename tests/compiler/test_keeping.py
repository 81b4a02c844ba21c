"""The memory that is predicted of a plan is what the emitted programs take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from programs import NEAR, case

from shardwright import Strategy, Topology, emit, plan
from shardwright.compiler.cost import Seconds, size_of
from shardwright.compiler.keeping import keeping, kept_at, kept_bytes
from shardwright.compiler.layouts import Layouts
from shardwright.compiler.memory import program_memory
from shardwright.compiler.needs import read_again
from shardwright.compiler.offers import offers
from shardwright.compiler.placed_cost import placed_cost
from shardwright.compiler.prices import held
from shardwright.compiler.tensor_axis import tensor_mesh, tensor_placement
from shardwright.passes.graph_tools import metas, op_calls
from shardwright.passes.rules.base import Axis

STRATEGIES = {
    "zero3": Strategy(dp=8, tp=1, pp=1, zero=3),
    "tp4": Strategy(dp=2, tp=4, pp=1, sequence_parallel=False),
    "sequence parallel": Strategy(dp=2, tp=4, pp=1, sequence_parallel=True),
    "any": Strategy(dp=2, tp=4, pp=1, zero=0, layouts="any"),
}


def on_meta(model: type[torch.nn.Module], config: Any, rows: int, length: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    with torch.device("meta"):
        made, tokens = model(config), torch.empty(rows, length, dtype=torch.long)
    return made, {"input_ids": tokens, "labels": torch.empty_like(tokens)}


def llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4
    )
    model, batch = on_meta(transformers.LlamaForCausalLM, config, 2, 512)
    return model.to(torch.bfloat16), batch


def bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    return on_meta(transformers.BertForMaskedLM, transformers.BertConfig(vocab_size=8000, **sizes), 2, 512)


def t5() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    sizes = {"d_model": 512, "d_ff": 2048, "num_layers": 3, "num_heads": 8}
    config = transformers.T5Config(vocab_size=8000, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return on_meta(transformers.T5ForConditionalGeneration, config, 8, 256)


def vit() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        image_size=128,
        patch_size=8,
        num_labels=16,
    )
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(config)
        return model, {"pixel_values": torch.empty(8, 3, 128, 128), "labels": torch.empty(8, dtype=torch.long)}


@pytest.mark.parametrize("model", ["gpt", "llama", "gpt2", "bert", "t5", "vit", "mixtral", "resnet"])
def test_what_is_kept_and_where_its_type_is_chosen(model: str) -> None:
    """Whole on every rank, all of it is what is kept; cut in two, what the placement says of each value."""
    graph, loss = case(model).graph, case(model).captured.loss
    calls, axis = op_calls(graph), Axis("tp", 2)
    kept = keeping(calls)
    at = kept_at(calls, kept, offers(graph, axis, calls, "tensor"))
    assert sum(k.held(lambda _: 1.0) for k in at) == pytest.approx(kept_bytes(calls, kept, None, Axis("tp", 1)))
    placement = tensor_placement(graph, loss, 2, Layouts(byte_price=1e-9), Seconds(NEAR, tensor_mesh(2)), calls)
    cost = placed_cost(graph, Seconds(NEAR, tensor_mesh(2)), placement, calls, kept)
    assert cost.activations == pytest.approx(kept_bytes(calls, kept, placement, axis))
    assert cost.activations < kept_bytes(calls, kept, None, Axis("tp", 1))
    parameters = [n for n in graph.graph.find_nodes(op="placeholder") if n.meta["key"].startswith("param.")]
    sizes = {n: size_of(metas(n)[0]) * held(placement.placeholders[n.meta["key"]], axis) for n in parameters}
    assert cost.parameters == pytest.approx(sum(sizes.values()))
    assert cost.read_again == pytest.approx(sum(size for n, size in sizes.items() if read_again(n, calls)))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("model", [llama, bert, t5, vit])
@pytest.mark.filterwarnings("ignore")
def test_predicted_peak(model, name: str) -> None:
    made, batch = model()
    planned = plan(made, Topology.preset("h100", devices=8), example_inputs=batch, strategy=STRATEGIES[name])
    predicted = planned.plan.predicted
    assert predicted is not None
    taken = program_memory(emit(planned, 0))
    assert 0.97 * taken.peak <= predicted.peak_bytes <= 1.2 * taken.peak, taken
    if predicted.peak_bytes <= 1.05 * taken.peak:  # else the peak is when gradients are there and most of what was kept is not
        kept = sum(v for k, v in predicted.parts.items() if k == "activation bytes")
        assert kept == pytest.approx(taken.activations + taken.temporaries, rel=0.2), taken


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_blocks_in_two_layouts_takes_no_more_than_the_limit() -> None:
    """Where some blocks' parameters lie whole on every tensor rank, and those of others in shards."""
    made, batch = bert()
    topology = Topology.preset("h100", devices=8)
    free = plan(made, topology, example_inputs=batch).plan.predicted
    assert free is not None
    limit = 0.5 * free.peak_bytes
    planned = plan(made, topology, example_inputs=batch, memory_limit=limit)
    assert planned.plan.layouts.mixed is not None, "the test is of such a plan"
    assert 0.85 * limit <= program_memory(emit(planned, 0)).peak <= limit
