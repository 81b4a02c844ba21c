"""Values that change their types over several axes do so by the cheapest way over all of them.

Requires  a graph lowered along all axes.
Ensures   where conversions follow one another, and what is in between has no other use, none of the ways that lead over any of the
          axes is cheaper: axis by axis the searches find in which order, but not through which other types. All ranks make the
          same: a value of which they have other types stays as it is (a dim is cut once more that was cut unevenly).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from torch import fx

from .convert import convert
from .graph_tools import Values, arguments, call, copy_facts, metas
from .routes import Price, Step, Types, all_see, cheapest_route
from .rules.base import Axis, OpCall, Strategy, TensorMeta, largest_shard, unsharded

CHEAPER = 1 - 1e-6
"""By less a way is no cheaper than another."""


def reroute(gm: fx.GraphModule, axes: Sequence[Axis], values: Values, price: Price, fixed: frozenset[str] = frozenset()) -> bool:
    """Rewrite in place, and tell whether anything was. axes: in the order of lowering; fixed: those nothing is converted over."""
    changed = False

    @cache
    def find(value: TensorMeta, taken: tuple[Types, ...]) -> tuple[float, tuple[Step, ...]]:
        return cheapest_route(value, taken, axes, price, fixed)

    for node in list(gm.graph.nodes):
        chain = _chain(node, fixed)
        if not chain:
            continue
        start = arguments(chain[0])[0]
        value, taken = _whole(start, axes), tuple(_types(n, axes) for n in (start, *chain))
        if not all(all_see(types, axes) for types in taken):
            continue
        spent = sum(_price(link, value, types, price) for link, types in zip(chain, taken[:-1], strict=True))
        least, way = find(value, taken)
        if least < spent * CHEAPER:
            _replace(gm.graph, chain, way, axes, values)
            changed = True
    return changed


def _chain(node: fx.Node, fixed: frozenset[str]) -> list[fx.Node]:
    """The conversions that end in this one, first to last; none where a further one goes on from it alone."""
    if not _converts(node, fixed) or (len(node.users) == 1 and _converts(next(iter(node.users)), fixed)):
        return []
    chain = [node]
    while _converts(before := arguments(chain[0])[0], fixed) and len(before.users) == 1:
        chain.insert(0, before)
    return chain


def _converts(node: fx.Node, fixed: frozenset[str]) -> bool:
    """A parameter that is gathered is gathered again for the backward, each for itself."""
    return node.target is convert and arguments(node)[1] not in fixed and not node.meta.get("parameter")


def _types(node: fx.Node, axes: Sequence[Axis]) -> Types:
    return tuple(node.meta["types"][axis.name] for axis in axes)


def _whole(node: fx.Node, axes: Sequence[Axis]) -> TensorMeta:
    """A value before it was sharded over any axis."""
    (found,) = metas(node)
    for type_ in reversed(_types(node, axes)):
        found = unsharded(found, type_)
    return found


def _price(link: fx.Node, value: TensorMeta, types: Types, price: Price) -> float:
    _, name, src, dst = arguments(link)
    for type_ in types:
        value = largest_shard(value, type_)
    return price(name, src, dst, unsharded(value, src))


def _replace(graph: fx.Graph, chain: Sequence[fx.Node], way: Sequence[Step], axes: Sequence[Axis], values: Values) -> None:
    last, here = chain[-1], arguments(chain[0])[0]
    with graph.inserting_before(last):
        for step in way:
            made = call(graph, values, convert, (here, step.axis, step.src, step.dst), name=f"{last.name}_{step.axis}")
            copy_facts(last, made)
            made.meta["types"] = {**last.meta["types"], **{a.name: t for a, t in zip(axes, step.after, strict=True)}}
            made.meta["calls"] = _calls(made, here, step)
            here = made
    last.replace_all_uses_with(here)
    for link in reversed(chain):
        graph.erase_node(link)


def _calls(made: fx.Node, source: fx.Node, step: Step) -> dict[str, tuple[OpCall, Strategy]]:
    """What the step says of the axes after its own, of the shapes that this rank has."""
    (operand,), (result,) = metas(source), metas(made)
    found = {}
    for axis, before, strategy in reversed(step.calls):
        operand, result = unsharded(operand, strategy.ins[0]), unsharded(result, strategy.outs[0])
        found[axis] = replace(before, operands=(operand,), results=(result,)), strategy
    return dict(reversed(found.items()))
