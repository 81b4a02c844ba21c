"""Merge the gathers and reductions of one block's parameters into one collective each.

Requires  a forward or backward graph with raw collectives (passes/partition.py); meta["parameter"] on the gathers of
          parameters, meta["block"] on nodes.
Ensures   per axis, block and dtype: one `all_gather_bucket` before the first use, one `reduce_scatter_bucket` after the last
          gradient; what is outside of blocks (an embedding, a head) in one for each stretch between them; everything else
          is untouched.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

from torch import fx

from .graph_tools import OF_PARAMETERS, Values, call
from .ops.collectives import ops

_OF_PARAMETERS = OF_PARAMETERS | {ops.all_gather.default, ops.all_gather_bucket.default, operator.getitem}


def bucket(gm: fx.GraphModule, values: Values) -> fx.GraphModule:
    """Merge in place and return the graph."""
    for target, merged in (
        (ops.all_gather.default, ops.all_gather_bucket.default),
        (ops.reduce_scatter.default, ops.reduce_scatter_bucket.default),
    ):
        groups: dict[Hashable, list[fx.Node]] = {}
        before: Hashable = None  # the block that a node outside of blocks follows
        for node in gm.graph.nodes:
            block = node.meta.get("block")
            before = before if block is None else block
            if node.op == "call_function" and node.target is target and node.meta.get("parameter"):
                key = (node.args[1], block, before, node.meta["val"].dtype)
                groups.setdefault(key, []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                _merge(gm.graph, nodes, merged, values)
    gm.graph.lint()
    return gm


def _merge(graph: fx.Graph, nodes: list[fx.Node], merged: object, values: Values) -> None:
    gather = merged is ops.all_gather_bucket.default
    axis = nodes[0].args[1]
    dims = [n.args[2] for n in nodes]
    counts = [len(n.args[3]) for n in nodes]  # type: ignore[arg-type]
    sizes = [s for n in nodes for s in n.args[3]]  # type: ignore[union-attr]
    sources: Any = [n.args[0] for n in nodes]
    place = graph.inserting_before(nodes[0]) if gather else graph.inserting_after(nodes[-1])
    if gather:
        _hoist(sources, nodes[0])
    with place:
        made = call(graph, values, merged, (sources, axis, dims, counts, sizes))
    made.meta.update({k: v for k, v in nodes[0].meta.items() if k != "val"})
    made.meta["types"] = {axis: tuple(n.meta["types"][axis] for n in nodes) for axis in nodes[0].meta["types"]}
    made.meta["of"] = tuple(n.meta.get("of") for n in nodes)
    after = made
    for k, node in enumerate(nodes):
        with graph.inserting_after(after):
            item = call(graph, values, operator.getitem, (made, k))
        item.meta.update({f: v for f, v in node.meta.items() if f != "val"})
        item.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(item)
        after = item
    users = set()
    for node in nodes:
        graph.erase_node(node)
    if not gather:
        _sink(graph, made, after, users)


def _hoist(sources: list[fx.Node], first: fx.Node) -> None:
    """What is made of parameters' shards after the first gather moves before it: casts, and gathers over another axis."""
    late: dict[fx.Node, None] = {}
    stack = list(sources)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node > first and node not in late:
            late[node] = None
            stack += node.all_input_nodes
    for node in sorted(late):
        if node.target not in _OF_PARAMETERS:
            raise RuntimeError(f"{node.name} is gathered as a parameter, and is made of other values")
        first.prepend(node)


def _sink(graph: fx.Graph, made: fx.Node, last: fx.Node, moved: set[fx.Node]) -> None:
    """Uses of a reduced gradient that stood before the merged reduction move behind it."""
    stack = [u for item in made.users for u in item.users if u.op != "output" and u < last]
    for user in sorted(stack):
        if user not in moved:
            moved.add(user)
            last.append(user)
            last = user
