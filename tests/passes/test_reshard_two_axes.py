"""A value that changes its types over two axes: what lowering along one and then the other finds, and `passes/reroute.py` then,
against all that there is."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from harness import prepare, problem_of
from programs import case, lowered, plan
from torch import Tensor, nn

from shardwright.compiler.cost import Seconds
from shardwright.compiler.emit import emit
from shardwright.compiler.layout import with_layout
from shardwright.compiler.topology import Topology
from shardwright.passes.check_schedules import check_schedules
from shardwright.passes.convert import convert, exists, is_free
from shardwright.passes.ops.collectives import COMMUNICATION
from shardwright.passes.routes import cheapest_route
from shardwright.passes.rules.base import Axis, OpCall, Operand, TensorMeta, largest_shard, strategies
from shardwright.passes.types import I, P, Partial, R, Type, Varying, shard
from shardwright.runtime.program import Mesh

Types = tuple[Type, Type]


class Machine:
    """A value on nodes of as many devices: the axis "dp_shard" goes over nodes, "tp" lies within one."""

    def __init__(self, nodes: int, size: int, shape: tuple[int, ...], grad: bool) -> None:
        topology = Topology.preset("h100", devices=nodes * size)
        self.seconds = Seconds(topology, Mesh(("dp_shard", "tp"), (nodes, size)))
        self.outer, self.inner = Axis("dp_shard", nodes), Axis("tp", size, ("dp_shard",))
        self.both = Axis("dp_shard+tp", nodes * size)
        self.meta = TensorMeta(shape, torch.bfloat16, grad)

    @cached_property
    def types(self) -> list[Types]:
        return [(a, b) for a in kinds(self.meta, self.outer) for b in kinds(largest_shard(self.meta, a), self.inner)]

    def pairs(self) -> Iterator[tuple[Types, Types]]:
        """Those that a conversion leads from and to over each axis by itself. No op needs a Partial value but of what is one."""
        grad = self.meta.grad
        for src, dst in itertools.product(self.types, repeat=2):
            if dst[1] != P and all(is_free(a, b, grad) or exists(a, b, grad) for a, b in zip(src, dst, strict=True)):
                yield src, dst

    def price(self, src: Type, dst: Type, meta: TensorMeta, axis: Axis) -> float:
        if is_free(src, dst, meta.grad):
            return 0.0
        return self.seconds.conversion_timing(src, dst, meta, axis).once if exists(src, dst, meta.grad) else math.inf

    def found(self, src: Types, dst: Types) -> float:
        """Seconds of the cheapest placement along the inner axis of a graph lowered along the outer one."""
        have, outer = {src[1]: 0.0}, src[0]
        for after in self.seconds.ways(self.outer)(src[0], dst[0], self.meta):
            value, result = (largest_shard(self.meta, t) for t in (outer, after))
            call = OpCall(convert, (Operand(0), self.outer.name, outer, after), {}, (value,), (result,))
            now: dict[Type, float] = {}
            for s in strategies(call, self.inner):
                cost = self._changed(have, s.ins[0], value) + self.seconds.node(call, s, self.inner, (False,))
                now[s.outs[0]] = min(cost, now.get(s.outs[0], math.inf))
            have, outer = now, after
        return self._changed(have, dst[1], largest_shard(self.meta, outer))

    def _changed(self, have: dict[Type, float], needed: Type, meta: TensorMeta) -> float:
        return min(spent + self.seconds.conversion(t, needed, meta, self.inner) for t, spent in have.items())

    def least(self, src: Types) -> dict[Types, float]:
        """Seconds to any types, by conversions over one axis or both at once, in any order (Dijkstra 1959)."""
        order, spent = itertools.count(), dict[Types, float]()
        queue = [(0.0, next(order), src)]
        while queue:
            cost, _, here = heapq.heappop(queue)
            if here not in spent:
                spent[here] = cost
                for there, price in self._steps(here):
                    heapq.heappush(queue, (cost + price, next(order), there))
        return spent

    def _steps(self, here: Types) -> Iterator[tuple[Types, float]]:
        outer, inner = here
        for there in self.types:
            if there == here:
                continue
            if there[0] == outer:
                yield there, self.price(inner, there[1], largest_shard(self.meta, outer), self.inner)
            elif there[1] == inner and not self._in_the_way(outer, there[0], inner):
                yield there, self.price(outer, there[0], largest_shard(self.meta, inner), self.outer)
            joined, after = self._joined(here), self._joined(there)
            if joined is not None and after is not None:
                yield there, self.price(joined, after, self.meta, self.both)

    def _in_the_way(self, src: Type, dst: Type, inner: Type) -> bool:
        """A dim is cut over the outer axis first."""
        return isinstance(inner, Varying) and inner.dim in {t.dim for t in (src, dst) if isinstance(t, Varying)}

    def _joined(self, types: Types) -> Type | None:
        outer, inner = types
        if isinstance(outer, Varying) and isinstance(inner, Varying) and outer.dim == inner.dim:
            return shard(outer.dim, self.meta.shape[outer.dim], self.both.size)
        return outer if outer == inner else None


def kinds(meta: TensorMeta, axis: Axis) -> list[Type]:
    return [I, R, P, *(shard(dim, size, axis.size) for dim, size in enumerate(meta.shape))]


def dims(types: Types) -> tuple[int, ...]:
    return tuple(t.dim for t in types if isinstance(t, Varying))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("nodes", "size", "shape"), [(4, 8, (4096, 4096)), (2, 8, (64, 64)), (2, 4, (64, 64))])
def test_what_is_found_is_the_cheapest_or_nearly_so(nodes: int, size: int, shape: tuple[int, ...], grad: bool) -> None:
    """Over the outer axis the way is found first. Where another third type in between would serve both axes better,
    `cheapest_route` finds it: none is cheaper. Placements are chosen by what is found without."""
    machine, ratios = Machine(nodes, size, shape, grad), dict[tuple[Types, Types], float]()
    least = {src: machine.least(src) for src in machine.types}
    for src, dst in machine.pairs():
        if least[src][dst] > 0:
            ratios[src, dst] = machine.found(src, dst) / least[src][dst]
            spent, _ = cheapest_route(machine.meta, (src, dst), (machine.outer, machine.inner), machine.seconds.of_conversion)
            assert spent == pytest.approx(least[src][dst], rel=1e-9), (src, dst)
    assert len(ratios) > 200 and min(ratios.values()) > 1 - 1e-9
    slower = {pair: ratio for pair, ratio in ratios.items() if ratio > 1 + 1e-9}
    assert len(slower) < 0.07 * len(ratios)
    for (src, dst), ratio in slower.items():
        assert ratio < (1.3 if dims(src) == dims(dst)[::-1] != dims(dst) else 1.15), (src, dst)


def test_statistics_of_a_batch_over_two_data_axes_are_summed_at_once() -> None:
    model = case("resnet")
    _, _, found = lowered(model, plan(dp_replicate=2, dp_shard=2))
    sums = [n for n in found.graph.graph.nodes if n.target is convert and isinstance(n.args[2], Partial)]
    axes = Counter(n.args[1] for n in sums)
    assert set(axes) == {"dp_replicate+dp_shard"} and axes.total() > 10
    for node in sums:
        types = node.meta["types"]
        assert types["dp_replicate"] == types["dp_shard"] == node.args[3]


def test_axes_that_the_mesh_has_in_another_order_are_not_joined() -> None:
    """Ranks are numbered along the mesh, and so are the shards of a collective over several axes."""
    call = OpCall(convert, (Operand(0), "dp_shard", P, I), {}, *[(TensorMeta((8, 8), torch.float64, True),)] * 2)
    assert [s.ins for s in strategies(call, Axis("tp", 2, ("dp_shard",))) if s.label == "at once"] == [(P,)]
    for joins in ((), ("dp_replicate",)):
        assert "at once" not in {s.label for s in strategies(call, Axis("tp", 2, joins))}


class Counted(nn.Module):
    """A loss over a count of what is called with, which is computed in so many ops that a tensor axis takes part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
        for _ in range(20):
            weights = (weights * 0.5).tanh()
        lost = (self.down(self.up(x).relu()) - x).square().mean(-1)
        return {"loss": lost.sum() / weights.square().mean(-1).sum()}


def test_ranks_with_other_lengths_join_no_axes() -> None:
    """Each places by itself: one might sum the count over data and tensor ranks at once, the other in two steps."""
    torch.manual_seed(0)
    model, wanted, problems = Counted(), plan(dp_shard=2, tp=2), []
    for length in (4, 16):
        found = prepare(model, {"x": torch.randn(4, length, 8), "weights": torch.randn(4, length, 8)})
        problems.append(replace(problem_of(found, [2, 2]), ragged=True))
    wanted = with_layout(problems[0], wanted)
    programs = [emit(problems[wanted.data_rank(wanted.mesh.coordinates(rank))], wanted, rank) for rank in range(4)]
    check_schedules(programs)
    nodes = [n for program in programs for spec in program.graphs.values() for n in spec.graph.graph.nodes]
    assert {n.args[1] for n in nodes if n.target in COMMUNICATION} == {"dp_shard", "tp"}
