"""The way from one type to another: no other is cheaper, and a value that goes it stays what it is, and so does its gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from random_graphs import Recipe, build
from test_convert import on_ranks, pairing

from shardwright.compiler.check_rule import deal, join
from shardwright.compiler.cost import Seconds
from shardwright.compiler.topology import Topology
from shardwright.passes.convert import backward_ops, convert, exists, forward_ops, is_free
from shardwright.passes.graph_tools import Values, op_calls
from shardwright.passes.ops import StaticCommunicator
from shardwright.passes.ops.collectives import use_communicator
from shardwright.passes.reshard import Price, Ways, cheapest, received, stops_of, way
from shardwright.passes.rules.base import Axis, TensorMeta, strategies
from shardwright.passes.shard import shard as lower
from shardwright.passes.types import I, P, R, Type, Varying, balanced_sizes, gradient_type, shard
from shardwright.runtime.program import Mesh


def types(shape: tuple[int, ...], n: int) -> list[Type]:
    """Every kind of type of a value, cuts that are no stops among them."""
    found = [*stops_of(shape, Axis("x", n))]
    for dim, size in enumerate(shape):
        found.append(Varying(dim, ((size - n + 1, *[1] * (n - 1)),)))
        if size >= 2 * n:
            found.append(Varying(dim, (balanced_sizes(size // 2, n), balanced_sizes(size - size // 2, n))))
    return found


def prices(grad: bool, n: int, shape: tuple[int, ...]) -> dict[str, Price]:
    """By bytes, and in seconds on machines of several kinds."""
    found: dict[str, Price] = {"bytes": lambda a, b: received(a, b, n, grad)}
    meta = TensorMeta(shape, torch.float32, grad)
    for preset in ("cpu", "h100"):
        seconds = Seconds(Topology.preset(preset, devices=n), Mesh(("x",), (n,)))

        def price(a: Type, b: Type, seconds: Seconds = seconds) -> float:
            if is_free(a, b, grad):
                return 0.0
            return seconds.conversion(a, b, meta, Axis("x", n)) if exists(a, b, grad) else math.inf

        found[preset] = price
    return found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("what", ["bytes", "cpu", "h100"])
def test_no_sequence_of_three_is_cheaper(what: str, n: int, grad: bool) -> None:
    shape = (16, 1024, 2048)
    price, stops = prices(grad, n, shape)[what], stops_of(shape, Axis("x", n))
    for src, dst in itertools.product(types(shape, n), repeat=2):
        between = [src, dst, *stops]
        best = min(price(src, a) + price(a, b) + price(b, dst) for a, b in itertools.product(between, repeat=2))
        best = min(best, 0.0 if src == dst else price(src, dst))
        if best == math.inf:
            with pytest.raises(ValueError, match="no conversions lead"):
                cheapest(src, dst, stops, price)
            continue
        found = cheapest(src, dst, stops, price)
        cost = sum(price(a, b) for a, b in itertools.pairwise((src, *found)))
        assert cost <= best * (1 + 1e-9) and (found[-1] if found else src) == dst


@given(st.lists(st.integers(3, 8), min_size=1, max_size=3), st.integers(2, 3), st.data())
@examples(80)
def test_what_goes_the_way_stays_the_same(shape: list[int], n: int, data: st.DataObject) -> None:
    kinds = types(tuple(shape), n)
    src, dst = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from(kinds))
    steps = [*itertools.pairwise((src, *way(src, dst, tuple(shape), Axis("x", n), True)))]
    assert all(exists(a, b, True) for a, b in steps)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    values, cotangents = deal(x, src, n, generator), deal(y, gradient_type(dst), n, generator)
    forward = [op for a, b in steps for op in forward_ops("x", a, b)]
    backward = [op for a, b in reversed(steps) for op in backward_ops("x", a, b)]
    converted, gradients = on_ranks(forward, values), on_ranks(backward, cotangents)
    torch.testing.assert_close(join(converted, dst), x)
    torch.testing.assert_close(join(gradients, gradient_type(src)), y)
    assert pairing(converted, dst, cotangents) == pytest.approx(pairing(values, src, gradients)), "not conjugate"


def test_a_dim_is_cut_anew_by_way_of_another() -> None:
    """Where two all-to-alls move less than a gather."""
    even, other = shard(1, 8, 4), Varying(1, ((2, 1, 1, 4),))
    assert way(even, other, (16, 8), Axis("x", 4), True) == (shard(0, 16, 4), other)
    assert way(even, other, (2, 8), Axis("x", 4), True) == (other,)
    assert way(shard(1, 8, 2), Varying(1, ((5, 3),)), (16, 8), Axis("x", 2), True) == (Varying(1, ((5, 3),)),)


@pytest.mark.parametrize("preset", ["cpu", "h100"])
def test_the_machine_decides(preset: str) -> None:
    """A small value is gathered, for that is one exchange where all-to-alls are two; a large one moves as little as can be."""
    topology, mesh = Topology.preset(preset, devices=4), Mesh(("x",), (4,))
    ways = Seconds(topology, mesh).ways(Axis("x", 4))
    even, other = shard(1, 8, 4), Varying(1, ((2, 1, 1, 4),))
    assert ways(even, other, TensorMeta((16, 8), torch.float32, True)) == (other,)
    large = 1 << 24
    assert ways(even, other, TensorMeta((large, 8), torch.float32, True)) == (shard(0, large, 4), other)


def test_what_has_no_conversion_of_its_own_has_a_way() -> None:
    assert way(R, I, (16,), Axis("x", 4), True) == (shard(0, 16, 4), I)
    assert way(shard(0, 16, 4), P, (16,), Axis("x", 4), True) == (R, P)
    assert way(I, P, (16,), Axis("x", 4), True) == (R, P)
    assert way(I, I, (16,), Axis("x", 4), True) == ()


@pytest.mark.parametrize("ways", [None, lambda src, dst, meta: (dst,)], ids=["by bytes", "given"])
def test_lowering_goes_the_way(ways: Ways | None) -> None:
    """Two conversions in the graph where a dim is cut anew by the fewest bytes."""
    graph, axis, values = build(Recipe((8, 8), ())).graph, Axis("x", 4), Values()
    calls = op_calls(graph)
    other = Varying(1, ((2, 1, 1, 4),))
    (mul, (call, _)), *_ = calls.items()
    choice = {n.name: strategies(c, axis)[0] for n, (c, _) in calls.items()}
    cut = {(side, i, 1): [other.sections] for side, i in (("in", 0), ("in", 1), ("out", 0))}
    choice[mul.name] = next(s for s in strategies(call, axis, cut) if s.outs == (other,))
    with use_communicator(StaticCommunicator({"x": 4}, {"x": 0})):
        made = lower(graph, axis, 0, choice, {"param.p0": shard(1, 8, 4)}, {}, values, ways=ways)
    found = [(n.args[2], n.args[3]) for n in made.graph.nodes if n.target is convert and n.name.startswith("param_p0")]
    by_bytes = [(shard(1, 8, 4), shard(0, 8, 4)), (shard(0, 8, 4), other)]
    assert found == (by_bytes if ways is None else [(shard(1, 8, 4), other)])
