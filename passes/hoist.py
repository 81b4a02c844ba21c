"""Move small collectives that depend on the batch alone to the front of the graph.

Requires  a forward graph with raw collectives (passes/partition.py).
Ensures   the same nodes in another order: collectives of at most SMALL bytes, such as the count of tokens over the ranks, and
          what they are computed from, stand first. At the start of a step the ranks have just met; in the middle of it every
          rank would wait for the slowest.
"""

from __future__ import annotations

from torch import fx

from .graph_tools import node_bytes
from .ops.collectives import ops

SMALL = 4096
"""Bytes."""

ALIKE = (ops.all_reduce.default, ops.all_gather.default)
"""Collectives whose result is as large on every rank: ranks must agree on the order of collectives."""


def hoist(gm: fx.GraphModule) -> fx.GraphModule:
    """Reorder in place and return the graph."""
    early: dict[fx.Node, bool] = {}  # computed from inputs and constants alone
    wanted: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            early[node] = node.meta["key"].startswith(("input.", "const."))
        elif node.op == "call_function":
            early[node] = all(early[n] for n in node.all_input_nodes)
            if early[node] and node.target in ALIKE and node_bytes(node) <= SMALL:
                wanted |= _computed_from(node)
    first = next((n for n in gm.graph.nodes if n.op == "call_function" and n not in wanted), None)
    if first is not None:
        for node in [n for n in gm.graph.nodes if n in wanted]:
            first.prepend(node)
    gm.graph.lint()
    return gm


def _computed_from(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n.op == "call_function" and n not in found:
            found.add(n)
            stack.extend(n.all_input_nodes)
    return found
