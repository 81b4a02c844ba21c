"""Cut a graph into pipeline stages.

Requires  meta["stage"] on the placeholders of parameters (a tied one: its first stage).
Ensures   one graph for each stage. A value made in one stage and used in a later one leaves every stage on the way as output
          `act.NAME` and enters the next as a placeholder of that key. What has no stage (masks, positions: no parameter, no
          gradient) is computed in every stage that needs it, from the batch. Between the last op that has a parameter of one
          stage and the first of the next, the border lies where the fewest bytes cross it (a minimum cut).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import networkx as nx
import torch
from torch import fx

from .convert import convert
from .graph_tools import Values, call, extract, is_parameter, named_results
from .types import Varying

aten = torch.ops.aten


def split_stages(gm: fx.GraphModule, count: int) -> list[fx.GraphModule]:
    stage = _assign(gm)
    for border in range(1, count):
        _shift(stage, border)
    last_use: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node in stage:
            for source in node.all_input_nodes:
                if source in stage:
                    last_use[source] = max(last_use.get(source, 0), stage[node])
    return [_stage_graph(gm, k, stage, last_use) for k in range(count)]


def as_received(gm: fx.GraphModule, values: Values) -> fx.GraphModule:
    """The graph of a stage, taking what it receives as it arrives: contiguous. Changes `gm`.

    Ensures: each such value lies in memory again as the ops after it were captured with, where that is otherwise.
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not node.meta["key"].startswith(("act.", "grad.act.")) or value.is_contiguous():
            continue
        order = sorted(range(value.dim()), key=lambda d: -value.stride(d))
        users = list(node.users)
        with values.mode:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder")):
            turned = call(gm.graph, values, aten.permute.default, (node, order))
            dense = call(gm.graph, values, aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
            again = call(gm.graph, values, aten.permute.default, (dense, [order.index(d) for d in range(value.dim())]))
        for user in users:
            user.replace_input_with(node, again)
    return gm


def _assign(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The stage of every node that belongs to one: the latest of its operands, where a parameter counts as its own stage."""
    floating: set[fx.Node] = set()  # what any stage can compute again
    stage: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if not node.meta["key"].startswith("param."):
                floating.add(node)
        elif node.op == "call_function":
            anywhere = not node.meta.get("grad") and all(s in floating for s in node.all_input_nodes)
            if anywhere or _is_parameter(node):
                floating.add(node)
            else:
                stage[node] = max((_stage_of(s, stage) for s in node.all_input_nodes), default=0)
    return stage


def _shift(stage: dict[fx.Node, int], border: int) -> None:
    """Move nodes from the stages before `border` behind it, so that the fewest bytes cross.

    `stage` has every node as early as it can be. A node may come later where no parameter holds it, or its users, before.
    """
    fixed: set[fx.Node] = set()
    for node in reversed(stage):
        held = any(_is_parameter(s) for s in node.all_input_nodes) or any(u in fixed or u.op == "output" for u in node.users)
        if stage[node] < border and held:
            fixed.add(node)
    loose = {n for n, k in stage.items() if k < border and n not in fixed}
    if not loose:
        return
    ranks = math.prod(_shares(stage).values())
    network = nx.DiGraph()
    network.add_nodes_from(("before", "after"))
    for node in dict.fromkeys([*loose, *(s for n in loose for s in n.all_input_nodes if s in stage)]):
        if node not in loose:
            network.add_edge("before", node)
        if isinstance(node.meta["val"], torch.Tensor):
            network.add_edge(node, ("sent", node), capacity=_sent_bytes(node, ranks))
        else:
            network.add_edge(node, ("sent", node))  # a tuple is never sent
        for user in node.users:
            if user in loose:
                network.add_edge(("sent", node), user)
                network.add_edge(user, node)
            elif user in stage and stage[user] >= border:
                network.add_edge(("sent", node), "after")
    _, (before, _) = nx.minimum_cut(network, "before", "after")
    for node in loose - before:
        stage[node] = border


def _shares(nodes: Iterable[fx.Node]) -> dict[str, int]:
    """The axes that any of the nodes is cut over, and into how many parts."""
    return {axis: len(t.sections[0]) for n in nodes for axis, t in n.meta.get("types", {}).items() if isinstance(t, Varying)}


def _sent_bytes(node: fx.Node, ranks: int) -> int:
    """Bytes of a value on all ranks together: the border must lie alike where their shares differ."""
    wholes: dict[int, int] = {}
    for type_ in node.meta.get("types", {}).values():
        if isinstance(type_, Varying):
            wholes.setdefault(type_.dim, type_.global_size)  # as the first axis found it, before any cut
    value = node.meta["val"]
    shape = list(value.shape)
    for dim, size in wholes.items():
        shape[dim] = size
    return math.prod(shape) * value.element_size() * ranks // math.prod(_shares([node]).values())


def _is_parameter(node: fx.Node) -> bool:
    """Each stage that uses one makes its own."""
    return is_parameter(node, through=(convert,))


def _stage_of(node: fx.Node, stage: dict[fx.Node, int]) -> int:
    return node.meta.get("stage", 0) if node.op == "placeholder" else stage.get(node, 0)


def _stage_graph(gm: fx.GraphModule, k: int, stage: dict[fx.Node, int], last_use: dict[fx.Node, int]) -> fx.GraphModule:
    entering = [n for n, s in stage.items() if s < k <= last_use.get(n, s)]
    leaving = [n for n, s in stage.items() if s <= k < last_use.get(n, s)]
    results: list[tuple[str, fx.Node]] = [(f"act.{n.name}", n) for n in leaving]
    for key, node in named_results(gm):
        if stage.get(node, 0) == k:
            results.append((key, node))
    return extract(gm, results, {n: f"act.{n.name}" for n in entering})
