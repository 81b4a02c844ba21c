"""The plans a request allows, and what each would cost: every factorization of the devices, priced by the cost and memory model.

A step of a candidate takes

    seconds = (compute + tensor traffic) / stages x (micro-batches + stages - 1) / micro-batches
              + gradient and parameter traffic over the data axes + stage transfers + optimizer

with compute and traffic summed over the placement that the passes would make. What runs of the sums of gradients beside the last
backward (passes/segment.py) is left out, as far as the topology's profile says that compute does not suffer from it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..passes.graph_tools import Calls, metas, op_calls
from ..passes.prologue import TIME
from ..passes.rules.base import Axis
from ..passes.segment import largest_part, parts_of
from ..passes.shard import ShardingError
from ..passes.types import Type, Varying, balanced_sizes
from ..runtime.program import Mesh
from .cost import size_of
from .emit import SEGMENT_BYTES, Problem
from .gathers import Whole, gather_groups, kept_whole, shared
from .keeping import keeping
from .layout import with_places
from .memory import state_memory
from .place import Placement, Policy, place
from .placed_cost import PlacedCost
from .plan import Plan, Prediction, data_size
from .prices import Volume
from .schedules import BUCKET_BYTES
from .strategy import Limits, Request, Strategy, StrategyError, divisors
from .tensor_axis import Layouts, Load, TensorAxis
from .topology import CollectiveKind, Topology, collective_bytes, collective_seconds

BACKWARD_SHARE = 2 / 3
"""Of a graph's compute: each product of the forward has two in the backward."""

FILLED = 0.9
"""The share of the memory limit that blocks are kept whole up to. The rest is for what no plan foresees: an allocator's holes,
other buffers, an error of some percent."""


@dataclass(frozen=True)
class Candidate:
    plan: Plan
    samples: int
    predicted: Prediction

    @property
    def per_sample(self) -> float:
        return self.predicted.step_seconds / self.samples


class Search:
    def __init__(
        self,
        problem: Problem,
        request: Request,
        topology: Topology,
        rows: int,
        batch: str,
        microbatches: int | None,
        limit: float,
    ) -> None:
        self.problem, self.request, self.topology, self.batch, self.limit = problem, request, topology, batch, limit
        self.microbatches = microbatches if microbatches is not None else request.strategy.microbatches
        self.rows, self.captured = rows, sum(problem.local_batches)
        placeholders = problem.graph.graph.find_nodes(op="placeholder")
        self.parameters = {n.meta["key"]: metas(n)[0] for n in placeholders if n.meta["key"].startswith("param.")}
        sizes = [float(size_of(meta)) for meta in self.parameters.values()]
        self.trained = sum(float(size_of(meta)) for meta in self.parameters.values() if meta.grad)
        self.shared = shared(problem.graph)
        self.largest = max(sizes, default=0.0) / (sum(sizes) or 1.0)
        self.calls = op_calls(problem.graph)
        self.groups = gather_groups(problem.graph, self.calls)
        self._whole: dict[int, list[Whole]] = {}
        self.kept = keeping(self.calls)
        self.tensor = TensorAxis(problem.graph, problem.loss, topology, self.calls, self.kept)
        self._coupled: ShardingError | Literal[False] | None = None

    def candidates(self) -> Iterable[Candidate]:
        pins = self.request.strategy
        limits = Limits(
            tensor=min(self.topology.node_size, 64),
            stages=max(1, len(self.parameters)),
            batch=self.rows if self.batch == "global" else None,
            hybrid=pins.zero != 3,  # who asks for ZeRO-3 wants it over all data ranks
        )
        best = math.inf  # seconds a sample, of what fits
        fastest: list[Candidate] = []
        least: dict[Mesh, float] = {}  # seconds a sample: no layouts are faster, at no level of ZeRO

        def like(first: Candidate) -> Iterator[Candidate]:
            nonlocal best
            for candidate in self.like(first):
                if self.fits(candidate):
                    best = min(best, candidate.per_sample)
                yield candidate

        for mesh in self.request.meshes(limits):
            for plan in self.variants(mesh, pins):
                first = self.price(plan)
                if plan.byte_price == 0.0:
                    fastest.append(first)
                    least[mesh] = min(first.per_sample, least.get(mesh, math.inf))
                yield from like(first)
        for first in sorted(fastest, key=lambda c: least[c.plan.mesh]):
            if self.worth_sparing(least[first.plan.mesh], best) and not self.fits(first):
                for plan in self.sparing(first):
                    yield from like(self.price(plan))

    @staticmethod
    def worth_sparing(least: float, best: float) -> bool:
        """Whether layouts of a mesh, on which a sample takes `least` seconds or more, may be faster than the best that fits."""
        return least < best

    def fits(self, candidate: Candidate) -> bool:
        return candidate.predicted.peak_bytes <= self.limit

    def like(self, first: Candidate) -> Iterator[Candidate]:
        """It, and what else may be done with its mesh and its layouts."""
        for candidate in self.accumulating(first):
            yield candidate
            if self.request.strategy.zero is None:
                yield from self.filled(candidate)

    def sparing(self, fastest: Candidate) -> Iterator[Plan]:
        """With layouts that might fit where the fastest do not: those of the front on which what is kept for the backward has its
        price, a byte of the peak the same whatever it is of; and sequence parallelism."""
        plan, parts = fastest.plan, fastest.predicted.parts
        size, load = plan.mesh.size("tp"), Load(self.share(plan.mesh), plan.microbatches)
        state = max(parts["state bytes"], 1.0) / max(self.tensor.cost(size, Layouts.of(plan), load).parameters, 1.0)
        kept = self.flying(plan) / plan.microbatches / plan.stages
        runs = self.local_rows(plan.mesh) if plan.stages == 1 and self.microbatches is None else plan.microbatches
        least = state * self.tensor.parameters / size + parts["activation bytes"] / size * plan.microbatches / max(1, runs)
        if least <= self.limit:
            for layouts in self.tensor.front(size, load, kept / state)[1:]:
                yield replace(plan, byte_price=layouts.byte_price, kept_price=layouts.kept_price)
            if self.request.strategy.layouts is None:  # Megatron's, which gather no parameters for an op
                yield replace(plan, byte_price=None, sequence_parallel=True)

    def accumulating(self, first: Candidate) -> Iterator[Candidate]:
        """It, and while it does not fit, the same with twice the micro-batches, whose activations are not held together."""
        yield first
        candidate, plan = first, first.plan
        if plan.stages > 1 or self.microbatches is not None:
            return
        while candidate.predicted.peak_bytes > self.limit and 2 * plan.microbatches <= self.local_rows(plan.mesh):
            parts = candidate.predicted.parts
            if parts["state bytes"] + parts["gathered bytes"] > self.limit or self.samples_are_coupled():
                return
            plan = replace(plan, microbatches=2 * plan.microbatches)
            candidate = self.price(plan)
            yield candidate

    def filled(self, candidate: Candidate) -> Iterator[Candidate]:
        """Under ZeRO-3: the same with as many blocks kept whole as memory is left for, where some are but not all."""
        plan, room = candidate.plan, FILLED * self.limit
        if plan.zero != 3 or candidate.predicted.peak_bytes > room:
            return
        whole = self.whole(plan.stages)

        def price(k: int) -> Candidate:
            return self.price(replace(plan, whole=whole[k].names), whole[k])

        counts = range(len(whole))
        fitting = bisect_right(counts, 0, key=lambda k: int(price(k).predicted.peak_bytes > room)) - 1
        if 0 < fitting < len(counts) - 1:
            yield price(fitting)

    def whole(self, stages: int) -> list[Whole]:
        """What ZeRO-3 may keep whole, of a model in so many stages."""
        if stages not in self._whole:
            self._whole[stages] = kept_whole(self.groups, stages)
        return self._whole[stages]

    def without_pins(self) -> Search | None:
        """The same search with nothing pinned, None if nothing is."""
        free = Strategy()
        if self.request.strategy == free:
            return None
        request = replace(self.request, strategy=free)
        return Search(self.problem, request, self.topology, self.rows, self.batch, None, self.limit)

    def variants(self, mesh: Mesh, pins: Strategy) -> Iterable[Plan]:
        """Plans over one mesh: ZeRO level, layouts over tp, micro-batches."""
        shard = mesh.size("dp_shard") > 1
        levels = [pins.zero] if pins.zero is not None else ([2, 3] if shard else [0])  # 1 runs as 2 does
        data = data_size(mesh)
        if self.batch == "global" and data > self.rows:
            sizes = ", ".join(str(d) for d in divisors(mesh.world_size) if d <= self.rows)
            raise StrategyError(
                f"dim 0 of the batch, {self.rows} samples, cannot be cut over {data} data ranks: dp of {sizes} works, "
                "or a larger batch"
            )
        local = self.local_rows(mesh)
        counts = self.microbatch_counts(mesh.size("pp"), local)
        for zero in levels:
            for count in sorted({max(1, min(int(count), max(1, local))) for count in counts}):
                for layouts in self.layouts(mesh, pins, count):
                    yield Plan(
                        mesh=mesh,
                        zero=int(zero if shard else 0),
                        sequence_parallel=layouts.sequence,
                        byte_price=layouts.byte_price,
                        kept_price=layouts.kept_price,
                        schedule=pins.schedule or "1f1b",
                        microbatches=count,
                    )

    def local_rows(self, mesh: Mesh) -> int:
        """Samples of a data rank."""
        return self.rows if self.batch == "local" else self.rows // data_size(mesh)

    def samples_are_coupled(self) -> ShardingError | Literal[False]:
        """Why the batch cannot be cut into micro-batches, False where it can."""
        if self._coupled is None:
            self._coupled = coupling(self.problem, self.calls) or False
        return self._coupled

    def microbatch_counts(self, stages: int, rows: int) -> list[int]:
        """Counts to price. Raises StrategyError for a pinned number above that of samples, and ShardingError, naming the op, for
        one above 1 where samples are coupled."""
        counts = microbatch_counts(stages, rows) if self.microbatches is None else [self.microbatches]
        if self.microbatches is not None and self.microbatches > rows:
            raise StrategyError(
                f"microbatches={self.microbatches} cannot cut dim 0 of the batch, which has {rows} samples for each data rank: "
                f"{f'1 to {rows} work' if rows > 1 else 'only 1 works'}"
            )
        if min(max(counts), rows) == 1:
            return counts
        coupled = self.samples_are_coupled()
        if coupled and self.microbatches is not None:
            raise coupled
        return [1] if coupled else counts

    def layouts(self, mesh: Mesh, pins: Strategy, microbatches: int) -> list[Layouts]:
        """What to try over the mesh's tensor axis. Who pins it means Megatron's layouts, if nothing else is said."""
        n = mesh.size("tp")
        if n == 1:
            return [Layouts()]
        megatron = pins.tp is not None or pins.sequence_parallel is not None
        if pins.layouts == "any" or (pins.layouts is None and not megatron):
            return self.tensor.front(n, Load(self.share(mesh), microbatches))
        sequence = [False, True] if pins.sequence_parallel is None else [pins.sequence_parallel]
        return [Layouts(sequence=s) for s in sequence]

    def share(self, mesh: Mesh) -> float:
        """Of the captured batch, what a data rank gets."""
        return (self.rows if self.batch == "local" else max(self.rows / data_size(mesh), 1.0)) / self.captured

    def placement(self, plan: Plan) -> Placement | None:
        """Over tp; None where there is no such axis."""
        load = Load(self.share(plan.mesh), plan.microbatches)
        return self.tensor.placement(plan.mesh.size("tp"), Layouts.of(plan), load)

    def with_layout(self, plan: Plan) -> Plan:
        """The plan with where its parameters lie over tp and pp: a rank, or a call, of other shapes would find other places."""
        return with_places(plan, self.problem.graph, self.placement(plan))

    @staticmethod
    def flying(plan: Plan) -> int:
        """Micro-batches whose activations the first stage holds at once."""
        return min(plan.stages, plan.microbatches) if plan.schedule == "1f1b" else plan.microbatches

    def heaviest_stage(self, stages: int) -> float:
        """The least share of all parameters' bytes that the heaviest stage can have: an even one, or the largest parameter's."""
        return max(1 / stages, self.largest)

    def price(self, plan: Plan, whole: Whole | None = None) -> Candidate:
        """`whole`: the shares of `plan.whole`."""
        mesh = plan.mesh
        whole = whole or self.whole(plan.stages)[0]
        data, stages, m, share = plan.data_size, plan.stages, plan.microbatches, self.share(mesh)
        cost = self.tensor.cost(mesh.size("tp"), Layouts.of(plan), Load(share, m))
        bubble = (m + stages - 1) / m
        heaviest = self.heaviest_stage(stages)
        bytes_held, trained = cost.parameters * heaviest, cost.trainable * heaviest
        # Under ZeRO-3 gradients are scattered before they are summed over tp.
        summed = whole.trained + (1 - whole.trained) / mesh.size("dp_shard") if plan.zero == 3 else 1.0
        moved = [*self._data_traffic(plan, cost, whole)]
        parts = {
            "compute": (cost.compute * share + cost.launches * m) / stages * bubble,
            "tensor": (cost.traffic * share + (cost.latencies + cost.gathers) * m) / stages * bubble + cost.sums * summed / stages,
            "data": sum(n * collective_seconds(kind, size, self.topology.span(mesh, axis)) for axis, kind, size, n in moved)
            - self._hidden_seconds(plan, moved, cost.compute * share / stages / m * BACKWARD_SHARE),
            "pipeline": self._pipeline_seconds(plan, cost, share),
            "optimizer": self._optimizer_seconds(plan, trained),
        }
        seconds = sum(parts.values())
        frozen = bytes_held - trained
        state = state_bytes(plan, trained * (1 - whole.trained), frozen * (1 - whole.held))
        if plan.whole:
            state += state_bytes(replace(plan, zero=2), trained * whole.trained, frozen * whole.held)
        activations = cost.activations * share / stages * self.flying(plan) / m + cost.temporaries * share / m
        # Under ZeRO-3 the backward of a block holds its parameters whole, and their gradients until they are scattered; the first
        # gradient of a parameter that is used twice waits for the second, which is added where it lies.
        waiting = self.shared * trained if plan.zero else 0.0
        if plan.zero == 3:
            waiting = max(2 * whole.largest * cost.parameters, waiting + 2 * whole.alone * cost.parameters, 2 * waiting)
        gathered = 2 * cost.gathered + waiting
        if plan.zero in (1, 2) or plan.whole:
            gathered += self.unscattered_bytes(plan, trained, trained * (whole.trained if plan.zero == 3 else 1.0))
        peak = state + activations + gathered
        samples = self.rows * data if self.batch == "local" else self.rows
        traffic = {axis: 0.0 for axis in mesh.axes}
        for axis, kind, size, n in moved:
            traffic[axis] += n * collective_bytes(kind, size, mesh.size(axis))
        if "tp" in traffic:
            traffic["tp"] += (cost.received * share + cost.received_gathers * m + cost.received_once * summed) / stages
        if "pp" in traffic:
            traffic["pp"] += 2 * (stages - 1) / stages * self._border(plan, cost, share) * m
        parts |= {"state bytes": state, "activation bytes": activations, "gathered bytes": gathered}
        return Candidate(plan, samples, Prediction(seconds, peak, traffic, parts, cost.gap))

    def _data_traffic(self, plan: Plan, cost: PlacedCost, whole: Whole) -> Iterator[tuple[str, CollectiveKind, float, int]]:
        """(axis, kind, bytes, times a step): gradients summed, and parameters gathered, over the data axes."""
        held, trainable, again = (x / plan.stages for x in (cost.parameters, cost.trainable, cost.read_again))
        for axis in plan.data_axes:
            if axis == "dp_shard" and plan.zero == 3 and whole.left:
                blocks = math.ceil(whole.left / plan.stages)
                times = plan.microbatches * blocks
                yield axis, "all_gather", held * (1 - whole.held) / blocks, times
                yield axis, "all_gather", again * (1 - whole.again) / blocks, times
                yield axis, "reduce_scatter", trainable * (1 - whole.trained) / blocks, times
            if axis == "dp_shard" and (plan.zero in (1, 2) or plan.whole):
                once = trainable * (whole.trained if plan.whole else 1.0)
                yield axis, "all_gather", once, 1
                yield axis, "reduce_scatter", once, 1
        shards = plan.mesh.size("dp_shard") if plan.zero else 1
        for axis in plan.data_axes:
            if axis != "dp_shard" or not plan.zero:
                yield axis, "all_reduce", trainable / shards, 1

    def unscattered_bytes(self, plan: Plan, trained: float, scattered: float) -> float:
        """Bytes of gradients that ZeRO-1 and 2 hold whole at their most, of which shards are to be left.

        Where micro-batches add to them all of them, else those of a part of the backward. To be scattered they are packed, a
        bucket at a time; a parameter larger than a part or a bucket is one by itself.

        trained, scattered    bytes of all gradients of a stage over tp, and of those that are scattered once a step
        """
        part, largest = scattered, min(self.largest * trained * plan.stages, scattered)
        if plan.microbatches == 1 and self.backward_parts(plan) > 1:
            whole = self.trained / plan.stages
            part = max(largest, scattered * largest_part(whole, SEGMENT_BYTES) / whole)
        packed = max(min(part, BUCKET_BYTES), largest)
        packed -= packed / plan.mesh.size("dp_shard")  # its shards come after it
        return part + packed

    def backward_parts(self, plan: Plan) -> int:
        """Parts of a stage's backward, after each of which gradients are summed. It is whole where data ranks run other shapes."""
        uneven = self.batch == "global" and self.rows % plan.data_size
        return 1 if uneven or plan.data_size == 1 else parts_of(self.trained / plan.stages, SEGMENT_BYTES)

    def _hidden_seconds(self, plan: Plan, moved: Sequence[tuple[str, CollectiveKind, float, int]], backward: float) -> float:
        """Seconds of first sums of gradients that the last micro-batch's `backward` hides: all but those of its last part. What
        ZeRO-3 scatters inside the graphs is waited for."""
        parts = self.backward_parts(plan)
        first: CollectiveKind = "reduce_scatter" if plan.zero else "all_reduce"
        if parts == 1 or (plan.zero == 3 and not plan.whole):
            return 0.0
        sums = [(axis, size) for axis, kind, size, n in moved if kind == first]
        axes = sums[-1:] if plan.whole else sums  # the last: what is scattered once a step
        seconds = sum(collective_seconds(first, size, self.topology.span(plan.mesh, axis)) for axis, size in axes)
        return self.topology.overlap.get("data", 0.0) * min(seconds, backward) * (parts - 1) / parts

    def _border(self, plan: Plan, cost: PlacedCost, share: float) -> float:
        """Bytes that a micro-batch's activations have at a stage border, and their gradients."""
        return cost.stream * share / plan.microbatches

    def _pipeline_seconds(self, plan: Plan, cost: PlacedCost, share: float) -> float:
        if plan.stages == 1:
            return 0.0
        span = self.topology.span(plan.mesh, "pp")
        return 2 * (plan.microbatches + plan.stages - 2) * collective_seconds("send", self._border(plan, cost, share), span)

    def _optimizer_seconds(self, plan: Plan, size: float) -> float:
        """Read parameter, gradient and two moments, write three of them (AdamW)."""
        shards = plan.mesh.size("dp_shard") if plan.zero else 1
        device = self.topology.device
        return 7 * size / max(1, shards) / (device.bandwidth * device.memory_efficiency)


def state_bytes(plan: Plan, trained: float, frozen: float) -> float:
    """Bytes that a rank holds all the time of so many bytes of parameters, whole over the data axes; under ZeRO-1 and 2 of their
    gradients the shards (`Search.unscattered_bytes` says what is whole before)."""
    shards = max(1, plan.mesh.size("dp_shard"))
    level = 2 if plan.zero == 1 else plan.zero
    return state_memory(trained, level, shards).total + frozen / (shards if plan.zero == 3 else 1)


def microbatch_counts(stages: int, rows: int) -> list[int]:
    """Counts worth trying: without a pipeline one, while it fits; else 1 to 8 for each stage, as far as there are samples."""
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
