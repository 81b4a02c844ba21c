"""Values that change their types over several axes: to the same values and gradients, and by a way than which none is cheaper."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from shardwright.compiler.check_rule import deal, differentiable, join
from shardwright.compiler.cost import Seconds
from shardwright.compiler.topology import Topology
from shardwright.passes.check import check
from shardwright.passes.convert import convert, exists, is_free
from shardwright.passes.graph_tools import LazyGraphModule, Values, op_calls
from shardwright.passes.ops import StaticCommunicator
from shardwright.passes.ops.collectives import use_communicator
from shardwright.passes.reroute import reroute
from shardwright.passes.routes import Types, all_see, cheapest_route
from shardwright.passes.rules.base import Axis, TensorMeta, largest_shard, strategies, unsharded
from shardwright.passes.shard import shard as shard_graph
from shardwright.passes.types import I, P, R, Type, Varying, gradient_type, shard
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.program import Mesh

Part = Mapping[tuple[int, ...], Tensor]


class Machine:
    """Nodes of eight devices, of which the mesh takes the first ones."""

    def __init__(self, **sizes: int) -> None:
        self.mesh = Mesh(tuple(sizes), tuple(sizes.values()))
        self.seconds = Seconds(Topology.preset("h100", devices=max(8, self.mesh.world_size)), self.mesh)
        names = [*sizes]
        self.axes = [Axis(name, n, tuple(names[:k]) if name != "mb" else ()) for k, (name, n) in enumerate(sizes.items())]
        self.places = [*itertools.product(*(range(n) for n in sizes.values()))]

    def communicator(self, place: Sequence[int]) -> StaticCommunicator:
        return StaticCommunicator(
            dict(zip(self.mesh.axes, self.mesh.sizes, strict=True)), dict(zip(self.mesh.axes, place, strict=True))
        )

    def types(self, meta: TensorMeta) -> list[Types]:
        """A value's, over all axes."""
        found: list[tuple[Types, TensorMeta]] = [((), meta)]
        for axis in self.axes:
            found = [((*t, own), largest_shard(m, own)) for t, m in found for own in kinds(m, axis)]
        return [types for types, _ in found]

    def lower(self, value: Tensor, src: Types, dst: Types, place: Sequence[int], grad: bool) -> fx.GraphModule:
        """The graph of a rank that takes a value with one type over each axis and gives it with others, axis by axis."""
        values, graph = Values(), fx.Graph()
        x = graph.placeholder("x")
        x.meta = {"val": values.like(value), "key": "input.x", "grad": grad, "types": {}, "calls": {}}
        graph.output((x,)).meta = {}
        gm: fx.GraphModule = LazyGraphModule(torch.nn.Module(), graph)
        gm.meta["outputs"] = ("y",)
        with use_communicator(self.communicator(place)):
            for axis, index, a, b in zip(self.axes, place, src, dst, strict=True):
                choice = {}
                for node in gm.graph.nodes:
                    if node.op == "call_function":  # a conversion over an axis before, which takes the value as it comes
                        (source,) = node.all_input_nodes
                        have = a if source.op == "placeholder" else choice[source.name].outs[0]
                        call = op_calls(gm)[node][0]
                        choice[node.name] = next((s for s in strategies(call, axis) if s.ins == (have,) == s.outs), None)
                        if choice[node.name] is None:  # the dim that it changes is cut here: whole first
                            choice[node.name] = strategies(call, axis)[0]
                gm = shard_graph(gm, axis, index, choice, {"input.x": a}, {0: b}, values)
            reroute(gm, self.axes, values, self.seconds.of_conversion)
            if src[-1] != P and not (dst[-1] == R and grad):  # as no graph begins, nor ends
                check(gm, self.axes[-1], place[-1])
            return gm


def kinds(meta: TensorMeta, axis: Axis) -> list[Type]:
    return [I, R, P, *(shard(dim, size, axis.size) for dim, size in enumerate(meta.shape) if size >= axis.size)]


def leads(src: Types, dst: Types, grad: bool) -> bool:
    """Whether over each axis a conversion leads there, and none makes a sum of what is none."""
    return all(is_free(a, b, grad) or (exists(a, b, grad) and b != P) for a, b in zip(src, dst, strict=True))


def dealt(machine: Machine, whole: Tensor, types: Types, generator: torch.Generator) -> Part:
    held = {(): whole}
    for axis, type_ in zip(machine.axes, types, strict=True):
        held = {(*at, i): x for at, v in held.items() for i, x in enumerate(deal(v, type_, axis.size, generator))}
    return held


def joined(machine: Machine, parts: Part, types: Types) -> Tensor:
    for axis, type_ in zip(machine.axes[::-1], types[::-1], strict=True):
        parts = {at: join([parts[*at, i] for i in range(axis.size)], type_) for at in dict.fromkeys(a[:-1] for a in parts)}
    return parts[()]


def run(machine: Machine, graphs: Mapping[tuple[int, ...], fx.GraphModule], x: Part, seeds: Part | None) -> tuple[Part, Part]:
    """Results, and gradients where seeds are given, of every rank."""

    def body(rank: int, world: Any) -> tuple[Tensor, Tensor | None]:
        place = machine.places[rank]
        with use_communicator(world.communicator(machine.mesh, rank)):
            value = leaf = x[place].clone().requires_grad_(seeds is not None)
            nodes = [n for n in graphs[place].graph.nodes if n.op == "call_function"]
            for node in nodes:
                assert node.target is convert
                value = differentiable(value, *node.args[1:])
                assert value.shape == node.meta["val"].shape
            (gradient,) = torch.autograd.grad(value, leaf, seeds[place]) if seeds is not None and nodes else (None,)
            return value.detach(), gradient

    found = dict(zip(machine.places, run_ranks(len(machine.places), body, timeout=60), strict=True))
    return {p: y for p, (y, _) in found.items()}, {p: g for p, (_, g) in found.items() if g is not None}


def run_all(machine: Machine, value: Tensor, src: Types, dst: Types, grad: bool) -> list[fx.Node]:
    """That ranks convert the value rightly, all by the same conversions, which are given."""
    graphs = {place: machine.lower(value, src, dst, place, grad) for place in machine.places}
    said = {repr([n.args[1:] for n in gm.graph.nodes if n.op == "call_function"]) for gm in graphs.values()}
    assert len(said) == 1, said
    generator = torch.Generator().manual_seed(0)
    seed, back = torch.randn(value.shape, dtype=value.dtype, generator=generator), tuple(map(gradient_type, dst))
    results, gradients = run(
        machine, graphs, dealt(machine, value, src, generator), dealt(machine, seed, back, generator) if grad else None
    )
    torch.testing.assert_close(joined(machine, results, dst), value, rtol=1e-10, atol=1e-10)
    if gradients:
        torch.testing.assert_close(joined(machine, gradients, tuple(map(gradient_type, src))), seed, rtol=1e-10, atol=1e-10)
    return [n for n in graphs[machine.places[0]].graph.nodes if n.op == "call_function"]


def check_cheapest(machine: Machine, meta: TensorMeta, src: Types, dst: Types, nodes: Sequence[fx.Node]) -> None:
    """That these conversions cost as little as any, and that they tell what they are on each axis that was lowered after theirs."""
    spent, price = 0.0, machine.seconds.of_conversion
    for node in nodes:
        (source,) = node.all_input_nodes
        _, name, a, b = node.args
        spent += price(name, a, b, unsharded(TensorMeta((*source.meta["val"].shape,), meta.dtype, meta.grad), a))
        names = [axis.name for axis in machine.axes]
        assert {*node.meta["types"]} == {*names}
        assert {*names[names.index(name.split("+")[0]) + 1 :]} <= {*node.meta["calls"]}
    assert spent <= cheapest_route(meta, (src, dst), machine.axes, price)[0] * (1 + 1e-5)


MESHES: list[tuple[dict[str, int], tuple[int, ...], int]] = [
    ({"dp_shard": 2, "tp": 2}, (4, 8), 120),
    ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, (8, 8), 25),
    ({"dp_shard": 2, "tp": 2}, (4, 7), 40),
    ({"dp_shard": 2, "tp": 2}, (5, 8), 40),
    ({"dp_replicate": 2, "dp_shard": 2}, (5, 7), 40),
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("sizes", "shape", "count"), MESHES)
def test_types_over_all_axes(sizes: dict[str, int], shape: tuple[int, ...], count: int, grad: bool) -> None:
    machine, value = Machine(**sizes), torch.randn(shape, dtype=torch.float64)
    meta, made = TensorMeta(shape, value.dtype, grad), 0
    for src, dst in some_pairs(machine, meta, count):
        nodes = run_all(machine, value, src, dst, grad)
        made += len(nodes)
        check_cheapest(machine, meta, src, dst, nodes)
    assert made > count


def some_pairs(machine: Machine, meta: TensorMeta, count: int) -> list[tuple[Types, Types]]:
    """As many pairs of types, the same on all ranks."""
    found = [(a, b) for a, b in itertools.product(machine.types(meta), repeat=2) if leads(a, b, meta.grad)]
    found = [p for p in found if all(all_see(types, machine.axes) for types in p)]
    assert len(found) > count
    return random.Random(0).sample(found, count)


def test_a_dim_that_ranks_cut_otherwise_than_each_other_stays() -> None:
    """Of five rows some have three, of which they cut two and one, and others two."""
    machine, value = Machine(dp_shard=2, tp=2), torch.randn(5, 8, dtype=torch.float64)
    rows = Varying(0, ((3, 2),))
    for place, sections in zip(machine.places, [(2, 1), (2, 1), (1, 1), (1, 1)], strict=True):
        src: Types = (rows, Varying(0, (sections,)))
        assert not all_see(src, machine.axes)
        nodes = [n for n in machine.lower(value, src, (I, I), place, True).graph.nodes if n.op == "call_function"]
        assert [n.args[1] for n in nodes] == ["tp", "dp_shard"]


def test_what_others_read_stays() -> None:
    """A conversion in between that has another use."""
    machine, rows, columns = Machine(dp_shard=2, tp=2), shard(0, 4, 2), shard(1, 8, 2)
    values, graph = Values(), fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"val": values.tensor((2, 4), torch.float64), "grad": True, "types": {"dp_shard": rows, "tp": columns}, "calls": {}}
    made = [x]
    with use_communicator(machine.communicator((0, 0))):
        for args, types in (
            (("tp", columns, I), {"dp_shard": rows, "tp": I}),
            (("dp_shard", rows, I), {"dp_shard": I, "tp": I}),
        ):
            node = graph.call_function(convert, (made[-1], *args))
            node.meta = {"val": values.of(convert, node.args, {}), "grad": True, "types": types, "calls": {}}
            made.append(node)
        graph.output((made[1], made[2])).meta = {}
        gm = LazyGraphModule(torch.nn.Module(), graph)
        reroute(gm, machine.axes, values, machine.seconds.of_conversion)
    assert [n.args[1] for n in gm.graph.nodes if n.op == "call_function"] == ["tp", "dp_shard"]
