"""Choose a plan: every factorization of the devices that the request allows, priced by the cost and memory model.

A step of a candidate takes

    seconds = (compute + tensor traffic) / stages x (micro-batches + stages - 1) / micro-batches
              + gradient and parameter traffic over the data axes + stage transfers + optimizer

with compute and traffic summed over the placement that the passes would make. That gradients are summed
while the backward goes on is not counted.
Data-parallel candidates with a local batch differ in the samples they train on: what is compared is seconds per sample.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from ..passes.graph_tools import Calls, metas, op_calls, where
from ..passes.prologue import TIME
from ..passes.rules.base import Axis, find_rule
from ..passes.shard import ShardingError
from ..passes.types import I, Type, Varying, balanced_sizes
from ..runtime.program import Mesh
from .collector import without_collection
from .cost import size_of
from .emit import Problem
from .graph_cost import GraphCost, graph_cost, least_crossing, tensor_placement
from .keeping import keeping, kept_values
from .memory import state_memory
from .place import Policy, place
from .plan import Alternative, Plan, Prediction
from .prices import Volume, held
from .strategy import Limits, Request, Strategy, StrategyError, divisors
from .topology import CollectiveKind, Topology, collective_bytes, collective_seconds
from .units import bytes_text


class DoesNotFit(ValueError):
    """No plan fits the memory limit: says by how much the smallest misses, and what would fit."""


@dataclass(frozen=True)
class Candidate:
    plan: Plan
    samples: int
    predicted: Prediction

    @property
    def per_sample(self) -> float:
        return self.predicted.step_seconds / self.samples


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
) -> Plan:
    """The cheapest plan that fits.

    rows            samples: of each data rank (batch="local"), or of the whole batch ("global"); `problem` may be captured at
                    another number, which costs are scaled from
    memory_limit    bytes per rank; the device's memory when None
    Raises StrategyError for a request that no mesh meets, DoesNotFit where every plan needs more memory.
    """
    search = _Search(problem, request, topology, rows, batch, microbatches)
    _warn_of_unruled(search.calls)
    candidates = sorted(search.candidates(), key=lambda c: (c.per_sample, c.predicted.peak_bytes, c.plan.mesh.axes))
    limit = topology.device.memory if memory_limit is None else float(memory_limit)
    fitting = [c for c in candidates if c.predicted.peak_bytes <= limit]
    if not fitting:
        raise DoesNotFit(_why_nothing_fits(search, candidates, limit))
    best = fitting[0]
    others = [_alternative(c, best, limit) for c in candidates if c is not best]
    return replace(
        best.plan, predicted=best.predicted, alternatives=tuple(others[:12]), reasons=_reasons(best, fitting, candidates)
    )


def _warn_of_unruled(calls: Calls) -> None:
    """One warning that names the ops without a sharding rule, how often and where first each is called."""
    found: dict[object, list[fx.Node]] = {}
    for node, (call, _) in calls.items():
        if any(o.shape for o in call.operands) and find_rule(call, Axis("", 2)) is None:
            found.setdefault(call.target, []).append(node)
    if found:
        ops = "; ".join(f"{len(nodes)} x {where(nodes[0])}" for nodes in found.values())
        warnings.warn(
            f"ops without a sharding rule run replicated on every rank: {ops}. "
            "shardwright.register_rule(op, text) gives an op of yours a rule",
            stacklevel=3,
        )


class _Search:
    def __init__(
        self, problem: Problem, request: Request, topology: Topology, rows: int, batch: str, microbatches: int | None
    ) -> None:
        self.problem, self.request, self.topology, self.batch = problem, request, topology, batch
        self.microbatches = microbatches if microbatches is not None else request.strategy.microbatches
        self.rows, self.captured = rows, sum(problem.local_batches)
        self.costs: dict[tuple[int, bool], GraphCost] = {}
        placeholders = problem.graph.graph.find_nodes(op="placeholder")
        self.parameters = {n.meta["key"]: metas(n)[0] for n in placeholders if n.meta["key"].startswith("param.")}
        sizes = [float(size_of(meta)) for meta in self.parameters.values()]
        self.largest = max(sizes, default=0.0) / (sum(sizes) or 1.0)
        self.stream = least_crossing(problem.graph)
        self.calls = op_calls(problem.graph)
        self.kept = keeping(self.calls)
        self.coupled: ShardingError | Literal[False] | None = None
        """Why the batch cannot be cut into micro-batches, False where it can; None: not looked at yet."""

    def candidates(self) -> Iterable[Candidate]:
        pins = self.request.strategy
        limits = Limits(
            tensor=min(self.topology.node_size, 64),
            stages=max(1, len(self.parameters)),
            batch=self.rows if self.batch == "global" else None,
            hybrid=True,
        )
        for mesh in self.request.meshes(limits):
            for plan in self.variants(mesh, pins):
                yield self.price(plan)

    def without_pins(self) -> _Search | None:
        """The same search with nothing pinned, None if nothing is."""
        free = Strategy()
        if self.request.strategy == free:
            return None
        request = replace(self.request, strategy=free)
        return _Search(self.problem, request, self.topology, self.rows, self.batch, None)

    def variants(self, mesh: Mesh, pins: Strategy) -> Iterable[Plan]:
        """Plans over one mesh: ZeRO level, sequence parallelism, micro-batches."""
        shard = mesh.size("dp_shard") > 1
        levels = [pins.zero] if pins.zero is not None else ([1, 2, 3] if shard else [0])
        sequence = (
            [pins.sequence_parallel] if pins.sequence_parallel is not None else ([False, True] if mesh.size("tp") > 1 else [False])
        )
        data = mesh.size("dp_replicate") * mesh.size("dp_shard")
        if self.batch == "global" and data > self.rows:
            sizes = ", ".join(str(d) for d in divisors(mesh.world_size) if d <= self.rows)
            raise StrategyError(
                f"dim 0 of the batch, {self.rows} samples, cannot be cut over {data} data ranks: dp of {sizes} works, "
                "or a larger batch"
            )
        local = self.rows if self.batch == "local" else self.rows // data
        counts = self.microbatch_counts(mesh.size("pp"), local)
        for zero in levels:
            for sp in sequence:
                for count in counts:
                    yield Plan(
                        mesh=mesh,
                        zero=int(zero if shard else 0),
                        sequence_parallel=bool(sp) and mesh.size("tp") > 1,
                        schedule=pins.schedule or "1f1b",
                        microbatches=max(1, min(int(count), max(1, local))),
                    )

    def microbatch_counts(self, stages: int, rows: int) -> list[int]:
        """Counts to price. Raises StrategyError for a pinned number above that of samples, and ShardingError, naming the op, for
        one above 1 where samples are coupled."""
        counts = microbatch_counts(stages, rows) if self.microbatches is None else [self.microbatches]
        if self.microbatches is not None and self.microbatches > rows:
            raise StrategyError(
                f"microbatches={self.microbatches} cannot cut dim 0 of the batch, which has {rows} samples for each data rank: "
                f"{f'1 to {rows} work' if rows > 1 else 'only 1 works'}"
            )
        if self.coupled is None and min(max(counts), rows) > 1:
            self.coupled = coupling(self.problem, self.calls) or False
        if self.coupled and self.microbatches is not None and min(self.microbatches, rows) > 1:
            raise self.coupled
        return [1] if self.coupled else counts

    def tensor_cost(self, mesh: Mesh, sequence: bool) -> GraphCost:
        """Costs of the graph over the mesh's tp axis; depends on the other axes only through where tp lies."""
        n = mesh.size("tp")
        if (n, sequence) not in self.costs:
            self.costs[n, sequence] = graph_cost(self.problem, _tensor_mesh(n), sequence, self.topology, self.calls, self.kept)
        return self.costs[n, sequence]

    def heaviest_stage(self, stages: int) -> float:
        """The least share of all parameters' bytes that the heaviest stage can have: an even one, or the largest parameter's."""
        return max(1 / stages, self.largest)

    def price(self, plan: Plan) -> Candidate:
        mesh, top = plan.mesh, self.topology
        cost = self.tensor_cost(mesh, plan.sequence_parallel)
        data, stages, m = plan.data_size, plan.stages, plan.microbatches
        share = (self.rows if self.batch == "local" else max(self.rows / data, 1.0)) / self.captured
        launches = top.device.launch * cost.ops * (m - 1)
        work = (cost.compute + cost.traffic) * share + launches
        bubble = (m + stages - 1) / m
        pipelined = work / stages * bubble
        heaviest = self.heaviest_stage(stages)
        bytes_held, trained = cost.parameters * heaviest, cost.trainable * heaviest
        moved = [*self._data_traffic(plan, cost)]
        parts = {
            "compute": cost.compute * share / stages * bubble + launches / stages,
            "tensor": cost.traffic * share / stages * bubble,
            "data": sum(n * collective_seconds(kind, size, top.span(mesh, axis)) for axis, kind, size, n in moved),
            "pipeline": self._pipeline_seconds(plan, share),
            "optimizer": self._optimizer_seconds(plan, trained),
        }
        seconds = pipelined + parts["data"] + parts["pipeline"] + parts["optimizer"]
        state = _state_bytes(plan, trained, bytes_held - trained)
        flying = min(stages, m) if plan.schedule == "1f1b" else m
        activations = cost.activations * share / stages * flying / m + cost.temporaries * share / m
        peak = state + activations
        samples = self.rows * data if self.batch == "local" else self.rows
        traffic = {axis: 0.0 for axis in mesh.axes}
        for axis, kind, size, n in moved:
            traffic[axis] += n * collective_bytes(kind, size, mesh.size(axis))
        if "tp" in traffic:
            traffic["tp"] += (cost.received * share + cost.received_once) / stages
        if "pp" in traffic:
            traffic["pp"] += 2 * (stages - 1) / stages * self._border(plan, share) * m
        parts |= {"state bytes": state, "activation bytes": activations}
        return Candidate(plan, samples, Prediction(seconds, peak, traffic, parts, cost.gap))

    def _data_traffic(self, plan: Plan, cost: GraphCost) -> Iterator[tuple[str, CollectiveKind, float, int]]:
        """(axis, kind, bytes, times a step): gradients summed, and parameters gathered, over the data axes."""
        held, trainable, again = (x / plan.stages for x in (cost.parameters, cost.trainable, cost.read_again))
        for axis in plan.data_axes:
            if axis == "dp_shard" and plan.zero:
                times = plan.microbatches if plan.zero == 3 else 1
                yield axis, "all_gather", held if plan.zero == 3 else trainable, times
                if plan.zero == 3:
                    yield axis, "all_gather", again, times
                yield axis, "reduce_scatter", trainable, times
        shards = plan.mesh.size("dp_shard") if plan.zero else 1
        for axis in plan.data_axes:
            if axis != "dp_shard" or not plan.zero:
                yield axis, "all_reduce", trainable / shards, 1

    def _border(self, plan: Plan, share: float) -> float:
        """Bytes that a micro-batch's activations have at a stage border, and their gradients."""
        return self.stream * share / plan.microbatches / (plan.mesh.size("tp") if plan.sequence_parallel else 1)

    def _pipeline_seconds(self, plan: Plan, share: float) -> float:
        if plan.stages == 1:
            return 0.0
        span = self.topology.span(plan.mesh, "pp")
        return 2 * (plan.microbatches + plan.stages - 2) * collective_seconds("send", self._border(plan, share), span)

    def _optimizer_seconds(self, plan: Plan, size: float) -> float:
        """Read parameter, gradient and two moments, write three of them (AdamW)."""
        shards = plan.mesh.size("dp_shard") if plan.zero else 1
        device = self.topology.device
        return 7 * size / max(1, shards) / (device.bandwidth * device.memory_efficiency)


def _tensor_mesh(n: int) -> Mesh:
    return Mesh(("tp",), (n,)) if n > 1 else Mesh((), ())


def _state_bytes(plan: Plan, trained: float, frozen: float) -> float:
    """Bytes that a rank holds all the time of so many bytes of parameters, whole over the data axes."""
    shards = max(1, plan.mesh.size("dp_shard"))
    return state_memory(trained, plan.zero, shards).total + frozen / (shards if plan.zero == 3 else 1)


def data_ranks(request: Request, rows: int, batch: str) -> tuple[int, int]:
    """The fewest and the most of all meshes that the request allows. The best plan has the most more often than not."""
    meshes = request.meshes(Limits(batch=rows if batch == "global" else None))
    found = [m.size("dp_replicate") * m.size("dp_shard") for m in meshes]
    return min(found), max(found)


def microbatch_counts(stages: int, rows: int) -> list[int]:
    """Counts worth trying: none without a pipeline, else 1 to 8 for each stage, as far as there are samples."""
    if stages == 1:
        return [1]
    counts = {min(rows, stages * k) for k in (1, 2, 4, 8)}
    return sorted(c for c in counts if c >= 1)


def coupling(problem: Problem, calls: Calls) -> ShardingError | None:
    """Why the batch cannot be cut into micro-batches, naming the op that couples samples; None where it can."""
    rows = sum(problem.local_batches)
    slices: dict[str, Type] = {key: Varying(0, (balanced_sizes(rows, 2),)) for key in problem.batch_inputs}
    try:
        place(problem.graph, Axis(TIME, 2), Policy("time", {}, problem.loss, slices=slices), Volume(), calls)
    except ShardingError as error:
        return error
    return None


def name_of(plan: Plan) -> str:
    """`dp_shard=4 (zero 3) x tp=2, pp=2 (1f1b, 8 micro-batches)`."""
    parts = []
    for axis, size in zip(plan.mesh.axes, plan.mesh.sizes, strict=True):
        extra = ""
        if axis == "dp_shard" and plan.zero:
            extra = f" (zero {plan.zero})"
        if axis == "tp" and plan.sequence_parallel:
            extra = " (sequence parallel)"
        if axis == "pp":
            extra = f" ({plan.schedule}, {plan.microbatches} micro-batches)"
        parts.append(f"{axis}={size}{extra}")
    return " x ".join(parts) or "one device"


def _alternative(c: Candidate, best: Candidate, limit: float) -> Alternative:
    if c.predicted.peak_bytes > limit:
        reason = f"needs {bytes_text(c.predicted.peak_bytes - limit)} more than the limit"
    else:
        reason = f"{c.per_sample / best.per_sample:.2f} x the time per sample"
        worse = max(("data", "tensor", "pipeline", "compute", "optimizer"), key=lambda k: _per(c, k) - _per(best, k))
        reason += f", mostly {worse}"
    return Alternative(name_of(c.plan), c.predicted.step_seconds, c.predicted.peak_bytes, reason)


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


def _why_nothing_fits(search: _Search, candidates: Sequence[Candidate], limit: float) -> str:
    """By how much the smallest plan misses, where its bytes lie, and the changes that would fit, the cheapest first."""
    least = min(candidates, key=lambda c: c.predicted.peak_bytes)
    peak, parts = least.predicted.peak_bytes, least.predicted.parts
    state, kept = parts["state bytes"], parts["activation bytes"]
    freed = search.without_pins()
    fitting = [c for c in freed.candidates() if c.predicted.peak_bytes <= limit] if freed is not None else []
    ways: list[tuple[float, str]] = []
    """(how many times the seconds per sample, or the devices, of the smallest plan; what)"""
    if fitting:
        best = min(fitting, key=lambda c: c.per_sample)
        what = f"{name_of(best.plan)}, which your strategy rules out ({bytes_text(best.predicted.peak_bytes)})"
        ways.append((best.per_sample / least.per_sample, what))
    rows = int(search.rows * (limit - state) / kept) if kept else 0
    if 1 <= rows < search.rows:
        ways.append((1.0, f"a batch of {rows} instead of {search.rows} samples"))
    if not fitting:
        ways.append((peak / limit, f"about {math.ceil(peak / limit)} x the devices"))
    ways.append((math.inf, f"memory_limit={math.ceil(peak):d} where the devices have it"))
    places = "".join(f"\n  {line}" for line in _largest(search, least))
    return (
        f"no plan fits {bytes_text(limit)} per rank: the smallest, {name_of(least.plan)}, needs {bytes_text(peak)} "
        f"({bytes_text(state)} of parameters, gradients and optimizer state, {bytes_text(kept)} of activations), "
        f"{bytes_text(peak - limit)} too much. Most of it:{places}\n"
        f"What would fit, the cheapest first: {'; '.join(what for _, what in sorted(ways))}"
    )


def _largest(search: _Search, candidate: Candidate, count: int = 3) -> Iterator[str]:
    """Where the most bytes of a plan lie: lines of the model with the activations that are kept of them, and parameters."""
    plan, parts = candidate.plan, candidate.predicted.parts
    n = plan.mesh.size("tp")
    placement = tensor_placement(search.problem, _tensor_mesh(n), plan.sequence_parallel, search.calls) if n > 1 else None
    axis = Axis("tp", n)
    lines: dict[str, list[float]] = {}
    for node, size in kept_values(search.calls, search.kept, placement, axis):
        if size:
            lines.setdefault(str(node.meta.get("source") or node.name), []).append(size)
    whole = sum(map(sum, lines.values())) or 1.0
    found = [
        (sum(sizes) / whole * parts["activation bytes"], f"activations, {len(sizes)} x {line}") for line, sizes in lines.items()
    ]
    for key, meta in search.parameters.items():
        size, name = size_of(meta) * held(placement.placeholders[key] if placement else I, axis), key.removeprefix("param.")
        if meta.grad:
            found.append((_state_bytes(plan, size, 0.0), f"{name}, its gradient and its optimizer state"))
        else:
            found.append((_state_bytes(plan, 0.0, size), f"{name}, frozen"))
    for size, what in sorted(found, reverse=True)[:count]:
        yield f"{bytes_text(size)}  {' '.join(what.split())}"
