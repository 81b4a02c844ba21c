"""Small collectives of the batch alone run beside the forward, and give what they gave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from programs import case, plan, program
from torch import fx

from shardwright.passes.hoist import hoist
from shardwright.passes.ops.collectives import COMMUNICATION, ops, use_communicator
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.program import Mesh

aten = torch.ops.aten
LAYERS = 6


def graph(body: Callable[..., Any]) -> fx.GraphModule:
    """Over a weight [4, 4] and an input [3, 4]: `body(call, w, x)` gives the result; `call` adds a node with its value."""
    g = fx.Graph()
    places = [g.placeholder("w"), g.placeholder("x")]
    for place, key, shape in zip(places, ("param.w", "input.x"), ((4, 4), (3, 4)), strict=True):
        place.meta |= {"key": key, "val": torch.empty(shape, device="meta")}

    def call(op: Any, *args: Any) -> fx.Node:
        node = g.call_function(op, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = torch.empty_like(values[0]) if op in COMMUNICATION else op(*values)
        return node

    g.output((body(call, *places),))
    return fx.GraphModule(torch.nn.Module(), g)


def layers(call: Callable[..., fx.Node], w: fx.Node, x: fx.Node, reduced: int | None = None) -> fx.Node:
    for i in range(LAYERS):
        x = call(aten.mm.default, x, w)
        if i == reduced:
            x = call(ops.all_reduce.default, x, "dp")
    return x


def counted(call: Callable[..., fx.Node], w: fx.Node, x: fx.Node) -> fx.Node:
    """A mean over what all ranks count, as in a loss over the tokens that are not masked."""
    total = call(aten.sum.default, layers(call, w, x))
    return call(aten.div.Tensor, total, call(ops.all_reduce.default, call(aten.sum.default, x), "dp"))


def twice_counted(call: Callable[..., fx.Node], w: fx.Node, x: fx.Node) -> fx.Node:
    """A second sum, of what the first one gave; between them and their readers a collective of activations."""
    y = call(aten.sum.default, layers(call, w, x, reduced=1))
    first = call(ops.all_reduce.default, call(aten.sum.default, x), "dp")
    second = call(ops.all_reduce.default, call(aten.mul.Tensor, first, 2.0), "dp")
    other = call(ops.all_reduce.default, call(aten.mean.default, x), "dp")
    return call(aten.div.Tensor, y, call(aten.add.Tensor, second, other))


def results(gm: fx.GraphModule) -> list[torch.Tensor]:
    def body(rank: int, world: Any) -> torch.Tensor:
        torch.manual_seed(rank)
        with use_communicator(world.communicator(Mesh(("dp",), (2,)), rank)):
            return gm(torch.randn(4, 4), torch.randn(3, 4))[0]

    return run_ranks(2, body)


def targets(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_a_sum_runs_beside_the_forward() -> None:
    before = graph(counted)
    after = hoist(copy.deepcopy(before))
    found = targets(after)
    start, wait = found.index(ops.start_all_reduce.default), found.index(ops.wait.default)
    assert found[0] == aten.sum.default, "its operand is computed first"
    assert 2 <= start <= wait - 3, "it is started with work on both sides"
    assert found[wait + 1] == aten.div.Tensor, "and awaited by its reader"
    after.recompile()
    assert all(map(torch.equal, results(before), results(after)))


def test_collectives_keep_one_order_on_all_ranks() -> None:
    before = graph(twice_counted)
    after = hoist(copy.deepcopy(before))
    communication = [n for n in after.graph.nodes if n.target in COMMUNICATION]
    assert [n.target for n in communication] == [
        ops.all_reduce.default,  # the second sum's operand
        ops.start_all_reduce.default,
        ops.start_all_reduce.default,
        ops.all_reduce.default,
    ]
    assert communication[-1].args[0].target == aten.mm.default
    after.recompile()
    assert all(map(torch.equal, results(before), results(after)))


def test_tokens_are_counted_beside_the_layers() -> None:
    forward = program(case("llama"), plan(dp_shard=2)).graphs["forward"].graph
    nodes = list(forward.graph.nodes)
    (start,) = [i for i, n in enumerate(nodes) if n.target == ops.start_all_reduce.default]
    (wait,) = [i for i, n in enumerate(nodes) if n.target == ops.wait.default]
    between = {n.meta.get("block") for n in nodes[start:wait]}
    assert len(between - {None}) >= 1
    assert not [n for n in nodes if n.target == ops.all_reduce.default]
