"""Choose a plan: of the candidates that fit in memory, the one that takes the least time.

Data-parallel candidates with a local batch differ in the samples they train on: what is compared is seconds per sample.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose

from torch import fx

from ..passes.graph_tools import Calls, metas, where
from ..passes.rules.base import Axis, find_rule, replicated
from ..runtime.program import Mesh
from .assign import relative_gap
from .candidates import Candidate, Search
from .collector import without_collection
from .cost import Seconds
from .emit import Problem
from .fit import Misfit, why_nothing_fits
from .plan import Alternative, Plan, data_size
from .strategy import Limits, Request
from .topology import Topology
from .units import bytes_text, seconds_text

USABLE = 0.92
"""The share of a device's memory that plans are made for. The rest is for what no plan foresees: the libraries' own buffers, an
allocator's holes, an error of some percent."""


class DoesNotFit(ValueError):
    """No plan fits the memory limit: says by how much the smallest misses, and what would fit, `changes` the same as data."""

    def __init__(self, misfit: Misfit | str) -> None:
        found = misfit if isinstance(misfit, Misfit) else Misfit(misfit, ())
        super().__init__(found.text)
        self.changes = found.changes


@dataclass(frozen=True)
class Known:
    """A plan, and what was in the graph that it was chosen for."""

    plan: Plan
    contents: Mapping[object, int]


ALIKE = 3e-3
"""Costs of one plan on graphs of the same contents may differ so much: they are scaled from other batches. The gap counts it."""


def contents(gm: fx.GraphModule) -> Mapping[object, int]:
    """How often each op is called, and how many parameters have each shape: alike for all batches."""
    parameters = (n for n in gm.graph.find_nodes(op="placeholder") if n.meta["key"].startswith("param."))
    found: Counter[object] = Counter(metas(n)[0] for n in parameters)
    found.update(n.target for n in gm.graph.nodes if n.op == "call_function")
    return found


@without_collection()
def choose(
    problem: Problem,
    request: Request,
    topology: Topology,
    *,
    rows: int,
    memory_limit: float | None,
    batch: str,
    microbatches: int | None = None,
    known: Known | None = None,
) -> Plan:
    """The cheapest plan that fits.

    rows            samples: of each data rank (batch="local"), or of the whole batch ("global"); `problem` may be captured at
                    another number, which costs are scaled from
    memory_limit    bytes per rank; None: `USABLE` of the device's memory
    known           what was chosen for another graph: taken where this one has the same in it and the plan costs the same
    Raises StrategyError for a request that no mesh meets, DoesNotFit where every plan needs more memory.
    """
    limit = USABLE * topology.device.memory if memory_limit is None else float(memory_limit)
    search = Search(problem, request, topology, rows, batch, microbatches, limit)
    unruled = _unruled(search.calls)
    _warn_of_unruled(unruled)
    again = _again(search, known) if known is not None else None
    if again is not None:
        return again
    candidates = sorted(search.candidates(), key=lambda c: (c.per_sample, c.predicted.peak_bytes, c.plan.mesh.axes))
    fitting = [c for c in candidates if search.fits(c)]
    if not fitting:
        raise DoesNotFit(why_nothing_fits(search, candidates, limit))
    best = fitting[0]
    others = _runners_up(candidates, best, limit)
    return replace(
        search.with_layout(best.plan),
        topology=replace(topology, sources={}),
        predicted=replace(best.predicted, gap=max(best.predicted.gap, relative_gap(best.per_sample, search.bound))),
        alternatives=tuple(_alternative(c, best, limit) for c in others),
        reasons=(*_reasons(best, fitting, candidates), *_replicated(search, best.plan, unruled)),
    )


def _again(search: Search, known: Known) -> Plan | None:
    """The known plan for this graph, if choosing would find it again."""
    plan = known.plan
    if plan.predicted is None or contents(search.problem.graph) != known.contents:
        return None
    whole = next((w for w in search.steps.whole(plan.stages) if len(w.names) == len(plan.whole)), None)
    if whole is None:
        return None
    bare = replace(plan, whole=whole.names, layout={}, stage_of={}, topology=None, predicted=None, alternatives=(), reasons=())
    candidate = search.price(bare, whole)
    found, before = candidate.predicted, plan.predicted
    pairs = (found.step_seconds, before.step_seconds), (found.peak_bytes, before.peak_bytes)
    if not all(isclose(*pair, rel_tol=ALIKE) for pair in pairs):
        return None
    facts = {"topology": plan.topology, "alternatives": plan.alternatives, "reasons": plan.reasons}
    gap = before.gap + abs(found.step_seconds / before.step_seconds - 1)
    return replace(search.with_layout(candidate.plan), predicted=replace(found, gap=gap), **facts)


def _unruled(calls: Calls) -> Mapping[object, list[fx.Node]]:
    """The calls of ops without a sharding rule, by op."""
    found: dict[object, list[fx.Node]] = {}
    for node, (call, _) in calls.items():
        if any(meta.shape for meta in (*call.operands, *call.results)) and find_rule(call, Axis("", 2)) is None:
            found.setdefault(call.target, []).append(node)
    return found


def _warn_of_unruled(unruled: Mapping[object, list[fx.Node]]) -> None:
    """One warning that names the ops without a sharding rule, how often and where first each is called."""
    if unruled:
        ops = "; ".join(f"{len(nodes)} x {where(nodes[0])}" for nodes in unruled.values())
        warnings.warn(
            f"ops without a sharding rule run replicated on every rank: {ops}. "
            "shardwright.register_rule(op, text) gives an op of yours a rule",
            stacklevel=3,
        )


def _replicated(search: Search, plan: Plan, unruled: Mapping[object, list[fx.Node]]) -> Iterator[str]:
    """Of each op without a rule, the seconds of a step that it takes on a rank: every rank runs all of a micro-batch of all data
    ranks, of its stage alone."""
    share = search.batch.share(plan.mesh) * plan.data_size
    seconds = Seconds(search.topology, Mesh((), ()), share, plan.microbatches)
    if plan.mesh.world_size > 1:
        for op, nodes in unruled.items():
            calls = [search.calls[node][0] for node in nodes]
            spent = sum(seconds.node(call, replicated(call), Axis("tp", 1), ()) for call in calls)
            yield f"{len(nodes)} x {op} run replicated for want of a rule: {seconds_text(spent / plan.stages)} of the step."


def data_ranks(request: Request, rows: int, batch: str) -> tuple[int, int]:
    """The fewest and the most of all meshes that the request allows. The best plan has the most more often than not."""
    meshes = request.meshes(Limits(batch=rows if batch == "global" else None))
    found = [data_size(mesh) for mesh in meshes]
    return min(found), max(found)


def _runners_up(candidates: Sequence[Candidate], best: Candidate, limit: float) -> list[Candidate]:
    """The fastest of those that fit, and of those that do not, as fast as these."""
    shown: dict[tuple[str, bool], Candidate] = {}  # of plans alike but in the price of bytes the fastest
    for c in candidates:
        if c.plan.name != best.plan.name:
            shown.setdefault((c.plan.name, c.predicted.peak_bytes <= limit), c)
    fits = [c for c in shown.values() if c.predicted.peak_bytes <= limit]
    others = [c for c in shown.values() if c.predicted.peak_bytes > limit]
    return sorted((*fits[:8], *others[:4]), key=lambda c: c.per_sample)


def _alternative(c: Candidate, best: Candidate, limit: float) -> Alternative:
    if c.predicted.peak_bytes > limit:
        reason = f"needs {bytes_text(c.predicted.peak_bytes - limit)} more than the limit"
    else:
        reason = f"{c.per_sample / best.per_sample:.2f} x the time per sample"
        worse = max(("data", "tensor", "pipeline", "compute", "optimizer"), key=lambda k: _per(c, k) - _per(best, k))
        reason += f", mostly {worse}"
    return Alternative(c.plan.name, c.predicted.step_seconds, c.predicted.peak_bytes, reason)


def _per(c: Candidate, part: str) -> float:
    return c.predicted.parts[part] / c.samples


def _reasons(best: Candidate, fitting: Sequence[Candidate], all_: Sequence[Candidate]) -> tuple[str, ...]:
    found = [f"{len(all_)} plans were priced, {len(fitting)} fit in memory; this one takes the least time per sample."]
    parts = {k: v for k, v in best.predicted.parts.items() if not k.endswith("bytes") and v > 0}
    total = sum(parts.values()) or 1.0
    found.append(
        "Its step: "
        + ", ".join(f"{k} {v / total:.0%}" for k, v in sorted(parts.items(), key=lambda i: -i[1]) if v / total >= 0.005)
        + "."
    )
    return tuple(found)
