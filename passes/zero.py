"""ZeRO-3: parameters enter as shards and are gathered where they are used.

Requires  a typed graph lowered along every other axis, in which parameters are Replicate on the axis.
Ensures   each parameter in `cuts` is a placeholder of its shard, V on the axis, followed by convert V -> R (an all-gather;
          its gradient a reduce-scatter), one for each block that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from .convert import convert
from .graph_tools import Values, call, copy_facts
from .rules.base import Axis
from .types import I, R, Varying, even_sections, local_shape


def shard_dim(shape: tuple[int, ...], n: int) -> int | None:
    """The dim ZeRO cuts: the first that gives every rank something; None: the parameter stays whole."""
    return next((d for d, size in enumerate(shape) if size >= n), None)


def zero_cut(shape: tuple[int, ...], n: int) -> Varying | None:
    dim = shard_dim(shape, n)
    return None if dim is None else Varying(dim, even_sections(shape[dim], n))


def gather_parameters(gm: fx.GraphModule, axis: Axis, index: int, cuts: Mapping[str, Varying], values: Values) -> fx.GraphModule:
    """Apply `cuts` (placeholder key -> shard over `axis`) in place and return the graph."""
    graph = gm.graph
    body = next(n for n in graph.nodes if n.op != "placeholder")
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.meta["key"] in cuts]:
        cut = cuts[node.meta["key"]]
        whole, type_ = node.meta["val"], R if node.meta.get("grad") else I
        users = list(node.users)
        node.meta["val"] = values.tensor(local_shape(tuple(whole.shape), cut, index), whole.dtype)
        node.meta["types"] = {**node.meta.get("types", {}), axis.name: cut}
        gathered: dict[object, fx.Node] = {}
        for user in users:
            block = user.meta.get("block")
            if block not in gathered:
                with graph.inserting_before(body):
                    made = call(graph, values, convert, (node, axis.name, cut, type_))
                copy_facts(node, made)
                made.meta.pop("key", None)
                made.meta.update({"block": block, "parameter": True, "calls": {}, "module": user.meta.get("module")})
                made.meta["types"] = {**node.meta["types"], axis.name: type_}
                gathered[block] = made
            user.replace_input_with(node, gathered[block])
    _sink_to_first_use(graph, axis)
    return gm


def _sink_to_first_use(graph: fx.Graph, axis: Axis) -> None:
    """Each gather stands right before the first node of its block that needs any of the block's gathers."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    groups: dict[object, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.meta.get("parameter") and node.target is convert and node.args[1] == axis.name:
            groups.setdefault(node.meta.get("block"), []).append(node)
    for block, nodes in groups.items():
        if block is None:
            for node in nodes:
                min(node.users, key=position.__getitem__).prepend(node)
            continue
        first = min((u for n in nodes for u in n.users), key=position.__getitem__)
        for node in nodes:
            first.prepend(node)
