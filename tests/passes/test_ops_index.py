"""Losses and embeddings: against ATen, and shards against the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.passes.ops import StaticCommunicator, losses, ops, use_communicator
from shardwright.passes.ops.collectives import join_shards, take_shard
from shardwright.passes.types import flatten_sections

SECTIONS = {
    "even": ((5, 5, 5),),
    "uneven": ((7, 6, 2),),
    "empty shard": ((8, 0, 7),),
    "sections": ((2, 3, 1), (4, 0, 2), (1, 1, 1)),
    "one rank": ((15,),),
}


def ranks(sections):
    n = len(sections[0])
    for index in range(n):
        with use_communicator(StaticCommunicator({"tp": n}, {"tp": index})):
            yield index


def grad(out: Tensor, x: Tensor, seed: Tensor) -> Tensor:
    return torch.autograd.grad(out, x, seed)[0]


@pytest.fixture(params=[1 << 16, 8])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "chunk_elements", lambda device: request.param)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 11), (0, 5), (3, 1), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logsumexp(chunk, shape, dtype):
    x = (torch.randn(shape) * 30).to(dtype).requires_grad_()
    out = ops.logsumexp(x)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    precise = x.detach().double().requires_grad_()
    wanted = torch.logsumexp(precise, -1)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    seed = torch.randn(out.shape, dtype=out.dtype)
    wanted_grad = grad(wanted, precise, seed.double())
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(grad(out, x, seed).double(), wanted_grad, rtol=tolerance, atol=tolerance)


def test_logsumexp_of_infinities(chunk):
    inf = torch.inf
    x = torch.tensor([[-inf, -inf, -inf], [-inf, 1.0, 2.0], [1.0, inf, 0.0], [-3e38, 3e38, 0.0]], requires_grad=True)
    out = ops.logsumexp(x)
    assert torch.equal(out, torch.logsumexp(x, -1))
    found = grad(out, x, torch.ones(4))
    assert torch.equal(found[0], torch.zeros(3)) and found[[0, 1, 3]].isfinite().all()


def test_logsumexp_takes_any_layout(chunk):
    x = torch.randn(5, 4, 3, dtype=torch.float64).transpose(0, 2)
    lse = ops.logsumexp(x)
    torch.testing.assert_close(lse, torch.logsumexp(x, -1))
    expanded = torch.ones((), dtype=torch.float64).expand(lse.shape)
    torch.testing.assert_close(ops.logsumexp_backward(expanded, x, lse), torch.softmax(x, -1))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (0, 6), (4, 0)])
def test_pick(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    index = torch.randint(-3, shape[-1] + 3, shape[:-1])
    inside = (index >= 0) & (index < shape[-1])
    out = ops.pick(x, index)
    seed = torch.randn(out.shape, dtype=torch.float64)
    padded = F.pad(x, (0, 1))
    wanted = padded.gather(-1, index.where(inside, shape[-1]).unsqueeze(-1)).squeeze(-1)
    assert torch.equal(out, wanted)
    assert torch.equal(grad(out, x, seed), grad(wanted, x, seed))


@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS.keys())
def test_pick_shards_add_up(sections):
    x = torch.randn(40, 15, dtype=torch.float64, requires_grad=True)
    index = torch.randint(-2, 18, (40,))
    whole = ops.pick(x, index)
    seed = torch.randn(40, dtype=torch.float64)
    wanted = grad(whole, x, seed)
    total, gradients = torch.zeros_like(whole), []
    sizes = flatten_sections(sections)
    for rank in ranks(sections):
        part = take_shard(x.detach(), 1, sections, rank).clone().requires_grad_()
        out = ops.pick_shard(part, index, "tp", sizes)
        total = total + out.detach()
        gradients.append(grad(out, part, seed))
    assert torch.equal(total, whole) and torch.equal(join_shards(gradients, 1, sections), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS.keys())
def test_softmax_minus_onehot(chunk, sections, dtype):
    x = torch.randn(4, 5, 15).to(dtype)
    index = torch.randint(-2, 18, (4, 5))
    lse = ops.logsumexp(x)
    grad_lse, grad_pick = torch.randn(4, 5).to(lse.dtype), torch.randn(4, 5).to(dtype)
    wanted = ops.logsumexp_backward(grad_lse, x, lse) + ops.pick_backward(grad_pick, index, 15)
    whole = ops.softmax_minus_onehot(x, lse, index, grad_lse, grad_pick)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(whole, wanted, rtol=tolerance, atol=tolerance)
    parts = []
    for rank in ranks(sections):
        part = take_shard(x, 2, sections, rank)
        parts.append(ops.softmax_minus_onehot_shard(part, lse, index, grad_lse, grad_pick, "tp", flatten_sections(sections)))
    assert torch.equal(join_shards(parts, 2, sections), whole)


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(torch.autograd.grad(ops.logsumexp(x).sum(), x, create_graph=True)[0].sum(), x)


def test_cross_entropy_of_the_parts():
    x = torch.randn(9, 15, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 15, (9,)).index_fill(0, torch.tensor([2, 5]), -100)
    loss = ((ops.logsumexp(x) - ops.pick(x, labels)) * (labels != -100)).sum() / 7
    wanted = F.cross_entropy(x, labels)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, wanted)))


@pytest.mark.parametrize("padding_idx", [-1, 0, 7])
@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS.keys())
@pytest.mark.parametrize("shape", [(4, 9), (), (0, 3)])
def test_embedding_shards_add_up(sections, padding_idx, shape):
    weight = torch.randn(15, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 15, shape)
    whole = F.embedding(ids, weight, padding_idx=None if padding_idx < 0 else padding_idx)
    seed = torch.randn(whole.shape, dtype=torch.float64)
    wanted = grad(whole, weight, seed)
    total, gradients = torch.zeros_like(whole), []
    for rank in ranks(sections):
        part = take_shard(weight.detach(), 0, sections, rank).clone().requires_grad_()
        out = ops.embedding_shard(part, ids, padding_idx, "tp", flatten_sections(sections))
        total = total + out.detach()
        gradients.append(grad(out, part, seed))
    assert torch.equal(total, whole)
    torch.testing.assert_close(join_shards(gradients, 0, sections), wanted)


@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS.keys())
def test_gather_shards_add_up(sections):
    x = torch.randn(4, 15, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 15, (4, 6, 2))
    whole = x.gather(1, index)
    seed = torch.randn(whole.shape, dtype=torch.float64)
    total, gradients = torch.zeros_like(whole), []
    for rank in ranks(sections):
        part = take_shard(x.detach(), 1, sections, rank).clone().requires_grad_()
        out = ops.gather_shard(part, 1, index, "tp", flatten_sections(sections))
        total = total + out.detach()
        gradients.append(grad(out, part, seed))
        beyond = ops.gather_shard(part, 1, torch.full((1, 1, 1), 15), "tp", flatten_sections(sections))
        assert beyond.isnan().all() or not part.shape[1]
    assert torch.equal(total, whole)
    torch.testing.assert_close(join_shards(gradients, 1, sections), grad(whole, x, seed))


@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS.keys())
@pytest.mark.parametrize(
    "start, step, dtype", [(0, 1, torch.int64), (3, -2, torch.int64), (0.5, 0.25, torch.float32), (1, 2, torch.float64)]
)
def test_arange_shards_join(sections, start, step, dtype):
    parts = [ops.arange_shard(start, step, "tp", flatten_sections(sections), dtype) for _ in ranks(sections)]
    assert torch.equal(join_shards(parts, 0, sections), torch.arange(15, dtype=torch.float64).mul(step).add(start).to(dtype))


def test_shapes_are_known_without_values():
    def step(x: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        hidden = ops.embedding_shard(weight, ids, -1, "tp", [7, 8]) @ x
        offset = ops.arange_shard(0, 1, "tp", [2, 3], torch.float64)
        loss = (
            (ops.logsumexp(hidden) - ops.pick_shard(hidden, ids, "tp", [2, 3])).sum() + ops.pick(hidden, ids).sum() + offset.sum()
        )
        return torch.autograd.grad(loss, (x, weight))

    args = [torch.randn(6, 3, requires_grad=True), torch.randn(8, 6, requires_grad=True), torch.randint(0, 15, (4, 2))]
    with use_communicator(StaticCommunicator({"tp": 2}, {"tp": 1})):
        graph = make_fx(step, tracing_mode="fake")(*args)
        targets = {node.target for node in graph.graph.nodes}
        backwards = {getattr(ops, f"{name}_backward").default for name in ("logsumexp", "pick", "pick_shard", "embedding_shard")}
        assert backwards <= targets
        for found, wanted in zip(graph(*args), step(*args), strict=True):
            torch.testing.assert_close(found, wanted)
