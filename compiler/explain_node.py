"""Why one op or parameter lies as it does: its placement over every axis, what that costs, and what the next best would."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from torch import fx

from ..passes.graph_tools import Calls, Values, is_parameter, metas, op_calls
from ..passes.ops import use_communicator
from ..passes.prologue import TIME
from ..passes.rules.base import Axis, Strategy
from ..passes.shard import ShardingError
from ..passes.types import I, Type
from .cost import Seconds, size_of
from .emit import Lowered, Problem, coordinates_of, lower
from .explain import describe
from .groups import regrouped
from .needs import gathered_again
from .offers import offers
from .place import Placement
from .placed_cost import placed_cost, produced
from .plan import Plan
from .prices import held
from .step_cost import load_of
from .tensor_axis import load_for, tensor_mesh, tensor_placement
from .topology import Topology
from .units import bytes_text, seconds_text


@dataclass(frozen=True)
class Runner:
    """The best placement over tp in which a node lies otherwise: its types there, and what a step then takes more, on one rank.

    seconds, activations, parameters, received      more than the plan's; bytes but for the first
    """

    outs: tuple[Type, ...]
    seconds: float
    activations: float
    parameters: float
    received: float


def explain_node(problem: Problem, plan: Plan, topology: Topology, name: str) -> str:
    """The placement of a node of the captured graph, of a parameter by its name, or of every node of a module by its path.

    Raises KeyError naming the nearest names where there is none such.
    """
    nodes = _find(problem.graph, name)
    with use_communicator(coordinates_of(plan, 0)):
        lowered = lower(problem, plan, coordinates_of(plan, 0).indices, Values())
    if len(nodes) > 1:
        return "\n".join([f"{name}: {len(nodes)} ops", *(f"  {n.name} ({n.target}): {_placed(lowered, n)}" for n in nodes)])
    (node,) = nodes
    lines = [f"{_title(node)}", *(f"  {line}" for line in _place_of(node))]
    sizes = {**dict(zip(plan.mesh.axes, plan.mesh.sizes, strict=True)), TIME: plan.microbatches}
    lines += [f"  over {axis}={sizes[axis]}: {text}{_sharded(plan, axis, node)}" for axis, text in _axes(lowered, node)]
    if not lowered.placements:
        lines.append("  whole: no axis shards anything")
    if plan.mesh.size("tp") > 1:
        lines += [f"    {line}" for line in _tensor_costs(problem, plan, topology, node)]
    return "\n".join(lines)


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


def _place_of(node: fx.Node) -> list[str]:
    return [str(node.meta[fact]) for fact in ("module", "source") if node.meta.get(fact)]


def _sharded(plan: Plan, axis: str, node: fx.Node) -> str:
    """What ZeRO shards of a parameter over an axis, besides how the graphs use it."""
    key = node.meta["key"] if node.op == "placeholder" else ""
    if axis != "dp_shard" or not plan.zero or not key.startswith("param."):
        return ""
    level = plan.zero_of(key.removeprefix("param."))
    what = {1: "its optimizer state is", 2: "its gradient and optimizer state are", 3: "it, its gradient and optimizer state are"}
    return f" where ops use it; between these {what[level]} sharded (ZeRO-{level})"


def _axes(lowered: Lowered, node: fx.Node) -> list[tuple[str, str]]:
    return [(axis, _along(placement, node)) for axis, placement in lowered.placements.items()]


def _placed(lowered: Lowered, node: fx.Node) -> str:
    return "; ".join(f"over {axis} {text}" for axis, text in _axes(lowered, node)) or "whole"


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


def _tensor_costs(problem: Problem, plan: Plan, topology: Topology, node: fx.Node) -> list[str]:
    calls = op_calls(problem.graph)
    seconds = _tensor_seconds(plan, topology)
    chosen = _placement(problem, plan, seconds, calls)
    own = _own_seconds(node, chosen, seconds, Axis("tp", plan.mesh.size("tp")), calls)
    twins = regrouped(problem.graph, plan.layouts.groups)
    first = twins.get(node.name, node.name)
    copies = sum(twins.get(n.name, n.name) == first for n in problem.graph.graph.nodes) - 1
    alike = f"; {copies} more like it in other blocks lie the same" if copies else ""
    lines = [f"cost: {seconds_text(own)} a step on each rank{alike}"]
    try:
        found = next_best(problem, plan, topology, node, chosen, calls)
    except ShardingError:
        return [*lines, "next best: there is no other placement"]
    more = [f"{seconds_text(abs(found.seconds))} {'more' if found.seconds >= 0 else 'less'} a step"]
    for what, size in (
        ("received", found.received),
        ("held of parameters", found.parameters),
        ("kept of activations", found.activations),
    ):
        if abs(size) >= 1:
            more.append(f"{bytes_text(abs(size))} {'more' if size > 0 else 'less'} {what}")
    return [*lines, f"next best: {', '.join(map(str, found.outs))}, {', '.join(more)}"]


def next_best(
    problem: Problem, plan: Plan, topology: Topology, node: fx.Node, chosen: Placement | None = None, calls: Calls | None = None
) -> Runner:
    """The best placement over tp that gives `node` (and its like in repeated blocks) other types, against the plan's.

    Raises ShardingError where there is no other.
    """
    calls = calls or op_calls(problem.graph)
    seconds = _tensor_seconds(plan, topology)
    chosen = chosen or _placement(problem, plan, seconds, calls)
    outs = _outs(chosen, node)
    size, layouts, barred = plan.mesh.size("tp"), plan.layouts, {node.name: [outs]}
    offered = offers(problem.graph, chosen.axis, calls, "tensor", groups=layouts.groups)
    other = tensor_placement(problem.graph, problem.loss, size, layouts, seconds, calls, barred, offered=offered)
    before, after = (placed_cost(problem.graph, seconds, p, calls, offered=offered) for p in (chosen, other))
    share = _share(plan)

    def more(part: str) -> float:
        return getattr(after, part) - getattr(before, part)

    each = sum(map(more, ("launches", "latencies", "gathers")))
    return Runner(
        _outs(other, node),
        (more("compute") + more("traffic")) * share + (each * plan.microbatches + more("sums")) / plan.stages,
        more("activations") * share,
        more("parameters") / plan.stages,
        more("received") * share + (more("received_gathers") * plan.microbatches + more("received_once")) / plan.stages,
    )


def _tensor_seconds(plan: Plan, topology: Topology) -> Seconds:
    """For the load that the search placed for."""
    load = load_for(plan.layouts, load_of(plan, topology, 1 / plan.data_size))
    return Seconds(topology, tensor_mesh(plan.mesh.size("tp")), load.share, load.runs, load.sums)


def _placement(problem: Problem, plan: Plan, seconds: Seconds, calls: Calls) -> Placement:
    """The plan's own."""
    size, layouts = plan.mesh.size("tp"), plan.layouts
    return tensor_placement(problem.graph, problem.loss, size, layouts, seconds, calls, pinned=plan.layout)


def _share(plan: Plan) -> float:
    """Of the graph of the global batch, what one data rank and stage runs."""
    return 1.0 / plan.data_size / plan.stages


def _outs(placement: Placement, node: fx.Node) -> tuple[Type, ...]:
    return (placement.placeholders[node.meta["key"]],) if node.op == "placeholder" else placement.choice[node.name].outs


def _own_seconds(node: fx.Node, placement: Placement, seconds: Seconds, axis: Axis, calls: Calls) -> float:
    """Of the op itself and of the conversions its operands go through for it alone or first; of a parameter, its gradient's sum."""
    if node.op == "placeholder":
        (meta,) = metas(node)
        type_ = placement.placeholders[node.meta["key"]]
        return seconds.placeholder(type_, meta, axis) if held(type_, axis) == 1.0 and meta.grad else 0.0
    call, sources = calls[node]
    strategy = placement.choice[node.name]
    total = seconds.node(call, strategy, axis, ())
    for source, needed in zip(sources, strategy.ins, strict=True):
        have, _ = produced(source, placement)
        (meta,) = metas(source)
        if have != needed:
            of_parameter = is_parameter(source)
            total += seconds.conversion(have, needed, meta, axis, of_parameter)
            if gathered_again(source, have, needed, calls):
                total += seconds.conversion(have, I, replace(meta, grad=False), axis, of_parameter)
    return total
