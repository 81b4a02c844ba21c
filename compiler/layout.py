"""Decide what a plan leaves open and later shapes must keep: where each parameter lives."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import median

from torch import fx

from ..passes.graph_tools import Values, is_getitem, metas, op_call
from ..passes.ops import use_communicator
from ..passes.types import Type
from .choose import least_crossing
from .collector import without_collection
from .cost import op_flops
from .emit import Problem, coordinates_of, lower
from .plan import Plan
from .stages import cut_stages


@without_collection()
def with_layout(problem: Problem, plan: Plan) -> Plan:
    """The plan with `layout` (tp) and `stage_of` (pp) filled in. Rank 0's coordinates stand for all."""
    if plan.mesh.size("pp") > 1 and not plan.stage_of:
        plan = replace(plan, stage_of=stages_of_parameters(problem.graph, plan.stages))
    if plan.mesh.size("tp") > 1 and not plan.layout:
        communicator = coordinates_of(plan, 0)
        with use_communicator(communicator):
            lowered = lower(problem, plan, communicator.indices, Values())
        found: dict[str, Type] = {}
        for key, type_ in lowered.placements["tp"].placeholders.items():
            if key.startswith("param."):
                found[key.removeprefix("param.")] = type_
        plan = replace(plan, layout=found)
    return plan


def stages_of_parameters(gm: fx.GraphModule, stages: int) -> dict[str, int]:
    """The stage of each parameter: cuts where few bytes cross, work balanced."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    position = {n: i for i, n in enumerate(nodes)}
    crossing = [0.0] * (len(nodes) + 1)
    for node in nodes:
        if not node.meta.get("grad"):
            continue
        last = max((position[u] for u in node.users if u in position), default=position[node])
        size = float(sum(_bytes(m.shape) * m.dtype.itemsize for m in metas(node)))
        for at in range(position[node] + 1, last + 1):
            crossing[at] += size
    costs = [work(n) for n in nodes]
    stream = 1.01 * least_crossing(gm)
    narrow = [i for i in range(1, len(nodes)) if 0 < crossing[i] <= stream]
    borders, cuts = _cut(costs, crossing, narrow, stages)
    if not _balanced(costs, borders, cuts):
        borders, cuts = _cut(costs, crossing, [i for i in range(1, len(nodes)) if crossing[i] > 0], stages)
    starts = [borders[c] for c in cuts]
    stage_at = [sum(i >= s for s in starts) for i in range(len(nodes))]
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta["key"].startswith("param."):
            uses = [position[u] for u in node.users if u in position]
            found[node.meta["key"].removeprefix("param.")] = stage_at[min(uses)] if uses else 0
    return found


FLOPS_PER_BYTE = 100.0
"""What a byte that crosses a border weighs against work: between a CPU's network and an accelerator's."""
BORDER = 0.05
"""The most that an ordinary border weighs, of a stage's mean work: whoever asks for stages wants the work divided."""


def _cut(costs: list[float], crossing: list[float], inner: list[int], stages: int) -> tuple[list[int], tuple[int, ...]]:
    """(borders of segments, indices of the segments that stages begin with), cutting only at `inner` positions."""
    borders = [0, *inner, len(costs)]
    if len(borders) - 1 < stages:
        return borders, ()
    segments = [sum(costs[a:b]) for a, b in itertools.pairwise(borders)]
    sizes = [crossing[b] for b in inner]
    return borders, cut_stages(segments, sizes, stages, min(FLOPS_PER_BYTE, BORDER * sum(costs) / stages / median(sizes)))


def _balanced(costs: list[float], borders: list[int], cuts: tuple[int, ...]) -> bool:
    """Whether the heaviest stage does at most half as much again as the mean."""
    edges = [0, *(borders[c] for c in cuts), len(costs)]
    return bool(cuts) and max(sum(costs[a:b]) for a, b in itertools.pairwise(edges)) <= 1.5 * sum(costs) / (len(edges) - 1)


def _bytes(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def work(node: fx.Node) -> float:
    """A node's share of a step, up to a constant: FLOPs of products, elements of everything else."""
    if is_getitem(node):
        return 0.0
    call, _ = op_call(node)
    return float(op_flops(call)) + float(sum(_bytes(m.shape) for m in metas(node)))
