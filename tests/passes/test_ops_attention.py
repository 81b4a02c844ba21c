"""The attention op against F.scaled_dot_product_attention, on every path that runs on CPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.compiler.torch_compat import fake_mode
from shardwright.passes.ops import attention as module
from shardwright.passes.ops import ops


def inputs(
    batch: int, heads: int, queries: int, keys: int, width: int = 4, value_width: int = 4, dtype=torch.float64, by_token=False
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, value_width)]
    if by_token:
        made = [torch.randn(b, s, h, d, dtype=dtype).transpose(1, 2) for b, h, s, d in shapes]
    else:
        made = [torch.randn(s, dtype=dtype) for s in shapes]
    return [x.requires_grad_() for x in made]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """By definition, in float64: what is masked everywhere gives zeros."""
    scores = (q.double() @ k.double().transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1).bool(), -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0) @ v.double()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def compare(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float = 0.37, tolerance: float = 1e-12
) -> None:
    out, lse = ops.attention(q, k, v, mask, causal, scale)
    wanted = reference(q, k, v, mask, causal, scale)
    close(out, wanted, tolerance)
    assert not lse.requires_grad and lse.shape == q.shape[:3]
    seed = torch.randn(out.shape, dtype=out.dtype)
    for name, a, b in zip(
        "qkv", torch.autograd.grad(out, (q, k, v), seed), torch.autograd.grad(wanted, (q, k, v), seed.double()), strict=True
    ):
        assert a.dtype == q.dtype, name
        close(a, b, tolerance)


torch.manual_seed(0)
MASKS = {
    "none": None,
    "square": torch.rand(5, 7) < 0.6,
    "padding": torch.arange(7)[None, None, None] < torch.tensor([4, 7])[:, None, None, None],
    "one head": torch.rand(2, 1, 5, 7) < 0.7,
    "expanded": (torch.rand(5, 7) < 0.7).expand(2, 3, 5, 7),
    "per row": torch.rand(2, 1, 5, 1) < 0.5,
    "vector": torch.rand(7) < 0.8,
    "dead rows": torch.ones(2, 1, 5, 7, dtype=torch.bool).index_fill(2, torch.tensor([0, 3]), False),
    "float": torch.randn(3, 5, 7, dtype=torch.float64),
    "float dead": torch.zeros(2, 1, 5, 7, dtype=torch.float64).index_fill(2, torch.tensor([1]), -math.inf),
}


@pytest.fixture(params=["kernel", "chunked"])
def path(request, monkeypatch):
    if request.param == "chunked":
        monkeypatch.setattr(module, "_use_cpu_kernel", lambda q: False)
        monkeypatch.setattr(module.chunked_attention, "CHUNK_SCORES", 2 * 3 * 7 * 2)
    return request.param


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("value_width", [4, 3, 6])
def test_equals_the_definition(path, mask, value_width):
    q, k, v = inputs(2, 3, 5, 7, 4, value_width)
    compare(q, k, v, mask, False)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 1, 1, 1), (2, 1, 9, 4), (1, 2, 4, 9), (1, 2, 65, 130)])
@pytest.mark.parametrize("mask", [None, "padding"])
def test_causal(path, shape, mask):
    keys = shape[3]
    padding = None if mask is None else (torch.arange(keys) >= min(2, keys - 1))[None, None, None]
    q, k, v = inputs(*shape, by_token=True)
    compare(q, k, v, padding, True)


@pytest.mark.parametrize("width", [1, 2, 17])
def test_widths(path, width):
    for q, k, v in (inputs(2, 3, 5, 7, width, width), inputs(2, 3, 5, 7, width, 1), inputs(2, 3, 5, 7, 1, width, by_token=True)):
        compare(q, k, v, None, False)
        q, k, v = (x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v))
        compare(q, k, v, None, False)


@pytest.mark.parametrize("mask", [None, MASKS["one head"], MASKS["float"], MASKS["dead rows"]])
def test_equals_torch_attention(mask):
    q, k, v = inputs(2, 3, 5, 7, 4, 4)
    out, _ = ops.attention(q, k, v, mask, False, 0.5)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
    close(out, wanted)
    seed = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), seed), torch.autograd.grad(wanted, (q, k, v), seed), strict=True):
        close(a, b)


def test_lse_is_of_the_scaled_scores(path):
    q, k, v = inputs(2, 3, 5, 7, 4, 4)
    close(ops.attention(q, k, v, None, False, 0.5)[1], torch.logsumexp(q @ k.transpose(-1, -2) * 0.5, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", [None, MASKS["one head"], MASKS["float"].float()])
def test_low_precision(path, dtype, mask):
    q, k, v = inputs(2, 3, 5, 7, 4, 6, dtype)
    compare(q, k, v, mask, False, tolerance=1e-5 if dtype == torch.float32 else 4e-2)
    assert ops.attention(q, k, v, mask, False, 1.0)[1].dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)])
def test_empty(shape):
    q, k, v = inputs(*shape)
    out, lse = ops.attention(q, k, v, None, False, 1.0)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


LAYOUTS = {
    "by head": lambda: inputs(2, 3, 5, 7, 4, 4),
    "by token": lambda: inputs(2, 3, 5, 7, 4, 4, by_token=True),
    "widths differ": lambda: inputs(2, 3, 5, 7, 4, 6, by_token=True),
    "widths differ by head": lambda: inputs(2, 3, 5, 7, 6, 4),
    "fused": lambda: [x.transpose(1, 2) for x in torch.randn(2, 5, 3, 3, 4, requires_grad=True).unbind(2)],
    "empty": lambda: inputs(0, 3, 5, 7, 4, 4),
    "batch inside": lambda: [x.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in inputs(2, 3, 5, 7, 4, 4)],
    "transposed": lambda: [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs(2, 3, 5, 7, 4, 4)],
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_fake_strides_are_the_real_ones(path, make):
    q, k, v = (x.detach() for x in make())
    out, lse = ops.attention(q, k, v, None, False, 1.0)
    grads = ops.attention_backward(torch.randn_like(out), q, k, v, out, lse, None, False, 1.0)
    with fake_mode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        fake_out, fake_lse = ops.attention(*fakes, None, False, 1.0)
        fake_grads = ops.attention_backward(fake_out, *fakes, fake_out, fake_lse, None, False, 1.0)
    for real, fake in zip((out, lse, *grads), (fake_out, fake_lse, *fake_grads), strict=True):
        assert real.shape == fake.shape and real.dtype == fake.dtype
        assert real.numel() == 0 or real.stride() == fake.stride()


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_with_a_bias_results_lie_as_without(make):
    """Of heads that are views of tokens, such views: what follows joins them without a copy."""
    q, k, v = (x.detach() for x in make())
    rest = (None, None, None, False, 1.0, 0.0, 0, [], [], [], [], [])
    found = ops.chunked_attention(q, k, v, *rest)
    with fake_mode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        fake = ops.chunked_attention(*fakes, *rest)
        alike = ops.attention(*fakes, None, False, 1.0)[0]
        fake_grads = ops.chunked_attention_backward(fake[0], *fake, *fakes, *rest)
    grads = ops.chunked_attention_backward(torch.randn_like(found[0]), *found, q, k, v, *rest)
    assert fake[0].stride() == alike.stride()
    for real, promised in zip((*found, *grads), (*fake, *fake_grads), strict=True):
        assert real.numel() == 0 or real.stride() == promised.stride()


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_any_layout(path, make, masked):
    """Of the operands, of what the forward left, and of the gradient: expanded and transposed."""
    q, k, v = (x.detach().double().requires_grad_() for x in make())
    mask = (torch.rand(k.shape[2], q.shape[2]) < 0.7).mT if masked else None
    out, lse = ops.attention(q, k, v, mask, False, 0.5)
    wanted = reference(q, k, v, mask, False, 0.5)
    close(out, wanted)
    turned = out.detach().mT.contiguous().mT
    for seed in (torch.ones(()).double().expand(out.shape), torch.randn_like(wanted).mT.contiguous().mT):
        found = ops.attention_backward(seed, q, k, v, turned, lse, mask, False, 0.5)
        for a, b in zip(found, torch.autograd.grad(wanted, (q, k, v), seed, retain_graph=True), strict=True):
            close(a, b)


def test_traces_to_two_nodes_without_a_square_tensor():
    size = 96

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = ops.attention(q, k, v, None, True, 0.5)[0]
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    graph = make_fx(step, tracing_mode="fake")(*inputs(2, 3, size, size, 4, 4)).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets.count(ops.attention.default) == 1 and targets.count(ops.attention_backward.default) == 1
    for node in graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else [values]:
            assert not isinstance(value, Tensor) or list(value.shape).count(size) < 2, node


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", [None, "padding", "square", "per row"])
def test_cuda_kernels_are_called_with_what_they_take(dtype, mask):
    """Shapes and argument types alone, on meta tensors: no GPU is needed."""
    q, k, v = (torch.empty(2, 3, s, d, device="meta", dtype=dtype) for s, d in ((5, 12), (7, 12), (7, 10)))
    added = None
    if mask is not None:
        shape = MASKS[mask].shape
        added = torch.empty((1,) * (4 - len(shape)) + shape, device="meta", dtype=torch.bool)
    out, lse = module._efficient_forward(q, k, v, added, True, 0.5)
    assert out.shape == (2, 3, 5, 10) and lse.shape == (2, 3, 5) and lse.dtype == torch.float32
    grads = [module._efficient_backward(torch.empty_like(out), q, k, v, out, lse, added, True, 0.5)]
    if added is None and dtype == torch.bfloat16:
        out, lse = module._flash_forward(q, k, v, False, 0.5)
        assert out.shape == (2, 3, 5, 10) and lse.shape == (2, 3, 5)
        grads.append(module._flash_backward(torch.empty_like(out), q, k, v, out, lse, False, 0.5))
    for found in grads:
        assert [x.shape for x in found] == [x.shape for x in (q, k, v)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA kernels need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(4, 4), (5, 3), (64, 128)])
def test_cuda_equals_cpu(dtype, mask, causal, widths):
    q, k, v = (x.detach().to(dtype) for x in inputs(2, 3, 5, 7, *widths))
    mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    wanted, lse = ops.attention(q, k, v, mask, causal, 0.3)
    seed = torch.randn_like(wanted)
    wanted_grads = ops.attention_backward(seed, q, k, v, wanted, lse, mask, causal, 0.3)
    there = [x if x is None else x.cuda() for x in (q, k, v, mask)]
    out, lse = ops.attention(*there, causal, 0.3)
    grads = ops.attention_backward(seed.cuda(), *there[:3], out, lse, there[3], causal, 0.3)
    for a, b in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        close(a.cpu(), b, tolerance)


@pytest.mark.parametrize("mask", ["none", "padding", "one head", "dead rows"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shared_key_and_value_heads(path, mask: str, groups: int) -> None:
    """Query heads 0..3 share keys and values in rows; their gradients are summed."""
    q, k, v = inputs(2, 4, 5, 7, by_token=True)
    few = [x[:, :groups].detach().requires_grad_() for x in (k, v)]
    many = [x.repeat_interleave(4 // groups, 1) for x in few]
    seed = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    found = ops.attention(q, *few, MASKS[mask], False, 0.37)[0]
    wanted = reference(q, *many, MASKS[mask], False, 0.37)
    close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, (q, *few), seed), torch.autograd.grad(wanted, (q, *few), seed), strict=True):
        close(a, b)
