"""The cheapest way of a value from its types over all axes of a mesh to others: a shortest path, as `reshard.py` finds over one.

A step is a conversion over one axis, or the same one over several at once; what it says on the axes after, and whether it is one
that the others leave room for, the rule of conversions tells (rules/communication.py), as while a graph is lowered.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .convert import convert, exists, is_free
from .reshard import stops_of
from .rules.base import Axis, OpCall, Operand, Strategy, TensorMeta, largest_shard, localize, strategies, unsharded
from .types import I, R, Type, Varying

Types = tuple[Type, ...]
"""Of a value over every axis, in the order in which a graph is lowered along them."""

Price = Callable[[str, Type, Type, TensorMeta], float]
"""Of a conversion over an axis, or several joined by "+", of a value that is whole over these."""


@dataclass(frozen=True)
class Step:
    """One conversion, `convert(x, axis, src, dst)`.

    value    what it is made of, as its ranks hold it together
    after    the types that it leads to
    calls    of the axes after its own: (axis, what the conversion is before that is lowered, how it is)
    """

    axis: str
    src: Type
    dst: Type
    value: TensorMeta
    after: Types
    calls: tuple[tuple[str, OpCall, Strategy], ...] = ()


def all_see(types: Types, axes: Sequence[Axis]) -> bool:
    """Whether every rank has the same types. What is left of a dim that was cut unevenly is cut otherwise on each, and so may what
    is left of the samples be where these lie in unequal shares."""
    cuts = [(t, t.is_even and not axis.unequal) for t, axis in zip(types, axes, strict=True) if isinstance(t, Varying)]
    return all(alike or one.dim != other.dim for (one, alike), (other, _) in itertools.combinations(cuts, 2))


def plain(types: Types, grad: bool) -> Types:
    """Without a gradient R is I."""
    return types if grad else tuple(I if t == R else t for t in types)


def steps_from(
    value: TensorMeta, here: Types, axes: Sequence[Axis], stops: Sequence[Types], fixed: frozenset[str]
) -> Iterator[Step]:
    """The conversions that can be made of a value with these types.

    value    before it is sharded over any axis
    stops    types that may be passed through beside the usual ones
    fixed    axes over which nothing is converted
    """
    for k, (axis, src) in enumerate(zip(axes, here, strict=True)):
        if axis.name not in fixed:
            for dst in dict.fromkeys((*(types[k] for types in stops), *stops_of(value.shape, axis))):
                fits = not isinstance(dst, Varying) or dst.global_size == value.shape[dst.dim]
                if fits and not is_free(src, dst, value.grad) and exists(src, dst, value.grad):
                    call = _call((Operand(0), axis.name, src, dst), largest_shard(value, src), largest_shard(value, dst))
                    found = _lowered(call, (*here[:k], dst), here[k + 1 :], axes[k + 1 :], ())
                    yield from (step for step in found if all_see(step.after, axes))
        value = largest_shard(value, src)


def _call(args: tuple[object, ...], operand: TensorMeta, result: TensorMeta) -> OpCall:
    return OpCall(convert, args, {}, (operand,), (result,))


def _lowered(
    call: OpCall, after: Types, here: Types, axes: Sequence[Axis], calls: tuple[tuple[str, OpCall, Strategy], ...]
) -> Iterator[Step]:
    """A conversion lowered along the axes after its own: by each strategy that takes the value as it lies."""
    if not axes:
        _, name, src, dst = call.args
        yield Step(name, src, dst, unsharded(call.operands[0], src), after, calls)
        return
    (axis, *later), (type_, *others) = axes, here
    hints = {("in", 0, type_.dim): [type_.sections]} if isinstance(type_, Varying) else {}
    for strategy in strategies(call, axis, hints):
        if is_free(type_, strategy.ins[0], call.operands[0].grad):
            (result,) = strategy.outs
            _, args, _ = localize(call, strategy, 0)
            local = _call(args, largest_shard(call.operands[0], type_), largest_shard(call.results[0], result))
            yield from _lowered(local, (*after, result), tuple(others), later, (*calls, (axis.name, call, strategy)))


def cheapest_route(
    value: TensorMeta, types: Sequence[Types], axes: Sequence[Axis], price: Price, fixed: frozenset[str] = frozenset()
) -> tuple[float, tuple[Step, ...]]:
    """What the cheapest way costs, and its steps (Dijkstra 1959); of equally cheap ways one of the fewest steps.

    value    before it is sharded over any axis
    types    from the first of them to the last; by way of any, these included
    Raises ValueError where no way leads there.
    """
    goal = plain(types[-1], value.grad)
    order = itertools.count()  # breaks ties before types are compared
    queue: list[tuple[float, int, int, Types, tuple[Step, ...]]] = [(0.0, 0, next(order), types[0], ())]
    done: set[Types] = set()
    while queue:
        spent, count, _, here, way = heapq.heappop(queue)
        alike = plain(here, value.grad)
        if alike == goal:
            return spent, way
        if alike in done:
            continue
        done.add(alike)
        for step in steps_from(value, here, axes, types, fixed):
            known = plain(step.after, value.grad) in done
            cost = math.inf if known else price(step.axis, step.src, step.dst, step.value)
            if cost < math.inf:
                heapq.heappush(queue, (spent + cost, count + 1, next(order), step.after, (*way, step)))
    raise ValueError(f"no conversions lead from {types[0]} to {types[-1]}")
