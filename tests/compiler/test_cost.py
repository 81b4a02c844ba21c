import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from shardwright.compiler.cost import (
    Seconds,
    backward_seconds,
    call_of,
    conversion_bytes,
    conversion_seconds,
    graph_cost,
    op_bytes,
    op_flops,
    op_seconds,
)
from shardwright.compiler.topology import Topology, collective_seconds
from shardwright.passes.convert import convert
from shardwright.passes.ops.collectives import StaticCommunicator, ops, use_communicator
from shardwright.passes.rules.base import Axis, OpCall, Operand, Strategy, TensorMeta
from shardwright.passes.types import I, P, R, shard
from shardwright.runtime.program import Mesh

aten = torch.ops.aten
BF16 = torch.bfloat16
H100 = Topology.preset("h100", nodes=2)
B, S, H, D, K, N = 2, 128, 4, 16, 64, 96


def call(target, *args, results, grad=False, **kwargs):
    """An OpCall; a tuple among the arguments is the shape of an operand."""
    shapes = [a for a in args if isinstance(a, tuple)]
    operands = iter(range(len(shapes)))
    arguments = tuple(Operand(next(operands)) if isinstance(a, tuple) else a for a in args)
    return OpCall(
        target, arguments, kwargs, tuple(TensorMeta(s, BF16, grad) for s in shapes), tuple(TensorMeta(r, BF16) for r in results)
    )


@pytest.mark.parametrize(
    ("made", "flops"),
    [
        (call(aten.mm.default, (S, K), (K, N), results=[(S, N)]), 2 * S * K * N),
        (call(aten.addmm.default, (N,), (S, K), (K, N), results=[(S, N)]), 2 * S * K * N),
        (call(aten.bmm.default, (B, S, K), (B, K, N), results=[(B, S, N)]), 2 * B * S * K * N),
        (call(aten.linear.default, (B, S, K), (N, K), results=[(B, S, N)]), 2 * B * S * K * N),
        (call(aten.convolution.default, (B, 3, 8, 8), (16, 3, 3, 3), results=[(B, 16, 8, 8)]), 2 * B * 16 * 64 * 27),
        (
            call(aten.convolution.default, (B, 3, 8), (3, 5, 2), None, [2], [0], [1], True, [0], 1, results=[(B, 5, 16)]),
            2 * B * 3 * 8 * 5 * 2,
        ),
        (
            call(ops.attention.default, *[(B, H, S, D)] * 3, None, False, 1.0, results=[(B, H, S, D), (B, H, S)]),
            4 * B * H * S * S * D,
        ),
        (
            call(ops.attention.default, *[(B, H, S, D)] * 3, None, True, 1.0, results=[(B, H, S, D), (B, H, S)]),
            2 * B * H * S * S * D,
        ),
        (
            call(ops.attention_backward.default, *[(B, H, S, D)] * 5, (B, H, S), None, True, 1.0, results=[(B, H, S, D)] * 3),
            5 * B * H * S * S * D,
        ),
        (
            call(aten.scaled_dot_product_attention.default, *[(B, H, S, D)] * 3, None, 0.0, True, results=[(B, H, S, D)]),
            2 * B * H * S * S * D,
        ),
        (call(ops.grouped_linear.default, (S, K), (8, N, K), (S,), results=[(S, N)]), 2 * S * K * N),
        (call(ops.grouped_linear_grad_x.default, (S, N), (8, N, K), (S,), results=[(S, K)]), 2 * S * K * N),
        (call(ops.grouped_linear_grad_w.default, (S, N), (S, K), (S,), 8, results=[(8, N, K)]), 2 * S * K * N),
        (call(ops.grouped_linear_shard.default, (S, K), (8, N, K), (S,), "tp", [8, 4], results=[(S, N)]), 2 * S * K * N * 2 / 3),
        (
            call(ops.grouped_linear_shard_grad_x.default, (S, N), (8, N, K), (S,), "tp", [8, 4], results=[(S, K)]),
            2 * S * K * N * 2 / 3,
        ),
        (
            call(ops.grouped_linear_shard_grad_w.default, (S, N), (S, K), (S,), 8, "tp", [8, 4], results=[(8, N, K)]),
            2 * S * K * N * 2 / 3,
        ),
        (call(aten.add.Tensor, (S, K), (S, K), results=[(S, K)]), 0),
    ],
)
def test_flops_of_products(made, flops):
    assert op_flops(made) == flops


def test_flops_agree_with_torch():
    x, w, k = torch.ones(4, 6), torch.ones(5, 6), torch.ones(7, 3, 3, 3)
    image = torch.ones(2, 3, 10, 10)

    def program(x, w, k, image):
        return torch.ops.aten.linear(x, w), torch.ops.aten.convolution(image, k, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)

    gm = fx.symbolic_trace(program)
    values = {}

    class Record(fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    with FlopCounterMode(display=False) as counter:
        Record(gm).run(x, w, k, image)
    for node, value in values.items():
        node.meta["val"] = value
    assert sum(op_flops(call_of(n)) for n in gm.graph.nodes if n.op == "call_function") == counter.get_total_flops()


def test_bytes():
    assert op_bytes(call(aten.add.Tensor, (S, K), (S, K), results=[(S, K)])) == 3 * S * K * 2
    assert op_bytes(call(aten.view.default, (S, K), results=[(K, S)])) == 0
    assert op_bytes(call(aten.embedding.default, (50000, K), (S,), results=[(S, K)])) == 2 * S * K * 2 + S * 2


def test_roofline():
    device = H100.device
    small = call(aten.add.Tensor, (8,), (8,), results=[(8,)])
    assert op_seconds(small, device) == pytest.approx(device.launch, rel=1e-3)
    large = call(aten.mm.default, (8192, 8192), (8192, 8192), results=[(8192, 8192)], grad=True)
    assert op_seconds(large, device) == pytest.approx(
        2 * 8192**3 / (device.flops["bfloat16"] * device.matmul_efficiency) + device.launch
    )
    assert backward_seconds(large, device) == 2 * op_seconds(large, device)
    thin = call(aten.mm.default, (8192, 1), (1, 8192), results=[(8192, 8192)])
    assert op_seconds(thin, device) > 8192 * 8192 * 2 / device.bandwidth


V0, V1 = shard(0, 64, 8), shard(1, 64, 8)
WHOLE = 8e6
WIRE = 7 / 8 * WHOLE


@pytest.mark.parametrize(
    ("src", "dst", "forward", "backward"),
    [
        (I, R, 0, 2 * WIRE),
        (I, V0, 0, WIRE),
        (V0, I, WIRE, 0),
        (V0, R, WIRE, WIRE),
        (V0, V1, WIRE / 8, WIRE / 8),
        (P, I, 2 * WIRE, 0),
        (P, R, 2 * WIRE, 2 * WIRE),
        (P, V0, WIRE, WIRE),
        (R, V0, 0, 0),
        (R, P, 0, 0),
        (R, I, math.inf, math.inf),
        (V0, P, math.inf, math.inf),
        (V0, V0, 0, 0),
    ],
)
def test_conversions_cost_what_the_table_says(src, dst, forward, backward):
    cost = conversion_bytes(src, dst, WHOLE, 8, grad=True)
    assert (cost.forward, cost.backward) == (forward, backward)
    span = H100.span(Mesh(("tp",), (8,)), "tp")
    seconds = conversion_seconds(src, dst, WHOLE, span, H100.device, grad=True)
    assert math.isinf(seconds.total) == math.isinf(cost.total)
    assert seconds.forward >= forward / H100.levels[0].bandwidth and seconds.backward >= backward / H100.levels[0].bandwidth


def test_without_gradient_only_the_forward_is_paid():
    assert conversion_bytes(R, I, WHOLE, 8, grad=False).total == 0
    assert conversion_bytes(I, R, WHOLE, 8, grad=False).total == 0
    assert conversion_bytes(V0, I, WHOLE, 8, grad=False).total == WIRE
    assert conversion_bytes(P, R, WHOLE, 8, grad=False).total == 2 * WIRE


def test_a_graph_costs_its_ops_and_its_collectives():
    mesh = Mesh(("dp_shard", "tp"), (2, 8))
    g = fx.Graph()
    x, w = g.placeholder("x"), g.placeholder("w")
    x.meta["val"], w.meta["val"] = torch.empty(S, K, dtype=BF16), torch.empty(N, K, dtype=BF16)
    y = g.call_function(aten.linear.default, (x, w))
    y.meta["val"] = torch.empty(S, N, dtype=BF16)
    z = g.call_function(ops.all_reduce.default, (y, "tp"))
    z.meta["val"] = torch.empty(S, N, dtype=BF16)
    g.output((z,))
    gm = fx.GraphModule(torch.nn.Module(), g)
    with use_communicator(StaticCommunicator({"tp": 8, "dp_shard": 2}, {"tp": 0, "dp_shard": 0})):
        cost = graph_cost(gm, H100, mesh)
    assert cost.flops == 2 * S * K * N
    assert cost.received == {"tp": 2 * 7 / 8 * S * N * 2}
    expected = collective_seconds("all_reduce", S * N * 2, H100.span(mesh, "tp")) + H100.device.launch
    assert cost.communication == {"tp": pytest.approx(expected)}
    assert cost.seconds == pytest.approx(cost.compute + expected)


ROWS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "softmax_shard": (lambda x: ops.softmax_shard(x, 1, None, "tp"), (S, N)),
    "log_softmax_shard": (lambda x: ops.log_softmax_shard(x, 1, None, "tp"), (S, N)),
    "logsumexp_shard": (lambda x: ops.logsumexp_shard(x, "tp"), (S,)),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_ranks_exchange_inside_of_an_op_is_priced_as_what_it_becomes(name):
    """Of each row that is sharded one value: the collectives that are there once the op is differentiated."""
    mesh, (run, shape) = Mesh(("tp",), (8,)), ROWS[name]

    def both(x):
        y = run(x)
        return y, torch.autograd.grad(y, x, torch.ones_like(y))

    with use_communicator(StaticCommunicator({"tp": 8}, {"tp": 0})):
        gm = make_fx(both, tracing_mode="fake")(torch.randn(S, N).requires_grad_())
        found = graph_cost(gm, H100, mesh)
    arguments = (Operand(0), "tp") if name == "logsumexp_shard" else (Operand(0), 1, None, "tp")
    target, float32 = getattr(ops, name).default, torch.float32
    sharded = OpCall(target, arguments, {}, (TensorMeta((S, N), float32, True),), (TensorMeta(shape, float32),))
    assert Seconds(H100, mesh)._inside(sharded).once == pytest.approx(found.communication["tp"])
    forward = replace(sharded, operands=(TensorMeta((S, N), float32),))
    assert 0 < Seconds(H100, mesh)._inside(forward).once <= found.communication["tp"]


def test_prices_in_seconds_prefer_sharded_work():
    prices = Seconds(H100, Mesh(("tp",), (8,)))
    axis = Axis("tp", 8)
    linear = call(aten.linear.default, (8192, 4096), (4096, 4096), results=[(8192, 4096)], grad=True)
    whole = Strategy("I", (I, I), (I,))
    split = Strategy("n", (R, shard(0, 4096, 8)), (shard(1, 4096, 8),))
    assert prices.node(linear, split, axis, (False, True)) < prices.node(linear, whole, axis, (False, True)) / 4
    assert prices.placeholder(R, TensorMeta((4096, 4096), BF16, True), axis) > 0
    assert prices.placeholder(I, TensorMeta((4096, 4096), BF16, True), axis) == 0
    assert math.isinf(prices.conversion(R, I, TensorMeta((64, 64), BF16, True), axis))


def test_a_conversion_over_another_axis_is_priced_at_what_this_one_leaves():
    """So that a value is summed over the data ranks while it is a shard of the tensor axis, and gathered after it."""
    mesh = Mesh(("dp_shard", "tp"), (8, 8))
    prices, axis = Seconds(Topology.preset("h100", nodes=8), mesh), Axis("tp", 8)
    meta = TensorMeta((8192, 4096), BF16, True)
    summed = OpCall(convert, (Operand(0), "dp_shard", P, I), {}, (meta,), (meta,))
    whole, split = Strategy("I", (I,), (I,)), Strategy("d0", (shard(0, 8192, 8),), (shard(0, 8192, 8),))
    span = prices.topology.span(mesh, "dp_shard")

    def expected(size: float) -> float:
        return prices.topology.device.launch + collective_seconds("all_reduce", size, span)

    assert prices.node(summed, whole, axis, ()) == pytest.approx(expected(8192 * 4096 * 2))
    assert prices.node(summed, split, axis, ()) == pytest.approx(expected(1024 * 4096 * 2))
    over_time = replace(summed, args=(Operand(0), "mb", P, I))
    assert prices.node(over_time, whole, axis, ()) == 0.0
