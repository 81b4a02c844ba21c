"""Merge what a kernel does in one pass over memory.

Requires  a joint graph (passes/differentiate.py).
Ensures   the gradient of a cross-entropy with respect to its logits, softmax minus one-hot, is one op where it was the sum of two
          tensors of the logits' size. Everything else is untouched.
"""

from __future__ import annotations

from torch import fx

from .graph_tools import Values, aten, call
from .ops.collectives import ops


def fuse_loss(gm: fx.GraphModule, values: Values) -> fx.GraphModule:
    """Rewrite in place and return the graph."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor:
            continue
        parts = [n for n in node.args if isinstance(n, fx.Node) and len(n.users) == 1]
        softmax = next((n for n in parts if n.target is ops.logsumexp_backward.default), None)
        picked = next((n for n in parts if n.target in (ops.pick_backward.default, ops.pick_shard_backward.default)), None)
        if softmax is None or picked is None or softmax.meta["val"].dtype != picked.meta["val"].dtype:
            continue
        grad_lse, x, lse = softmax.args
        grad_pick, index, _, *place = picked.args
        target = ops.softmax_minus_onehot_shard.default if place else ops.softmax_minus_onehot.default
        with gm.graph.inserting_before(node):
            fused = call(gm.graph, values, target, (x, lse, index, grad_lse, grad_pick, *place))
        fused.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        node.replace_all_uses_with(fused)
        for gone in (node, softmax, picked):
            gm.graph.erase_node(gone)
    return gm
