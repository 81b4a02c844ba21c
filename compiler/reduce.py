"""A problem and its plan cut down to what can be checked by numbers: every decision of the plan, few repetitions of it.

A plan decides for distinct blocks, and alike for every index of a data axis and every micro-batch. So a few of each stand for all:
of a run of blocks the first in each pipeline stage, and of each kind one that follows on each kind; of a data axis two ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..passes.blocks import Run, find_blocks
from ..passes.graph_tools import extract, named_results
from ..runtime.program import Mesh
from .emit import Problem
from .groups import group_of
from .plan import Plan
from .prepare import mark_twins

Capture = Callable[[Sequence[int]], Problem]
"""The problem of the same call with other local batches, one for each data rank."""

FEW = 2
"""Ranks of a data axis that stand for any number of them."""


@dataclass(frozen=True)
class Sample:
    """A problem and a plan for it. `left_out`: what they have less of than those asked for, "2 of 32 blocks"; () if nothing."""

    problem: Problem
    plan: Plan
    left_out: tuple[str, ...] = ()


def fewer_ranks(sample: Sample, capture: Capture | None) -> Sample:
    """Two ranks on each data axis, two micro-batches for each stage, one sample in each. As it is where `capture` is None."""
    plan, problem = sample.plan, sample.problem
    sizes = tuple(min(n, FEW) if a in plan.data_axes else n for a, n in zip(plan.mesh.axes, plan.mesh.sizes, strict=True))
    small = replace(plan, mesh=Mesh(plan.mesh.axes, sizes), microbatches=min(plan.microbatches, FEW * plan.stages))
    batches = (small.microbatches,) * small.data_size
    if capture is None or sum(batches) >= sum(problem.local_batches):
        return sample
    left_out = [f"{k} of {n} ranks on {a}" for a, k, n in zip(plan.mesh.axes, sizes, plan.mesh.sizes, strict=True) if k < n]
    left_out.append(f"{sum(batches)} of {sum(problem.local_batches)} samples")
    found = replace(capture(batches), share_outputs=problem.share_outputs)
    return Sample(found, small, (*sample.left_out, *left_out))


def fewer_blocks(sample: Sample) -> Sample:
    """The graph without the instances of repeated blocks that repeat what others in it show, their parameters and their buffers."""
    whole = sample.problem.graph
    gm = extract(whole, named_results(whole), {})
    runs = find_blocks(gm.graph).runs
    kept = [_kept(run, sample.plan) for run in runs]
    count, total = sum(map(len, kept)), sum(len(run.instances) for run in runs)
    if count == total:
        return sample
    gone: set[fx.Node] = set()
    for run, keep in zip(runs, kept, strict=True):
        stand_in = run.instances[0]
        for j, instance in enumerate(run.instances):
            if j in keep:
                stand_in = instance
                continue
            gone.update(instance)
            for node, twin in zip(instance, stand_in, strict=True):
                node.replace_all_uses_with(twin, delete_user_cb=lambda user: user not in gone)
    unread = {n.meta["key"] for n in gm.graph.nodes if n.op == "placeholder" and n.users and all(u in gone for u in n.users)}
    small = extract(gm, [(key, node) for key, node in named_results(gm) if key not in unread], {})
    before = [(node, node.meta.get("block")) for node in small.graph.nodes]
    mark_twins(small)
    plan = _renumbered(sample.plan, {(number, node.meta.get("block")) for node, number in before})
    keys = {n.meta["key"] for n in small.graph.nodes if n.op == "placeholder"}
    constants = {k: v for k, v in sample.problem.constants.items() if k in keys}
    left_out = (*sample.left_out, f"{count} of {total} blocks")
    return Sample(replace(sample.problem, graph=small, constants=constants), plan, left_out)


def _renumbered(plan: Plan, numbers: Iterable[tuple[int | None, int | None]]) -> Plan:
    """The plan for blocks that have other numbers: what they were, and what they are; None outside of blocks."""
    mixed = plan.layouts.mixed
    if mixed is None:
        return plan
    blocks = tuple(sorted({new for old, new in numbers if old in mixed.blocks and new is not None}))
    return replace(plan, layouts=replace(plan.layouts, mixed=replace(mixed, blocks=blocks)))


def _kept(run: Run, plan: Plan) -> set[int]:
    """Instances to keep: of each kind, which is by ZeRO level and layouts, the first in each stage; and of each two kinds of which
    one follows on the other the first that do."""
    names = [[str(n.meta.get("key", "")).removeprefix("param.") for n in leaves] for leaves in run.leaves]
    whole = [any(plan.zero_of(name) < plan.zero for name in each) for each in names]
    kinds = list(zip(whole, (group_of(instance[0], plan.layouts.groups) for instance in run.instances), strict=True))
    staged = list(zip((max((plan.stage_of.get(name, 0) for name in each), default=0) for each in names), kinds, strict=True))
    borders = list(itertools.pairwise(kinds))
    first = [borders.index(border) for border in set(borders)]
    return {staged.index(kind) for kind in set(staged)} | {*first, *(k + 1 for k in first)}
