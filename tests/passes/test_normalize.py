"""Normalization keeps the meaning of every graph, and gives the normal form it promises."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from shardwright.compiler.capture import Captured, capture
from shardwright.compiler.fidelity import check_capture
from shardwright.compiler.prepare import in_float64, prepare
from shardwright.passes.normalize import RULES, check_normal, normalize
from shardwright.passes.normalize.attention import explicit
from shardwright.passes.normalize.masks import Affine, AtLeast, affine, is_causal
from shardwright.passes.normalize.promote import double, promote_casts
from shardwright.passes.normalize.rewrite import rewrite
from tests.zoo import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:outputs that are not tensors")
torch.set_num_threads(1)


class Function(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = (body,)

    def forward(self, *args: Any) -> Any:
        return self.body[0](*args)


def normal(body: Callable[..., Any], *args: Any, module: nn.Module | None = None, training: bool = True) -> fx.GraphModule:
    """The normalized graph of body(*args), after checking that its outputs and gradients are those of the function."""
    model = module or Function(body)
    captured = capture(model, args, {}, training=training)
    graph = normalize(captured.graph)
    _same(captured, graph, model, args)
    return graph


def _same(captured: Captured, graph: fx.GraphModule, model: nn.Module, args: tuple[Any, ...]) -> None:
    results = []
    for gm in (captured.graph, graph):
        state = {f"param.{n}": p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        state |= {f"buffer.{n}": b.clone() for n, b in model.named_buffers()}
        state |= {k: _leaf(t) for k, t in captured.call.flatten(args, {}).items()}
        state |= {**captured.constants, "seed": torch.tensor(0)}
        inputs = [state[n.meta["key"]] for n in gm.graph.nodes if n.op == "placeholder"]
        outputs = fx.Interpreter(gm).run(*inputs)
        torch.manual_seed(0)
        total = sum((o * torch.randn_like(o)).sum() for o in outputs if o.is_floating_point() and o.requires_grad)
        leaves = {k: t for k, t in state.items() if t.requires_grad}
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if isinstance(total, Tensor) else ()
        results.append((outputs, dict(zip(leaves, gradients, strict=False))))
    (expected, expected_gradients), (found, found_gradients) = results
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    for key, gradient in expected_gradients.items():
        other = found_gradients[key]
        if gradient is None or other is None:
            assert (gradient is None or not gradient.any()) and (other is None or not other.any()), key
        else:
            torch.testing.assert_close(other, gradient, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def randn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def ops(graph: fx.GraphModule) -> Counter[str]:
    names = (str(n.target).removeprefix("aten.") for n in graph.graph.nodes if n.op == "call_function")
    return Counter(n.removesuffix(".default") for n in names if "getitem" not in n)


def attention_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.target is torch.ops.shardwright.attention.default]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_normalized_model_equals_eager(name: str) -> None:
    model, batch = MODELS[name]()
    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    captured = capture(model, (), batch)
    graph = normalize(captured.graph)
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")  # eager's default has no float64 kernel
    found = check_capture(dataclasses.replace(captured, graph=graph), model, (), batch)
    assert found.gradients < 1e-11, found
    for node in graph.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta and "grad" in node.meta and "source" in node.meta, node
    again = normalize(graph)
    assert [str(n.target) for n in again.graph.nodes] == [str(n.target) for n in graph.graph.nodes]


def test_evaluation_of_a_batch_norm_model() -> None:
    model, batch = MODELS["resnet"]()
    model.double()
    batch["pixel_values"] = batch["pixel_values"].double()
    captured = capture(model, (), batch, training=False)
    check_capture(dataclasses.replace(captured, graph=normalize(captured.graph)), model, (), batch)


def test_values_of_new_nodes_are_what_runs() -> None:
    model, batch = MODELS["t5"]()
    captured = capture(model, (), batch)
    graph = normalize(captured.graph)
    state = {f"param.{n}": p.detach() for n, p in model.named_parameters()} | {f"input.{k}": v for k, v in batch.items()}
    state |= {f"buffer.{n}": b for n, b in model.named_buffers()} | dict(captured.constants)

    class Check(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                assert result.shape == n.meta["val"].shape and result.dtype == n.meta["val"].dtype, n
            return result

    Check(graph).run(*[state[n.meta["key"]] for n in graph.graph.nodes if n.op == "placeholder"])


def test_a_llama_layer_in_golden_form() -> None:
    model, batch = MODELS["llama"](layers=1)
    graph = normalize(capture(model, (), batch).graph)
    names = [str(n.target).removeprefix("aten.").removesuffix(".default") for n in graph.graph.nodes if n.op == "call_function"]
    assert names[:3] == ["embedding", "arange", "unsqueeze"]
    norm = ["pow.Tensor_Scalar", "sum.dim_IntList", "div.Tensor", "add.Tensor", "rsqrt", "mul.Tensor", "mul.Tensor"]
    head = [*["linear", "reshape", "transpose.int"] * 3, "unsqueeze", "unsqueeze"]
    rope = ["mul.Tensor", "slice.Tensor", "slice.Tensor", "neg", "cat", "mul.Tensor", "add.Tensor"]
    heads = ["unsqueeze", "expand", "reshape"] * 2
    attend = ["shardwright.attention", "<built-in function getitem>", "transpose.int", "reshape", "linear", "add.Tensor"]
    mlp = ["linear", "silu", "linear", "mul.Tensor", "linear", "add.Tensor"]
    loss = ["constant_pad_nd", "slice.Tensor", "shardwright.logsumexp"]
    loss += ["ne.Scalar", "full", "where.self", "shardwright.pick", "sub.Tensor"]
    loss += ["lt.Scalar", "ge.Scalar", "bitwise_or.Tensor", "full", "where.self", "full", "where.self"]
    loss += ["sum.dim_IntList", "sum.dim_IntList", "_to_copy", "div.Tensor"]
    start = names.index("pow.Tensor_Scalar")
    assert names[start:] == [*norm, *head, *rope, *rope, *heads, *attend, *norm, *mlp, *norm, "linear", *loss]
    (node,) = attention_nodes(graph)
    assert node.args[3] is None and node.args[4] is True
    sizes = [n.meta["val"].shape for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not any(tuple(s[-2:]) == (12, 12) for s in sizes), "a mask of S x S is left"


# --- no-ops, views, dims


def test_what_changes_nothing_is_dropped() -> None:
    def body(x: Tensor) -> Tensor:
        y = (x + 0) * 1 / 1 - 0
        y = y.clone().contiguous().to(torch.float64)
        y = torch.cat([y, torch.empty(0)], 0)[:, :].expand(3, 4).reshape(3, 4)
        return y.transpose(0, 1).transpose(1, 0).permute(0, 1) * 2

    assert ops(normal(body, randn(3, 4))) == {"mul.Tensor": 1}


def test_views_become_one_reshape_with_explicit_sizes() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(-1, 5).unflatten(0, (2, -1)).flatten(), x.flatten(1).view(2, 3, -1), x.unsqueeze(0).squeeze(0)

    graph = normal(body, randn(2, 3, 5))
    assert ops(graph) == {"reshape": 1}
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert node.args[1] == [30]


def test_dims_and_bounds_are_non_negative_and_defaults_left_out() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        return x[:, -3:], x.narrow(-1, 1, 2), x.softmax(-1), torch.add(x, x, alpha=3), x.sum(-1), x[..., 1:100], x.movedim(-1, 0)

    graph = normal(body, randn(2, 5))
    calls = [
        (str(n.target), tuple(a for a in n.args if not isinstance(a, fx.Node)))
        for n in graph.graph.nodes
        if n.op == "call_function"
    ]
    assert ("aten.slice.Tensor", (1, 2, 5)) in calls
    assert ("aten.slice.Tensor", (1, 1, 3)) in calls
    assert ("aten.slice.Tensor", (1, 1, 5)) in calls
    assert ("aten.softmax.int", (1,)) in calls
    assert ("aten.sum.dim_IntList", ([1],)) in calls
    assert ("aten.mul.Tensor", (3,)) in calls and ("aten.add.Tensor", ()) in calls
    assert ("aten.permute.default", ([1, 0],)) in calls


def test_repeats_are_expands() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        return x.repeat(2, 1, 3), x.repeat_interleave(2, -1), x.tile(2), torch.stack([x, x], -1), x.chunk(2, -1)[1]

    found = ops(normal(body, randn(3, 4)))
    assert not {"repeat", "tile", "chunk"} & set(found)


def test_writes_to_parts_are_concatenations() -> None:
    def body(x: Tensor, y: Tensor) -> Tensor:
        z = x.new_zeros(x.shape)
        z[:, 1:] = y[:, :-1]
        z[:, 0] = 3
        return z * x

    found = ops(normal(body, randn(3, 4), randn(3, 4)))
    assert not any("scatter" in n or n in ("copy", "fill.Tensor") for n in found)


def test_where_with_numbers_keeps_the_dtype() -> None:
    def body(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.where(x > 0, x, 2),
            torch.where(i > 1, 0, i),
            torch.where(i > 1, i, 0.5),
            torch.where(x > 0, 1.0, 2.0),
            x.masked_fill(i > 1, 3),
        )

    normal(body, randn(3, 4), torch.arange(4))


def test_composite_ops_are_taken_apart() -> None:
    def body(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.einsum("abc,dc->bad", x, y), F.pairwise_distance(x[0], y), F.logsigmoid(x), torch.square(x), F.instance_norm(x)

    found = ops(normal(body, randn(2, 3, 5), randn(3, 5)))
    assert "einsum" not in found and "instance_norm" not in found


# --- matmuls


def test_biases_stand_apart() -> None:
    def body(x: Tensor, w: Tensor, b: Tensor, c: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            F.linear(x, w, b),
            torch.addmm(b, x, w.t(), beta=2, alpha=3),
            F.conv1d(c, k, b),
            F.conv2d(c[:, :, None], k[:, :, None], b, padding="same"),
        )

    found = ops(normal(body, randn(3, 4), randn(6, 4), randn(6), randn(2, 4, 7), randn(6, 4, 3)))
    assert found["convolution"] == 2 and not {"addmm", "conv1d", "conv2d.padding"} & set(found)


def test_batch_dims_stay_apart_in_matmuls() -> None:
    def body(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        merged = x.reshape(-1, 8)
        return torch.addmm(b, merged, w).view(2, 3, 5), F.linear(merged, w.t(), b).view(2, 3, 5)

    graph = normal(body, randn(2, 3, 4, 2), randn(8, 5), randn(5))
    assert all(n.meta["val"].dim() == 3 for n in graph.graph.nodes if n.op == "call_function" and "reshape" in str(n.target))


# --- reductions and losses


def test_means_and_variances_are_sums() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x.mean(), x.mean(-1, keepdim=True), x.var(1), x.std(dim=(0, 2), unbiased=False), torch.var_mean(x, 1)[1],
            F.adaptive_avg_pool2d(x, 1), x.sum(), x.var(),
        )  # fmt: skip

    found = ops(normal(body, randn(3, 4, 5)))
    assert not {"mean", "mean.dim", "var.correction", "std.correction", "var_mean.correction", "sum"} & set(found)


def _targets(*shape: int, classes: int, ignore: int = -100) -> Tensor:
    target = torch.randint(0, classes, shape)
    target.view(-1)[::3] = ignore
    return target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(reduction: str, smoothing: float, weighted: bool) -> None:
    weight = torch.rand(7, dtype=torch.float64) + 0.1 if weighted else None

    def body(x: Tensor, target: Tensor, spatial: Tensor, places: Tensor, soft: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        options = {"reduction": reduction, "label_smoothing": smoothing, "weight": w[0] if w else None}
        return (
            F.cross_entropy(x, target, **options),
            F.cross_entropy(x, target.clamp(min=0), ignore_index=2, **options),
            F.cross_entropy(spatial, places, **options),
            F.cross_entropy(x, soft.softmax(-1), **options),
            F.cross_entropy(x[0], target[1], **options),
        )

    args = (randn(6, 7), _targets(6, classes=7), randn(2, 7, 3, 2), _targets(2, 3, 2, classes=7), randn(6, 7))
    graph = normal(body, *args, *([weight] if weight is not None else []))
    found = ops(graph)
    assert "cross_entropy_loss" not in found and found["shardwright.logsumexp"] >= 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_other_losses(reduction: str) -> None:
    def body(x: Tensor, y: Tensor, target: Tensor, image: Tensor, places: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        p, q = x.sigmoid(), y.sigmoid()
        return (
            F.mse_loss(x, y, reduction=reduction),
            F.l1_loss(x, y, reduction=reduction),
            F.smooth_l1_loss(x, y, reduction=reduction),
            F.huber_loss(x, y, reduction=reduction, delta=0.5),
            F.binary_cross_entropy(p, q.detach(), reduction=reduction),
            F.binary_cross_entropy_with_logits(x, q.detach(), reduction=reduction, pos_weight=w),
            F.kl_div(F.log_softmax(x, -1), y.softmax(-1), reduction=reduction),
            F.soft_margin_loss(x, y.sign().detach(), reduction=reduction),
            F.nll_loss(F.log_softmax(x, -1), target, reduction=reduction),
            F.nll_loss(F.log_softmax(image, 1), places, reduction=reduction),
        )

    labels, places = _targets(4, classes=5), _targets(2, 3, 2, classes=5)
    normal(body, randn(4, 5), randn(4, 5), labels, randn(2, 5, 3, 2), places, torch.rand(5).double())


def test_cross_entropy_keeps_the_batch_dim_and_fails_on_wrong_labels() -> None:
    graph = normal(lambda x, t: F.cross_entropy(x.reshape(-1, 7), t.view(-1)), randn(2, 3, 7), _targets(2, 3, classes=7))
    (node,) = [n for n in graph.graph.nodes if n.target is torch.ops.shardwright.logsumexp.default]
    assert node.args[0].op == "placeholder"
    assert math.isnan(graph(torch.randn(2, 3, 7).double(), torch.full((2, 3), 7))[0])
    assert math.isnan(graph(torch.randn(2, 3, 7).double(), torch.full((2, 3), -100))[0])


# --- batch norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine_", [True, False])
def test_batch_norm(training: bool, affine_: bool) -> None:
    module = nn.Sequential(nn.BatchNorm2d(4, affine=affine_), nn.Flatten(), nn.BatchNorm1d(24, track_running_stats=False)).double()
    graph = normal(lambda: None, randn(5, 4, 2, 3), module=module, training=training)
    assert not any("batch_norm" in n for n in ops(graph))


# --- attention and masks


def _qkv(heads: int = 2, kv: int = 2, queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return randn(3, heads, queries, 4), randn(3, kv, keys, 4), randn(3, kv, keys, 4)


def _mask_of(mask: Callable[[], Tensor], queries: int = 5, keys: int = 5) -> tuple[Any, Any]:
    """(mask argument, causal) of the attention op for a mask built by `mask` inside the graph."""
    graph = normal(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask()), *_qkv(queries=queries, keys=keys))
    (node,) = attention_nodes(graph)
    return node.args[3], node.args[4]


def _steps(n: int) -> Tensor:
    return torch.arange(n)


def _same_sequence(positions: Tensor) -> Tensor:
    """True where query and key are of one sequence, a new one beginning wherever the position does not go on."""
    sequence = (torch.diff(positions, prepend=positions[:1] - 1) != 1).cumsum(0)
    return sequence[:, None] == sequence[None, :]


PROVABLE = {
    "le": lambda: _steps(5)[None, :] <= _steps(5)[:, None],
    "ge with batch": lambda: (_steps(5)[:, None] >= _steps(5)[None, :])[None, None].expand(3, 1, 5, 5),
    "lt plus one": lambda: _steps(5)[None, :] < _steps(5)[:, None] + 1,
    "tril": lambda: torch.ones(5, 5, dtype=torch.bool).tril(),
    "shifted": lambda: (_steps(5)[None, :] + 3) <= (_steps(5)[:, None] + 3),
    "and true": lambda: (_steps(5)[None, :] <= _steps(5)[:, None]) & (_steps(5)[:, None] >= 0),
    "wide window": lambda: (_steps(5)[None, :] <= _steps(5)[:, None]) & (_steps(5)[:, None] - _steps(5)[None, :] < 9),
    "one packed sequence": lambda: (_steps(5)[None, :] <= _steps(5)[:, None]) & _same_sequence(_steps(5)),
    "additive": lambda: torch.where(_steps(5)[None, :] <= _steps(5)[:, None], 0.0, -torch.inf).double(),
}


@pytest.mark.parametrize("case", sorted(PROVABLE))
def test_provably_causal_masks_become_a_flag(case: str) -> None:
    mask, causal = _mask_of(PROVABLE[case])
    assert (mask, causal) == (None, True)


NOT_CAUSAL = {
    "strict": lambda: _steps(5)[None, :] < _steps(5)[:, None],
    "one ahead": lambda: _steps(5)[None, :] <= _steps(5)[:, None] + 1,
    "anticausal": lambda: _steps(5)[None, :] >= _steps(5)[:, None],
    "step two": lambda: 2 * _steps(5)[None, :] <= _steps(5)[:, None],
    "offset start": lambda: torch.arange(1, 6)[None, :] <= _steps(5)[:, None],
    "triu": lambda: torch.ones(5, 5, dtype=torch.bool).triu(),
    "tril of other diagonal": lambda: torch.ones(5, 5, dtype=torch.bool).tril(1),
}


@pytest.mark.parametrize("case", sorted(NOT_CAUSAL))
def test_other_masks_are_not_taken_for_causal(case: str) -> None:
    mask, causal = _mask_of(NOT_CAUSAL[case])
    assert mask is not None and causal is False


def test_two_packed_sequences_keep_their_mask_beside_the_flag() -> None:
    positions = torch.tensor([0, 1, 2, 0, 1])
    body = lambda q, k, v, positions: F.scaled_dot_product_attention(  # noqa: E731
        q, k, v, (_steps(5)[None, :] <= _steps(5)[:, None]) & _same_sequence(positions)
    )
    (node,) = attention_nodes(normal(body, *_qkv(), positions))
    assert node.args[4] is True and node.args[3].meta["val"].shape == (5, 5)


@pytest.mark.parametrize("cached", [True, False])
def test_attention_of_transformers_is_causal_without_a_mask(cached: bool) -> None:
    """Without a cache, transformers looks for packed sequences, by the position ids that it has just counted."""
    model, batch = MODELS["llama"](use_cache=cached)
    for node in attention_nodes(normalize(capture(model, (), batch).graph)):
        assert (node.args[3], node.args[4]) == (None, True)


def test_a_narrow_window_keeps_its_mask_beside_the_flag() -> None:
    mask, causal = _mask_of(lambda: (_steps(5)[None, :] <= _steps(5)[:, None]) & (_steps(5)[:, None] - _steps(5)[None, :] < 2))
    assert causal is True and mask.meta["val"].shape == (5, 5)


def test_a_mask_that_is_always_true_vanishes() -> None:
    assert _mask_of(lambda: (_steps(5)[:, None] >= 0).expand(5, 5)) == (None, False)
    assert _mask_of(lambda: torch.ones(4, 6, dtype=torch.bool), 4, 6) == (None, False)


def test_unequal_lengths_are_never_causal_by_flag() -> None:
    mask, causal = _mask_of(lambda: _steps(6)[None, :] <= _steps(4)[:, None], 4, 6)
    assert mask is not None and causal is False
    graph = normal(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *_qkv(queries=4, keys=6))
    assert not attention_nodes(graph) and ops(graph)["shardwright.chunked_attention"] == 1


def test_padding_and_causal_part_ways_and_keep_the_batch() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        allowed = padding[torch.arange(3)[:, None, None, None], _steps(5)[None, None, None, :]]
        mask = (_steps(5)[None, :] <= _steps(5)[:, None])[None, None] & allowed
        return F.scaled_dot_product_attention(q, k, v, mask.expand(3, -1, 5, 5))

    padding = torch.ones(3, 5, dtype=torch.bool)
    padding[1, 3:] = False
    graph = normal(body, *_qkv(), padding)
    (node,) = attention_nodes(graph)
    assert node.args[4] is True and node.args[3].meta["val"].shape == (3, 1, 1, 5)
    assert "index.Tensor" not in ops(graph)


def test_fewer_key_heads_and_fewer_dims() -> None:
    normal(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3), *_qkv(heads=4, kv=2))
    three = normal(lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]), *_qkv())
    five = normal(lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]), *_qkv())
    assert len(attention_nodes(three)) == 1 and not attention_nodes(five)


def test_a_mask_with_a_gradient_is_a_bias() -> None:
    for shape in ((1, 2, 5, 5), (5, 5), (3, 1, 1, 5)):
        graph = normal(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias), *_qkv(), randn(*shape))
        assert ops(graph)["shardwright.chunked_attention"] == 1 and not ops(graph)["softmax.int"]


def test_attention_with_dropout_is_one_op() -> None:
    """It draws what dropout of the spelled-out weights would, and its backward draws the same again."""
    q, k, v = (x.detach().requires_grad_() for x in _qkv())
    graph = normalize(capture(Function(lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.3)), (q, k, v), {}).graph)
    assert ops(graph)["shardwright.chunked_attention"] == 1 and not ops(graph)["shardwright.dropout"]
    (node,) = [n for n in graph.graph.nodes if "chunked_attention" in str(n.target)]
    seed, site = torch.tensor(3), node.args[9]
    ours = torch.ops.shardwright
    found = ours.chunked_attention(q, k, v, None, None, seed, False, 0.5, 0.3, site, [], [], [], [], [])[0]
    wanted = ours.dropout(torch.softmax(q @ k.mT * 0.5, -1), seed, 0.3, site) @ v
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), weight), torch.autograd.grad(wanted, (q, k, v), weight), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_in_five_dims_is_spelled_out() -> None:
    mask = torch.rand(3, 1, 5, 5) > 0.5
    mask[0, 0, 2] = False  # a row without any key

    def body(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)

    args = (*_qkv(), mask)
    graph = normalize(capture(Function(lambda *a: body(*(x[None] for x in a), 0.3)), args, {}).graph)
    assert ops(graph)["shardwright.dropout"] == 1 and not attention_nodes(graph)
    op = torch.ops.aten.scaled_dot_product_attention.default
    rules = {op: lambda b, q, k, v, m, p, c, **_: explicit(b, q, k, v, m, 0.0, c, 0.5)}
    captured = capture(Function(lambda *a: body(*a, 0.0)), args, {})
    _same(captured, rewrite(captured.graph, {**RULES, **rules}), nn.Module(), args)


def test_affine_forms_are_exact() -> None:
    graph = capture(
        Function(lambda x: x + (torch.arange(2, 20, 3)[None, :, None] * 2 - torch.arange(5)).sum()), (randn(1),), {}
    ).graph
    graph = normalize(graph)
    (node,) = [n for n in graph.graph.nodes if "sub" in str(n.target)]
    assert affine(node) == Affine((1, 6, 5), (0, 6, -1), 4)
    assert affine(node).bounds() == (0, 34)
    assert is_causal(AtLeast(Affine((5, 5), (1, -1), 0)), 5, 5)


# --- random numbers, experts, casts


def test_dropout_has_a_seed_and_a_site_of_its_own() -> None:
    def body(x: Tensor) -> Tensor:
        return F.dropout(F.dropout(x, 0.5), 0.25) + F.dropout(x, 0.5, training=False) + torch.rand_like(x) + x.bernoulli(0.3)

    graph = normalize(capture(Function(body), (randn(64, 64),), {}).graph)
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and str(n.target).startswith("shardwright")]
    sites = [n.args[3] if "dropout" in str(n.target) else n.args[1] for n in calls]
    assert len(calls) == 4 and len(set(sites)) == 4
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    assert last.meta["key"] == "seed" and last.meta["val"].dtype is torch.int64 and last.meta["val"].shape == ()
    x = randn(64, 64, grad=False)
    first, again, other = (graph(x, torch.tensor(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def _experts(x: Tensor, router: Tensor, up: Tensor, down: Tensor, unsort: str) -> Tensor:
    tokens, k = x.shape[0], 2
    weights, chosen = torch.topk(F.softmax(x @ router, -1), k)
    flat = chosen.reshape(-1)
    order = torch.argsort(flat)
    ends = torch.cumsum(torch.histc(flat[order].float(), up.shape[0], 0, up.shape[0] - 1), 0, dtype=torch.int32)
    rows = x[order // k]
    h = F.silu(torch.ops.transformers.grouped_mm_fallback(rows, up, ends))
    y = torch.ops.transformers.grouped_mm_fallback(h, down, ends) * weights.reshape(-1)[order].unsqueeze(-1)
    if unsort == "argsort":
        return y[torch.argsort(order)].view(tokens, k, -1).sum(1)
    if unsort == "index_add":
        return torch.zeros_like(x).index_add(0, order // k, y)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(tokens, k, -1).sum(1)


@pytest.mark.parametrize("unsort", ["argsort", "index_put", "index_add"])
def test_experts_are_not_sorted(unsort: str) -> None:
    import transformers.integrations.moe  # noqa: F401  (defines grouped_mm_fallback)

    args = (randn(6, 8), randn(8, 4), randn(4, 8, 10), randn(4, 10, 8))
    graph = normal(lambda *a: _experts(*a, unsort), *args)
    found = ops(graph)
    assert found["shardwright.grouped_linear"] == 2
    assert not {"sort", "argsort", "histc", "cumsum", "index_put", "index.Tensor", "index_add"} & set(found)


def test_a_sort_with_other_uses_stays_right() -> None:
    def body(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        values, order = torch.sort(i)
        rows = x[order]
        return rows.cumsum(0), (rows * 2)[torch.argsort(order)], x.sort(dim=1)[0], values, values.cumsum(0) + order, rows.relu()

    normal(body, randn(6, 3), torch.tensor([3, 1, 2, 1, 0, 5]))


def test_promoted_casts_give_float64() -> None:
    captured = capture(Function(lambda x: (x.float() ** 2 + torch.ones(3, dtype=torch.float32)).sum()), (randn(3),), {})
    graph = promote_casts(captured.graph)
    x = randn(3)
    assert graph(x)[0].dtype is torch.float64
    torch.testing.assert_close(graph(x)[0], (x**2 + 1).sum(), rtol=1e-14, atol=0)


def test_promoted_constants_and_what_is_asserted_of_them() -> None:
    """A number that a model makes a float32 tensor of, and a cast of what that gives, which torch.export asserts the dtype of."""
    captured = capture(Function(lambda x: (x / torch.sqrt(torch.tensor(3.0)).to(x.dtype)).sum()), (randn(3),), {})
    graph = promote_casts(captured.graph)
    x = randn(3)
    (constant,) = captured.constants.values()
    state = [constant.double() if n.meta["key"].startswith("const.") else x for n in graph.graph.nodes if n.op == "placeholder"]
    assert constant.dtype is torch.float32
    torch.testing.assert_close(graph(*state)[0], (x / 3**0.5).sum(), rtol=1e-14, atol=0)


MADE: dict[str, Callable[[], Tensor]] = {
    "eye": lambda: torch.eye(5),
    "eye of rows": lambda: torch.eye(5, 5),
    "linspace": lambda: torch.linspace(0, 1, 25).view(5, 5),
    "logspace": lambda: torch.logspace(0, 1, 25).view(5, 5),
    "full": lambda: torch.full((5, 5), 2.0),
    "ones": lambda: torch.ones(5, 5),
    "hann": lambda: torch.hann_window(25).view(5, 5),
    "kaiser": lambda: torch.kaiser_window(25).view(5, 5),
    "arange": lambda: torch.arange(0.0, 25.0).view(5, 5),
    "rand": lambda: torch.rand(5, 5),
}


@pytest.mark.parametrize("made", MADE)
def test_a_tensor_of_torchs_default_dtype_is_widened(made: str) -> None:
    """Of numbers alone, its dtype named nowhere: a product takes operands of one dtype."""
    captured = capture(Function(lambda x: (x @ MADE[made]() + torch.arange(5)).sum()), (torch.randn(3, 5),), {})
    graph = in_float64(prepare(captured), captured.loss)
    given = {"input.0": randn(3, 5), "seed": torch.tensor(3), **{k: double(v) for k, v in captured.constants.items()}}
    (loss,) = fx.Interpreter(graph).run(*(given[n.meta["key"]] for n in graph.graph.nodes if n.op == "placeholder"))
    assert loss.dtype is torch.float64


# --- the contract


def test_what_is_not_normal_is_found() -> None:
    captured = capture(Function(lambda x: x.view(-1).mean()), (randn(3, 4),), {})
    with pytest.raises(ValueError, match="mean"):
        check_normal(captured.graph)
    graph = normalize(captured.graph)
    before = str(captured.graph.graph)
    check_normal(graph)
    assert str(captured.graph.graph) == before, "normalize changed its argument"
    node = next(n for n in graph.graph.nodes if "sum" in str(n.target))
    node.args = (node.args[0], [-1])
    with pytest.raises(ValueError, match="negative dims"):
        check_normal(graph)


def test_a_composite_of_values_alike_keeps_them_apart() -> None:
    """Two values of one shape and history, as graphs have them."""
    normal(lambda x: torch.kron(x[0, :3], x[1, :3]).sum() + F.cosine_similarity(x[0] * 2, x[1] * 2, dim=0), randn(2, 5))


@pytest.mark.parametrize(
    "body",
    [
        lambda x, y: F.margin_ranking_loss(x, y, torch.ones(5, dtype=torch.float64), margin=0.5),
        lambda x, y: x.index_add(0, torch.tensor([2, 0]), y[:2], alpha=3),
    ],
    ids=["margin ranking", "index_add"],
)
def test_composites_that_write_are_taken_apart_into_ops_that_do_not(body: Callable[..., Tensor]) -> None:
    graph = normal(body, randn(5), randn(5))
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in graph.graph.nodes)


@pytest.mark.parametrize(
    "body",
    [
        nn.Dropout1d(),
        nn.Dropout2d(),
        nn.Dropout3d(),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
        lambda x: F.dropout3d(x),
        lambda x: F.feature_alpha_dropout(x, training=True),
        lambda x: torch.empty_like(x).bernoulli_() * x,
        lambda x: torch.empty_like(x).normal_() * x,
    ],
    ids=["1d", "2d", "3d", "alpha", "feature alpha", "functional 3d", "functional alpha", "bernoulli", "normal"],
)
def test_random_ops_with_their_default_probability(body: Callable[..., Tensor]) -> None:
    """Those that write have a default of their own, which the op that stands for them need not have."""
    graph = normalize(capture(Function(lambda x: body(x).sum()), (randn(2, 3, 4),), {}).graph)
    assert ops(graph)["shardwright.uniform"] and not ops(graph)["bernoulli"]


def test_complex_parts_have_one_spelling() -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        z = torch.fft.fft(x).conj()
        return z.imag, z.real * x.real, torch.conj(x), (z * z.conj()).real

    graph = normal(body, randn(3, 5))
    lazy = ("_conj.default", "resolve_conj", "aten.real", "aten.imag", "_neg_view")
    assert not [n for n in graph.graph.nodes if any(name in str(n.target) for name in lazy)]


def test_weight_norm_is_sums() -> None:
    def body(x: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return x @ torch.ops.aten._weight_norm(v, g, 0).t() + (torch.ops.aten._weight_norm(v, g.view(1, 4)[:, :3], 1) * 2).sum()

    graph = normal(body, randn(2, 3), randn(4, 3), randn(4, 1))
    assert "_weight_norm_interface" not in str(graph.graph)


def test_a_tensor_filled_part_by_part_is_one_concatenation() -> None:
    def body(x: Tensor, y: Tensor) -> Tensor:
        whole = x.new_empty(2, 7)
        whole[:, :4] = x
        whole[:, 4:] = y
        return whole * 2

    graph = normal(body, randn(2, 4), randn(2, 3))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.cat.default,
        torch.ops.aten.mul.Tensor,
    ]


ROWS = torch.tensor([[True, False, True, True], [False, False, True, False]])


@pytest.mark.parametrize(
    ("mask", "source"),
    [
        (ROWS.unsqueeze(-1), (4, 3)),
        (ROWS.unsqueeze(-1), (17,)),  # more elements than are taken, and no whole number of rows
        (ROWS[0].unsqueeze(-1), (2, 3, 3)),
        (ROWS[:, :1, None], (3, 8)),  # whole samples
    ],
    ids=["patches among tokens", "more elements", "every sample alike", "samples"],
)
@pytest.mark.parametrize("expanded", [True, False])
def test_rows_scattered_by_a_mask_are_looked_up(mask: Tensor, source: tuple[int, ...], expanded: bool) -> None:
    def body(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return x.masked_scatter(m.expand_as(x) if expanded else m, s) * 2

    graph = normal(body, randn(2, 4, 3), mask, randn(*source))
    assert ops(graph)["index_select"] == 1 and "masked_scatter" not in ops(graph)


def test_a_mask_that_sets_more_rows_than_there_are_is_refused() -> None:
    graph = normal(lambda x, m, s: x.masked_scatter(m, s), randn(2, 4, 3), ROWS.unsqueeze(-1), randn(4, 3))
    with pytest.raises(IndexError, match="out of range"):
        fx.Interpreter(graph).run(randn(2, 4, 3), torch.ones(2, 4, 1, dtype=torch.bool), randn(4, 3))


@pytest.mark.parametrize("x", [(2, 4), (4,), (2, 1)], ids=str)
def test_elements_scattered_by_a_mask_stay(x: tuple[int, ...]) -> None:
    graph = normal(lambda x, m, s: x.masked_scatter(m, s), randn(*x), ROWS, randn(20))
    assert ops(graph)["masked_scatter"] == 1
