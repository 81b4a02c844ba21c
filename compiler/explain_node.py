"""Why one op or parameter lies as it does: its placement over every axis, what that costs, and what the next best would."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from torch import fx

from ..passes.graph_tools import metas, op_calls
from ..passes.rules.base import Axis, Strategy
from ..passes.shard import ShardingError
from ..passes.types import I, R
from .cost import size_of
from .emit import Lowered, Problem, coordinates_of, lower_for
from .explain import describe
from .groups import regrouped
from .levels import Parameter, levels
from .lowered_cost import LoweredCost
from .needs import read_again
from .place import Placement
from .plan import Plan
from .prices import held
from .runner_up import Runner, next_best, next_best_along
from .topology import Topology
from .units import bytes_text, seconds_text


def explain_node(problem: Problem, plan: Plan, topology: Topology, name: str) -> str:
    """The placement of a node of the captured graph, of a parameter by its name, or of every node of a module by its path: what it
    costs, the next best over every axis, and the difference.

    Raises KeyError naming the nearest names where there is none such.
    """
    nodes = _find(problem.graph, name)
    return "\n".join(_Explained(problem, plan, topology).lines(name, nodes))


class _Explained:
    def __init__(self, problem: Problem, plan: Plan, topology: Topology) -> None:
        self.problem, self.plan, self.topology = problem, plan, topology
        self.lowered = lower_for(problem, plan)
        self.cost = LoweredCost(self.lowered.graph, plan, topology)
        self.twins = regrouped(problem.graph, plan.layouts.groups)

    def lines(self, name: str, nodes: list[fx.Node]) -> Iterator[str]:
        if len(nodes) == 1:
            yield from self._of_node(nodes[0])
            return
        costs = {node: self.cost.of(node) for node in nodes}
        yield f"{name}: {len(nodes)} ops, {seconds_text(sum(costs.values()))} a step on each rank"
        for node, seconds in costs.items():
            yield f"  {node.name} ({node.target}), {seconds_text(seconds)}: {_placed(self.lowered, node)}"

    def _of_node(self, node: fx.Node) -> Iterator[str]:
        yield _title(node)
        for fact in ("module", "source"):
            if node.meta.get(fact):
                yield f"  {node.meta[fact]}"
        if node.op == "call_function":
            yield f"  cost: {seconds_text(self.cost.of(node))} a step on each rank{self._alike(node)}"
        sizes = coordinates_of(self.plan, 0).sizes
        for axis, placement in self.lowered.placements.items():
            yield f"  over {axis}={sizes[axis]}: {_along(placement, node)}"
            yield from self._runner_up(node, axis, placement)
        if not self.lowered.placements:
            yield "  whole: no axis shards anything"
        if node.op == "placeholder" and node.meta["key"].startswith("param."):
            yield from self._levels(node)

    def _alike(self, node: fx.Node) -> str:
        """How many more there are in other blocks."""
        first = self.twins.get(node.name, node.name)
        copies = sum(self.twins.get(n.name, n.name) == first for n in self.problem.graph.graph.nodes) - 1
        return f"; {copies} more like it in other blocks lie the same" if copies else ""

    def _runner_up(self, node: fx.Node, axis: str, placement: Placement) -> Iterator[str]:
        if node.op == "call_function" and node.name not in placement.choice:
            return
        try:
            if axis == "tp":
                found = next_best(self.problem, self.plan, self.topology, node)
            else:
                found = next_best_along(self.problem, self.plan, self.topology, node, axis, self.lowered, self.cost)
        except ShardingError:
            yield "    next best: there is no other placement"
            return
        others = [describe(t) if node.op == "placeholder" else str(t) for t in found.outs]
        yield f"    next best: {', '.join(others)}: {_difference(found)}"

    def _levels(self, node: fx.Node) -> Iterator[str]:
        """Of a parameter what ZeRO shards between the ops that use it, what its gradient costs, and what other levels would."""
        plan, name, (meta,) = self.plan, node.meta["key"].removeprefix("param."), metas(node)
        over_tp = self.lowered.placements["tp"].placeholders[node.meta["key"]] if plan.mesh.size("tp") > 1 else I
        size = size_of(meta) * held(over_tp, Axis("tp", plan.mesh.size("tp")))
        again = read_again(node, op_calls(self.problem.graph))
        own, *others = levels(plan, self.topology, name, Parameter(size, meta.grad, again, copied=over_tp == R and meta.grad))
        if plan.zero and plan.mesh.size("dp_shard") > 1:
            yield f"  between its uses {SHARDED[plan.zero_of(name)]} sharded over dp_shard (ZeRO-{plan.zero_of(name)})"
        yield (
            f"  cost: {seconds_text(own.seconds)} a step on each rank in sums and gathers, "
            f"{bytes_text(own.held)} with gradient and optimizer state{self._alike(node)}"
        )
        for k, other in enumerate(others):
            found = Runner((), other.seconds - own.seconds, state=other.held - own.held)
            yield f"    {'then' if k else 'next best'}: {other.name}: {_difference(found)}"


SHARDED = {1: "its optimizer state is", 2: "its gradient and optimizer state are", 3: "it, its gradient and optimizer state are"}


def _difference(found: Runner) -> str:
    apart = abs(found.seconds) >= 1e-12  # less than sums of floats tell
    more = [f"{seconds_text(abs(found.seconds))} {'more' if found.seconds >= 0 else 'less'} a step" if apart else "as long a step"]
    for what, size in (
        ("received", found.received),
        ("held of parameters with gradients and optimizer state", found.state),
        ("kept of activations", found.activations),
    ):
        if abs(size) >= 1:
            more.append(f"{bytes_text(abs(size))} {'more' if size > 0 else 'less'} {what}")
    return ", ".join(more)


def _find(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    nodes = {n.name: n for n in gm.graph.nodes if n.op == "call_function" and metas(n)[0] is not None}
    keys = {n.meta["key"]: n for n in gm.graph.nodes if n.op == "placeholder"}
    for known, key in ((nodes, name), (keys, f"param.{name}"), (keys, name)):
        if key in known:
            return [known[key]]
    inside = [n for n in nodes.values() if n.meta.get("module") == name]
    if inside:
        return inside
    names = [*nodes, *(k.removeprefix("param.") for k in keys), *{n.meta.get("module") or "" for n in nodes.values()}]
    near = ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.3)) or ", ".join(names[:5])
    raise KeyError(f"the plan has no op, parameter or module {name!r}; nearest are {near}")


def _title(node: fx.Node) -> str:
    (value, *_) = metas(node)
    shape = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if node.op == "placeholder":
        return f"{node.meta['key'].removeprefix('param.')}: {shape}, {bytes_text(size_of(value))}"
    return f"{node.name} = {node.target}: {shape}"


def _placed(lowered: Lowered, node: fx.Node) -> str:
    return "; ".join(f"over {axis} {_along(p, node)}" for axis, p in lowered.placements.items()) or "whole"


def _along(placement: Placement, node: fx.Node) -> str:
    if node.op == "placeholder":
        return describe(placement.placeholders[node.meta["key"]])
    strategy = placement.choice.get(node.name)
    if strategy is None:  # what a later axis finds has been made of it
        return "as its operands are"
    return strategy_text(strategy)


def strategy_text(strategy: Strategy) -> str:
    if all(t == I for t in (*strategy.ins, *strategy.outs)):
        return "whole on every rank"
    given = ", ".join(str(t) for t in strategy.outs)
    return f"takes {', '.join(str(t) for t in strategy.ins)}; gives {given}" if strategy.ins else f"gives {given}"
