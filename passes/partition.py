"""Cut a joint graph into the forward and the backward, deciding what the forward keeps.

Requires  a joint graph (passes/differentiate.py): meta["phase"], placeholder keys, meta["outputs"].
Ensures   the forward's outputs are the joint's and then `saved.*`; the backward's inputs are `saved.*`, the placeholders it
          needs again and `grad.*` seeds, its outputs the gradients. What the backward can rebuild for little from what is kept
          anyway, views and sums and products of elements, is rebuilt right before its first use; a gathered parameter is gathered
          again (ZeRO-3 would otherwise keep it).
"""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction

import torch
from torch import fx

from .graph_tools import VIEWS, extract, named_results, node_bytes
from .ops.collectives import ops

aten = torch.ops.aten

CHEAP = frozenset(
    {
        aten.add.Tensor,
        aten.addcmul.default,
        aten.div.Tensor,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.neg.default,
        aten.relu.default,
        aten.sub.Tensor,
        aten.where.self,
        aten._to_copy.default,
    }
)
"""What takes no longer than reading its operands: as long as the keeping of its result would take in writing and reading it."""


def partition(joint: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(forward, backward). With no gradient among the outputs the backward has neither inputs nor outputs."""
    results = named_results(joint)
    values = [(k, n) for k, n in results if not k.startswith("grad.")]
    gradients = [(k, n) for k, n in results if k.startswith("grad.")]
    saved = {n: f"saved.{n.name}" for n in _choose_saved(_ancestors([n for _, n in gradients]))}
    forward = extract(joint, [*values, *((key, n) for n, key in saved.items())], {})
    return forward, _sink_rebuilt(extract(joint, gradients, saved))


def _sink_rebuilt(backward: fx.GraphModule) -> fx.GraphModule:
    """What is rebuilt for the backward stands right before its first use: a parameter is gathered when its block's turn comes."""
    place = {n: Fraction(i) for i, n in enumerate(backward.graph.nodes)}
    rebuilt = [n for n in backward.graph.nodes if n.op == "call_function" and n.meta["phase"] == "forward"]
    for node in reversed(rebuilt):
        first = min(node.users, key=place.__getitem__)
        if first.prev is not node:
            place[node] = (place[first.prev] + place[first]) / 2
            first.prepend(node)
    return backward


def _ancestors(roots: list[fx.Node]) -> set[fx.Node]:
    """Backward nodes the gradients need, and the forward values these use directly."""
    found: set[fx.Node] = set()
    stack = [r for r in roots if isinstance(r, fx.Node)]
    while stack:
        n = stack.pop()
        if n in found:
            continue
        found.add(n)
        if n.meta["phase"] == "backward":
            stack.extend(n.all_input_nodes)
    return found


def _choose_saved(needed: set[fx.Node]) -> list[fx.Node]:
    """The forward values to keep; what else the backward uses follows from these and the placeholders by views and gathers."""
    wanted = sorted((n for n in needed if n.meta["phase"] == "forward" and n.op == "call_function"), key=lambda n: n.name)
    saved: dict[fx.Node, None] = {}
    for node in wanted:
        base = _base(node)
        if base.op == "placeholder":
            continue
        # A view keeps its storage alive anyway: keep the base itself, unless the view is a small part of it.
        saved[base if base in needed or node_bytes(base) <= node_bytes(node) else node] = None
    rebuilt = _rebuildable(saved, needed)
    return [node for node in saved if node not in rebuilt]


def _rebuildable(saved: Collection[fx.Node], needed: set[fx.Node]) -> set[fx.Node]:
    """Those of `saved` that follow cheaply from others and from what the backward has anyway."""
    rebuilt: set[fx.Node] = set()
    present = {base for node in needed if (base := _base(node)).op == "placeholder"} | set(saved)
    for node in saved:
        if node.target in CHEAP and all(_base(operand) in present for operand in node.all_input_nodes):
            rebuilt.add(node)
    return rebuilt


def _base(node: fx.Node) -> fx.Node:
    """What a value is a view or a gather of."""
    while node.op == "call_function" and (
        node.target in VIEWS or (node.meta.get("parameter") and node.target is ops.all_gather.default)
    ):
        node = node.all_input_nodes[0]
    return node
