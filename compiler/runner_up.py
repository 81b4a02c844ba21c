"""The next best placement of one op or parameter along an axis, and what a step then takes more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..passes.graph_tools import Calls, op_calls
from ..passes.types import Type
from .cost import Seconds
from .emit import Lowered, Problem, lower_for
from .gathers import Whole
from .gradient_sums import GradientSums
from .keeping import keeping
from .lowered_cost import LoweredCost
from .offers import offers
from .place import Placement
from .placed_cost import PlacedCost, placed_cost
from .plan import Plan, Prediction
from .step_cost import Batch, StepCost, load_of
from .step_sums import level_of
from .tensor_axis import load_for, tensor_mesh, tensor_placement
from .topology import Topology


@dataclass(frozen=True)
class Runner:
    """The best placement in which a node lies otherwise: its types there, and what a step then takes more, on one rank.

    seconds, activations, state, received      more than the plan's; bytes but for the first
    """

    outs: tuple[Type, ...]
    seconds: float
    activations: float = 0.0
    state: float = 0.0
    received: float = 0.0


def next_best(problem: Problem, plan: Plan, topology: Topology, node: fx.Node) -> Runner:
    """The best placement over tp that gives `node` (and its like in repeated blocks) other types, against the plan's.

    Both as the search predicts them. Raises ShardingError where there is no other.
    """
    graph, calls, layouts, size = problem.graph, op_calls(problem.graph), plan.layouts, plan.mesh.size("tp")
    seconds = _tensor_seconds(plan, topology)
    chosen = tensor_placement(graph, problem.loss, size, layouts, seconds, calls, pinned=plan.layout)
    barred = {node.name: [outs_of(chosen, node)]}
    offered = offers(graph, chosen.axis, calls, "tensor", groups=layouts.groups)
    other = tensor_placement(graph, problem.loss, size, layouts, seconds, calls, barred, offered=offered)
    predict = _Predictions(problem, plan, topology, calls)
    before, after = (predict(placed_cost(graph, seconds, placement, calls, offered=offered)) for placement in (chosen, other))

    def more(part: str) -> float:
        return after.parts[part] - before.parts[part]

    received = sum(after.traffic.values()) - sum(before.traffic.values())
    more_seconds = after.step_seconds - before.step_seconds
    return Runner(outs_of(other, node), more_seconds, more("activation bytes"), more("state bytes"), received)


class _Predictions:
    """Of steps of the plan with other placements over tp."""

    def __init__(self, problem: Problem, plan: Plan, topology: Topology, calls: Calls) -> None:
        rows = sum(problem.local_batches)
        self.plan = plan
        self.steps = StepCost(problem, topology, Batch(rows, "global", rows), calls, keeping(calls))
        kept = self.steps.whole(plan.stages)
        self.whole: Whole = next((whole for whole in kept if set(whole.names) == set(plan.whole)), kept[0])

    def __call__(self, cost: PlacedCost) -> Prediction:
        return self.steps.predict(self.plan, cost, self.whole)


def next_best_along(
    problem: Problem, plan: Plan, topology: Topology, node: fx.Node, axis: str, lowered: Lowered, before: LoweredCost
) -> Runner:
    """The same over a data axis or over micro-batches. What of the later axes follows from it counts too.

    lowered, before    the plan's own, and what it costs
    """
    barred = {axis: {node.name: [outs_of(lowered.placements[axis], node)]}}
    found = lower_for(problem, plan, barred=barred)
    after = LoweredCost(found.graph, plan, topology)
    outs = outs_of(found.placements[axis], node)
    return Runner(outs, after.step - before.step, received=after.received - before.received)


def outs_of(placement: Placement, node: fx.Node) -> tuple[Type, ...]:
    """The types of a node's results."""
    return (placement.placeholders[node.meta["key"]],) if node.op == "placeholder" else placement.choice[node.name].outs


def _tensor_seconds(plan: Plan, topology: Topology) -> Seconds:
    """For the load that the search placed for."""
    load = load_for(plan.layouts, load_of(plan, GradientSums(plan.mesh, level_of(plan.zero), topology), 1 / plan.data_size))
    return Seconds(topology, tensor_mesh(plan.mesh.size("tp")), load.share, load.runs, load.sums)
