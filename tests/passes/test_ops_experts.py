"""The grouped matmul of experts, against one matmul per row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.compiler.cost import Seconds
from shardwright.compiler.topology import Topology
from shardwright.passes.ops import experts as module
from shardwright.passes.ops import ops
from shardwright.passes.ops.collectives import StaticCommunicator, join_shards, take_shard, use_communicator
from shardwright.passes.rules.base import Axis, OpCall, Operand, TensorMeta, strategies
from shardwright.passes.types import Sections, flatten_sections, shard
from shardwright.runtime.program import Mesh

EXPERTS = {
    "mixed": torch.tensor([3, 0, 1, 1, 3, 0, 4, 1, 0]),
    "sorted": torch.tensor([0, 0, 1, 3, 3, 3, 4, 4, 4]),
    "one": torch.full((9,), 2),
    "outside": torch.tensor([-1, 0, 5, 4, -7, 9, 2, 2, 5]),
    "all outside": torch.full((9,), 5),
    "none": torch.tensor([], dtype=torch.int64),
}


def reference(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    inside = (expert >= 0) & (expert < weight.shape[0])
    chosen = weight[expert.where(inside, 0)] * inside[:, None, None]
    return torch.einsum("tnk,tk->tn", chosen, x)


def operands(expert: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(len(expert), 8, dtype=dtype, requires_grad=True), torch.randn(5, 16, 8, dtype=dtype, requires_grad=True)


def compare(expert: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = operands(expert, dtype)
    out, wanted = ops.grouped_linear(x, weight, expert), reference(x, weight, expert)
    seed = torch.randn_like(wanted)
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(out, (x, weight), seed), torch.autograd.grad(wanted, (x, weight), seed), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("expert", EXPERTS.values(), ids=EXPERTS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_one_matmul_per_row(expert, dtype):
    compare(expert, dtype, {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype])


@pytest.mark.parametrize("name", [name for name in EXPERTS if name != "none"])
def test_the_grouped_kernel(name, monkeypatch):
    """torch's grouped_mm, which the op leaves to CUDA, has a CPU form: enough to check how it is called."""
    monkeypatch.setattr(module, "_use_grouped_kernel", lambda *_: True)
    compare(EXPERTS[name], torch.bfloat16, 5e-2)


def test_strided_operands():
    expert = EXPERTS["sorted"]
    x, weight = operands(expert, torch.float64)
    turned, wide = x.detach().t().contiguous().t(), weight.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(ops.grouped_linear(turned, wide, expert), reference(x, weight, expert))
    once = torch.ones((), dtype=torch.float64).expand(9, 16)
    torch.testing.assert_close(
        ops.grouped_linear_grad_w(once, turned, expert, 5), ops.grouped_linear_grad_w(once.clone(), x, expert, 5)
    )


def test_gradients_are_two_nodes():
    def step(x: Tensor, weight: Tensor, expert: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.grouped_linear(x, weight, expert).square().sum(), (x, weight))

    args = (*operands(EXPERTS["mixed"], torch.float64), EXPERTS["mixed"])
    graph = make_fx(step, tracing_mode="fake")(*args)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(ops.grouped_linear_grad_x.default) == targets.count(ops.grouped_linear_grad_w.default) == 1
    for found, wanted in zip(graph(*args), step(*args), strict=True):
        assert torch.equal(found, wanted)


def test_a_frozen_weight_costs_nothing():
    x, weight = operands(EXPERTS["mixed"], torch.float64)
    graph = make_fx(lambda x, w, e: torch.autograd.grad(ops.grouped_linear(x, w, e).sum(), x)[0], tracing_mode="fake")(
        x, weight.detach(), EXPERTS["mixed"]
    )
    assert ops.grouped_linear_grad_w.default not in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("sections", [((2, 3),), ((5, 0, 0),), ((1, 1, 1), (0, 1, 1))], ids=str)
def test_shards_of_experts_add_up(name: str, sections: Sections) -> None:
    expert = EXPERTS[name]
    x, weight = operands(expert, torch.float64)
    whole = ops.grouped_linear(x, weight, expert)
    seed = torch.randn_like(whole)
    wanted = torch.autograd.grad(whole, (x, weight), seed)
    total, grad_x, grad_w = torch.zeros_like(whole), torch.zeros_like(x), []
    n = len(sections[0])
    for rank in range(n):
        with use_communicator(StaticCommunicator({"tp": n}, {"tp": rank})):
            part = take_shard(weight.detach(), 0, sections, rank).clone().requires_grad_()
            out = ops.grouped_linear_shard(x, part, expert, "tp", flatten_sections(sections))
            gradients = torch.autograd.grad(out, (x, part), seed)
        total, grad_x = total + out, grad_x + gradients[0]
        grad_w.append(gradients[1])
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(grad_x, wanted[0])
    torch.testing.assert_close(join_shards(grad_w, 0, sections), wanted[1])


def test_a_rank_multiplies_the_rows_of_its_experts_alone() -> None:
    """However the experts are cut: a mixture whose widths do not divide still shares its work."""
    call = OpCall(
        ops.grouped_linear.default,
        tuple(map(Operand, range(3))),
        {},
        (TensorMeta((9, 7), torch.float64, True), TensorMeta((4, 5, 7), torch.float64, True), TensorMeta((9,), torch.int64)),
        (TensorMeta((9, 5), torch.float64, True),),
    )
    axis = Axis("tp", 2)
    (found,) = [s for s in strategies(call, axis) if s.label == "e"]
    assert (str(found.ins[0]), found.ins[1], str(found.outs[0])) == ("R", shard(0, 4, 2), "P")
    seconds = Seconds(Topology.preset("h100", devices=2), Mesh(("tp",), (2,)))
    cost = {s.label: seconds.node(call, s, axis, (False, True, False)) for s in strategies(call, axis)}
    assert cost["e"] < cost["I"]
