import os
import time

import pytest
import torch
from torch import fx, nn

from shardwright.passes.blocks import find_blocks, mark_blocks

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return (self.model(**batch).loss,)


def export(module, *inputs):
    return torch.export.export(module, inputs, strict=False).run_decompositions({})


def tokens(*shape):
    return torch.randint(0, 90, shape)


def text():
    return {"input_ids": tokens(2, 12), "labels": tokens(2, 12)}


SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)


def build(name):
    t = transformers
    match name:
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=2)), text()
        case "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=16)), text()
        case "bert":
            mask = torch.ones(2, 12, dtype=torch.long)
            return t.BertForMaskedLM(t.BertConfig(**SMALL, max_position_embeddings=16)), {**text(), "attention_mask": mask}
        case "mixtral":
            return t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)), text()
        case "vit":
            config = t.ViTConfig(
                **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=4, num_labels=10
            )
            return t.ViTForImageClassification(config), {
                "pixel_values": torch.randn(2, 3, 16, 16),
                "labels": torch.randint(0, 10, (2,)),
            }
        case "t5":
            config = t.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, decoder_start_token_id=0)
            return t.T5ForConditionalGeneration(config), {"input_ids": tokens(2, 12), "labels": tokens(2, 9)}
    raise ValueError(name)


@pytest.mark.parametrize(
    ("name", "instances"),
    [("llama", [4]), ("gpt2", [4]), ("bert", [4]), ("mixtral", [4]), ("vit", [4]), ("t5", [3, 3])],
)
def test_finds_the_layers_of_transformers(name, instances):
    torch.manual_seed(0)
    model, batch = build(name)
    program = export(Loss(model.train()), batch)
    blocks = find_blocks(program.graph)
    assert [len(run.instances) for run in blocks.runs] == instances
    for run in blocks.runs:
        # borders are crossed by the residual stream alone
        assert all(len(outputs) == 1 for outputs in run.outputs)
        assert run.outputs[0][0].meta["val"].shape[-1] == 32
        for aligned in zip(*run.instances, strict=True):
            assert (
                len({(n.target, n.meta["val"].shape if isinstance(n.meta.get("val"), torch.Tensor) else None) for n in aligned})
                == 1
            )
        for aligned in zip(*run.leaves, strict=True):
            assert len({leaf.meta["val"].shape for leaf in aligned}) == 1
            # the same parameter of each layer: names differ in the layer's number alone
            assert len({"".join(c for c in leaf.name if not c.isdigit()) for leaf in aligned}) == 1
    if name == "t5":
        assert "encoder" in blocks.runs[0].leaves[0][0].name and "decoder" in blocks.runs[1].leaves[0][0].name


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_instances_share_what_comes_from_outside_and_hand_on_the_rest():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Residual(8) for _ in range(3))
            self.head = nn.Linear(8, 2)

        def forward(self, x, scale):
            scale = scale.sigmoid()
            x = x.relu()
            for layer in self.layers:
                x = layer(x) * scale
            return self.head(x)

    program = export(Model(), torch.randn(4, 8), torch.randn(8))
    (run,) = find_blocks(program.graph).runs
    assert len(run.instances) == 3
    shared = {instance_inputs[-1].name for instance_inputs in run.inputs}
    assert shared == {"sigmoid"}
    for before, inputs in zip(run.outputs, run.inputs[1:], strict=False):
        assert before[0] in inputs
    assert all(len(leaves) == 4 for leaves in run.leaves)


def test_blocks_that_differ_are_not_joined():
    widths = [4, 4, 4, 6, 6]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip([4, *widths], widths, strict=False)]
    program = export(nn.Sequential(*layers), torch.randn(3, 4))
    runs = find_blocks(program.graph).runs
    # the first has the model's input for its own, the fourth changes the width
    assert sum(len(run.instances) for run in runs) in (2, 3)
    assert all(leaf.meta["val"].shape[-1] == 4 for run in runs for leaves in run.leaves for leaf in leaves)


def test_parallel_branches_are_no_blocks():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            return torch.stack([branch(x).view(2, 2, 4).transpose(0, 1) for branch in self.branches]).sum()

    assert find_blocks(export(Branches(), torch.randn(4, 4)).graph).runs == ()


def test_tied_blocks_are_found_and_ties_inside_a_block_must_agree():
    class Tied(nn.Module):
        def __init__(self, ties):
            super().__init__()
            weights = [nn.Linear(4, 4, bias=False) for _ in range(8)]
            self.pairs = nn.ModuleList(nn.ModuleList([weights[2 * i], weights[2 * i + 1 - tie]]) for i, tie in enumerate(ties))

        def forward(self, x):
            x = x.exp()
            for a, b in self.pairs:
                x = b(a(x).relu()).tanh()
            return x

    x = torch.randn(2, 4)
    assert [len(r.instances) for r in find_blocks(export(Tied([0, 0, 0, 0]), x).graph).runs] == [4]
    assert [len(r.instances) for r in find_blocks(export(Tied([1, 1, 1, 1]), x).graph).runs] == [4]
    mixed = find_blocks(export(Tied([0, 0, 1, 1]), x).graph)
    for run in mixed.runs:
        assert len({len(leaves) for leaves in run.leaves}) == 1


def test_marks_every_node():
    torch.manual_seed(0)
    model, batch = build("gpt2")
    program = export(Loss(model), batch)
    gm = program.graph_module
    blocks = mark_blocks(gm)
    marks = [node.meta["block"] for node in gm.graph.nodes]
    numbers = [m for m in marks if m is not None]
    assert sorted(set(numbers)) == list(range(4)) and numbers == sorted(numbers)
    assert len(numbers) == len(blocks.instance_of)


def test_ten_thousand_nodes_take_less_than_a_few_seconds():
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = torch.empty(4, 4)
    x.meta["val"] = value
    x = graph.call_function(torch.ops.aten.relu.default, (x,))
    x.meta["val"] = value
    for _ in range(125):
        residual = x
        for k in range(79):
            if k % 10 == 0:
                weight = graph.get_attr("w")
                weight.meta["val"] = value
            target = torch.ops.aten.mm.default if k % 10 == 0 else torch.ops.aten.relu.default
            x = graph.call_function(target, (x, weight) if k % 10 == 0 else (x,))
            x.meta["val"] = value
        x = graph.call_function(torch.ops.aten.add.Tensor, (x, residual))
        x.meta["val"] = value
    graph.output(x)
    start = time.perf_counter()
    (run,) = find_blocks(graph).runs
    assert time.perf_counter() - start < 15
    assert len(run.instances) == 125 and len(run.instances[0]) == 80
