"""The cheapest way from one type to another over an axis: a shortest path over the table of conversions, found, not listed.

What is cheapest depends on the machine: a `Ways` asks its prices, as `passes/shard.py` is given; without a machine bytes count.

Graphs are lowered one axis after the other, so a way has one axis, and what the axes before left of the value is its whole. Where a
value changes its types over two axes, the search along the later one finds in which order, or whether at once: it prices the
conversions of the earlier axis at what it leaves of the value (`Seconds` in compiler/cost.py), and may make one of them over the
ranks of both (passes/rules/communication.py). Through which other types it should rather go is found when all axes are lowered
(passes/routes.py, reroute.py). Gradients of parameters are summed over several axes by a search of its own
(compiler/gradient_sums.py).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from .convert import exists, is_free, traffic
from .rules.base import Axis, TensorMeta, own_cuts
from .types import I, P, R, Type, Varying

Price = Callable[[Type, Type], float]
"""Of one conversion, forward and backward; infinite where there is none."""

Ways = Callable[[Type, Type, TensorMeta], tuple[Type, ...]]
"""The types that a value takes on its way from one to another, the last included; the value as it is before it is sharded."""


def cheapest(src: Type, dst: Type, stops: Sequence[Type], price: Price) -> tuple[Type, ...]:
    """The types that a value takes on its way from src to dst, which is the last (Dijkstra 1959); of equally cheap ways the one of
    fewest conversions. Empty where src is dst already.

    stops    types that may be passed through
    Raises ValueError where no way leads there.
    """
    order = itertools.count()  # breaks ties before types are compared
    queue: list[tuple[float, int, int, Type, tuple[Type, ...]]] = [(0.0, 0, next(order), src, ())]
    done: set[Type] = set()
    while queue:
        spent, steps, _, here, way = heapq.heappop(queue)
        if here == dst:
            return way
        if here in done:
            continue
        done.add(here)
        for there in dict.fromkeys((dst, *stops)):
            cost = price(here, there) if there not in done else math.inf
            if cost < math.inf:
                heapq.heappush(queue, (spent + cost, steps + 1, next(order), there, (*way, there)))
    raise ValueError(f"no conversions lead from {src} to {dst}")


def stops_of(shape: Sequence[int], axis: Axis) -> tuple[Type, ...]:
    """What a value of this shape, before it is sharded over the axis, may be in between."""
    return (I, R, P, *(Varying(dim, cut) for dim, size in enumerate(shape) for cut in own_cuts(size, axis)))


WIRE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Bytes that a rank receives, in units of the whole value times (n - 1)/n; local ops receive none (Thakur et al. 2005)."""


def received(src: Type, dst: Type, n: int, grad: bool) -> float:
    """Of one conversion in both directions, in units of the value times (n - 1)/n: a price without a machine in it."""
    if is_free(src, dst, grad):
        return 0.0
    if not exists(src, dst, grad):
        return math.inf
    found = traffic(src, dst, grad)
    return sum(1 / n if kind == "all_to_all" else WIRE.get(kind, 0.0) for kind in (*found.forward, *found.backward))


@cache
def way(src: Type, dst: Type, shape: tuple[int, ...], axis: Axis, grad: bool) -> tuple[Type, ...]:
    """The cheapest way by bytes received. Dims of `shape` are those before the value is sharded.

    A dim cut in another way goes by two all-to-alls over another dim where that moves less than gathering it.
    """
    return cheapest(src, dst, stops_of(shape, axis), lambda a, b: received(a, b, axis.size, grad))


def ways_by_bytes(axis: Axis) -> Ways:
    return lambda src, dst, meta: way(src, dst, meta.shape, axis, meta.grad)


def ways_by_price(axis: Axis, price: Callable[[Type, Type, TensorMeta], float]) -> Ways:
    """Each found once. `price`: of one conversion of a value, forward and backward; infinite where there is none."""

    @cache
    def find(src: Type, dst: Type, meta: TensorMeta) -> tuple[Type, ...]:
        return cheapest(src, dst, stops_of(meta.shape, axis), lambda a, b: price(a, b, meta))

    return find


def steps(src: Type, dst: Type, meta: TensorMeta, ways: Ways) -> Iterator[tuple[Type, Type]]:
    """The conversions on the way, each as (from, to)."""
    return itertools.pairwise((src, *ways(src, dst, meta)))
