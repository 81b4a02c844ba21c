"""Have small collectives that depend on the batch alone run beside the forward.

Requires  a forward graph with raw collectives (passes/partition.py).
Ensures   the same values: collectives of at most SMALL bytes, such as the count of tokens over the ranks, are no longer waited
          for in the middle of the graph, where every rank would wait for the slowest. Their operands are computed first. A sum
          is started halfway to its first reader, at the latest before the next collective, and awaited by that reader; other
          collectives stand first.
"""

from __future__ import annotations

from torch import fx

from .graph_tools import node_bytes
from .ops.collectives import COMMUNICATION, ops

SMALL = 4096
"""Bytes."""

ALIKE = (ops.all_reduce.default, ops.all_gather.default)
"""Collectives whose result is as large on every rank: ranks must agree on the order of collectives."""


def hoist(gm: fx.GraphModule) -> fx.GraphModule:
    """Change the graph in place and return it."""
    early: dict[fx.Node, bool] = {}  # computed from inputs and constants alone
    small: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            early[node] = node.meta["key"].startswith(("input.", "const."))
        elif node.op == "call_function":
            early[node] = all(early[n] for n in node.all_input_nodes)
            if early[node] and node.target in ALIKE and node_bytes(node) <= SMALL:
                small.append(node)
    computed = {node: _computed_from(node) for node in small}
    _to_the_front(gm, {n for found in computed.values() for n in found})
    needed = {n for node, found in computed.items() for n in found if n is not node}
    for node in reversed(small):
        if _is_sum(node) and node not in needed:
            _start(gm, node)
    gm.graph.lint()
    return gm


def _to_the_front(gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
    first = next((n for n in gm.graph.nodes if n.op == "call_function" and n not in wanted), None)
    if first is not None:
        for node in [n for n in gm.graph.nodes if n in wanted]:
            first.prepend(node)


def _is_sum(node: fx.Node) -> bool:
    return node.target is ops.all_reduce.default and len(node.args) == 2 and not node.kwargs


def _start(gm: fx.GraphModule, node: fx.Node) -> None:
    """Cut a sum at the front of the graph in two."""
    nodes = list(gm.graph.nodes)
    here = nodes.index(node)
    reader = next(i for i, n in enumerate(nodes) if n in node.users)
    later = (i for i in range(here + 1, reader) if nodes[i].target in COMMUNICATION)
    place = min(next(later, reader), (here + reader) // 2)
    with gm.graph.inserting_before(nodes[max(place, here + 1)]):
        start = gm.graph.call_function(ops.start_all_reduce.default, node.args)
    with gm.graph.inserting_before(nodes[reader]):
        wait = gm.graph.call_function(ops.wait.default, (start,))
    for made in (start, wait):
        made.meta = dict(node.meta)
    node.replace_all_uses_with(wait)
    gm.graph.erase_node(node)


def _computed_from(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n.op == "call_function" and n not in found:
            found.add(n)
            stack.extend(n.all_input_nodes)
    return found
