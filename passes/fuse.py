"""Merge what a kernel does in one pass over memory."""

from __future__ import annotations

from torch import fx

from .graph_tools import Values, arguments, aten, call
from .ops.collectives import ops

_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default})


def group_heads(gm: fx.GraphModule, values: Values) -> fx.GraphModule:
    """Rewrite in place and return the graph.

    Requires  a local forward graph, checked.
    Ensures   attention whose key and value heads are repeated for groups of query heads takes them as they were.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not ops.attention.default:
            continue
        q, k, v, *rest = arguments(node)
        few_k, few_v = _before_repeat(k), _before_repeat(v)
        if few_k is None or few_v is None or few_k.meta["val"].shape[1] != few_v.meta["val"].shape[1]:
            continue
        with gm.graph.inserting_before(node):
            grouped = call(gm.graph, values, node.target, (q, few_k, few_v, *rest))
        grouped.meta.update({key: value for key, value in node.meta.items() if key != "val"})
        node.replace_all_uses_with(grouped)
        gm.graph.erase_node(node)
        for repeated in {k: None, v: None}:  # one may be both
            _erase_unused(gm.graph, repeated)
    return gm


def _before_repeat(heads: fx.Node) -> fx.Node | None:
    """[B, G, S, D] of which `heads` [B, G * r, S, D] has each head r times in a row; None where it is no such thing."""
    batch, count, length, width = heads.meta["val"].shape
    node = heads
    while node.op == "call_function" and node.target in _RESHAPES:
        node = arguments(node)[0]
    if node.op != "call_function" or node.target is not aten.expand.default or node.meta["val"].dim() != 5:
        return None
    groups, repeats = node.meta["val"].shape[1:3]
    wide, narrow = (batch, groups, repeats, length, width), (batch, groups, 1, length, width)
    if node.meta["val"].shape != wide or arguments(node)[0].meta["val"].shape != narrow or groups * repeats != count:
        return None
    inner = arguments(node)[0]
    if inner.op != "call_function" or inner.target is not aten.unsqueeze.default or arguments(inner)[1] not in (2, -3):
        return None
    return arguments(inner)[0]


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    while not node.users and node.op == "call_function":
        source = arguments(node)[0]
        graph.erase_node(node)
        node = source


def fuse_loss(gm: fx.GraphModule, values: Values) -> fx.GraphModule:
    """Rewrite in place and return the graph.

    Requires  a joint graph (passes/differentiate.py).
    Ensures   the gradient of a cross-entropy with respect to its logits, softmax minus one-hot, is one op where it was the sum of
              two tensors of the logits' size.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor:
            continue
        parts = [n for n in arguments(node) if isinstance(n, fx.Node) and len(n.users) == 1]
        softmax = next((n for n in parts if n.target is ops.logsumexp_backward.default), None)
        picked = next((n for n in parts if n.target in (ops.pick_backward.default, ops.pick_shard_backward.default)), None)
        if softmax is None or picked is None or softmax.meta["val"].dtype != picked.meta["val"].dtype:
            continue
        grad_lse, x, lse = arguments(softmax)
        grad_pick, index, _, *place = arguments(picked)
        target = ops.softmax_minus_onehot_shard.default if place else ops.softmax_minus_onehot.default
        with gm.graph.inserting_before(node):
            fused = call(gm.graph, values, target, (x, lse, index, grad_lse, grad_pick, *place))
        fused.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        node.replace_all_uses_with(fused)
        for gone in (node, softmax, picked):
            gm.graph.erase_node(gone)
    return gm
