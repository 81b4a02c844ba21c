"""What a step of a plan takes, from the costs of its graph: seconds, bytes at the peak, and bytes received by axis.

    seconds = (compute + tensor traffic) x the slowest stage's share x (micro-batches + stages - 1) / micro-batches
              + sums of gradients and gathers of parameters + stage transfers + optimizer

with compute and traffic summed over the placement that the passes would make; bytes are those of the stage that needs the most
(compiler/stages.py cuts it). What runs of the sums of gradients beside the last backward (passes/segment.py) is left out, as far as
the topology's profile says that compute does not suffer from it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter
from typing import NamedTuple

from ..passes.graph_tools import Calls, metas
from ..passes.segment import PARTS, largest_part
from ..passes.segment import parts_of as segments_of
from ..runtime.program import Mesh
from .cost import size_of
from .emit import SEGMENT_BYTES, Problem
from .gathers import Whole, gather_groups, kept_whole, shared
from .gradient_sums import GradientSums
from .keeping import Keeping, kept_where
from .placed_cost import PlacedCost
from .plan import Plan, Prediction, data_size
from .schedules import BUCKET_BYTES
from .stages import StageCuts, Stages, StageShare
from .step_sums import Move, Moved, Part, copies_rate, level_of, parts_of
from .step_terms import Terms
from .tensor_axis import Load
from .topology import Topology, collective_bytes
from .totals import Function, by_totals

BACKWARD_SHARE = 2 / 3
"""Of a graph's compute: each product of the forward has two in the backward."""


@dataclass(frozen=True)
class Batch:
    """rows        samples: of each data rank (mode "local"), or of the whole batch ("global")
    captured    samples of the graph that costs are counted on
    """

    rows: int
    mode: str
    captured: int

    def local_rows(self, mesh: Mesh) -> int:
        """Samples of a data rank."""
        return self.rows if self.mode == "local" else self.rows // data_size(mesh)

    def share(self, mesh: Mesh) -> float:
        """Of the captured batch, what a data rank gets."""
        return (self.rows if self.mode == "local" else max(self.rows / data_size(mesh), 1.0)) / self.captured

    def samples(self, mesh: Mesh) -> int:
        """Of a step."""
        return self.rows * data_size(mesh) if self.mode == "local" else self.rows


def load_of(plan: Plan, ways: GradientSums, share: float, captured: int | None = None) -> Load:
    """What a placement over the plan's tp is made for, where a data rank gets a share of the captured batch, of so many samples.
    ways: of its mesh and level of ZeRO."""
    few = captured is not None and share * captured / plan.microbatches < plan.mesh.size("tp") <= captured
    return Load(share, plan.microbatches, sums_count(plan, ways), few)


def sums_count(plan: Plan, ways: GradientSums) -> float:
    """What a second in which gradients of copies are summed over tp alone, once a step, counts against one of the micro-batches:
    what their sums take more than those of other parameters do, of as many bytes. It may be less than nothing: data ranks whose
    tensor axis holds copies have all its links."""
    if plan.mesh.size("tp") == 1:
        return 0.0
    assert ways.topology is not None
    return (ways.copies_rate - ways.own_rate) / copies_rate(plan.mesh, ways.topology) / bubble(plan)


def rounded_down(x: float, base: float) -> float:
    """To a power of `base`, so that what is nearly alike is one; 0 stays 0."""
    return base ** math.floor(math.log(x, base) + 1e-9) if x > 0 else 0.0


ROUNDING = 1e-9
"""The share by which a total may be below a border that it is to be above."""

SECONDS_OF = "launches", "latencies", "gathers", "compute", "traffic", "sums", "trainable"
"""Of a placement's cost, what the seconds of any step depend on; under ZeRO-3, and in a pipeline, on more."""

BYTES_OF = "sums", "parameters", "trainable", "activations", "fixed", "gathered", "temporaries"
"""The same of the bytes of the peak."""


class PartsLeast(NamedTuple):
    """Of a stage whose backward is cut into parts, at the least parameters there can be: whether these are several; bytes of the
    gradients of the largest, and of what is packed."""

    several: bool
    part: float
    packed: float


class StepCost:
    """Of any plan for one graph, batch and machine."""

    def __init__(self, problem: Problem, topology: Topology, batch: Batch, calls: Calls, kept: Keeping) -> None:
        """calls, kept: `op_calls` and `keeping` of the graph."""
        self.topology, self.batch = topology, batch
        nodes = [n for n in problem.graph.graph.find_nodes(op="placeholder") if n.meta["key"].startswith("param.")]
        parameters = [metas(n)[0] for n in nodes]
        sizes = [float(size_of(meta)) for meta in parameters]
        self.trained = sum(float(size_of(meta)) for meta in parameters if meta.grad)
        self.shared = shared(problem.graph)
        self.largest = max(sizes, default=0.0) / (sum(sizes) or 1.0)
        self.groups = gather_groups(problem.graph, calls)
        self._whole: dict[int, list[Whole]] = {}
        self.cuts = StageCuts(problem.graph, kept.stream)
        self._kept = kept_where(calls, kept)
        self._sizes = {
            n.meta["key"].removeprefix("param."): (size, size * meta.grad, size * (n.meta["key"] in kept.again))
            for n, meta, size in zip(nodes, parameters, sizes, strict=True)
        }
        self._stages: dict[int, Stages] = {}
        self._sums: dict[tuple[Mesh, int, bool, float], GradientSums] = {}
        self._terms: dict[tuple[object, ...], Terms] = {}

    def whole(self, stages: int) -> list[Whole]:
        """What ZeRO-3 may keep whole, of a model in so many stages."""
        if stages not in self._whole:
            self._whole[stages] = kept_whole(self.groups, stages)
        return self._whole[stages]

    def predict(self, plan: Plan, cost: PlacedCost, whole: Whole | None = None) -> Prediction:
        """cost     of the graph under the plan's placement over tp, with that placement's gap
        whole    the shares of `plan.whole`
        """
        whole = whole or self.whole(plan.stages)[0]
        terms = self.terms(plan)
        (seconds, moved), size = self._seconds(terms, cost, whole), self._bytes(terms, cost, whole)
        parts = seconds | {f"{what} bytes": n for what, n in size.items()}
        traffic = self._received(terms, cost, moved)
        return Prediction(sum(seconds.values()), sum(size.values()), traffic, parts, cost.gap)

    def peak(self, plan: Plan, cost: PlacedCost, whole: Whole) -> float:
        """Bytes of the peak alone, of a plan with these parameters kept whole."""
        return sum(self._bytes(self.terms(plan, whole=whole.count > 0), cost, whole).values())

    def alike_parts(self, plan: Plan, least: float) -> list[tuple[float, float]]:
        """Ranges of the bytes of parameters with gradients that placements may have, from the least to all: where the backward has
        as many parts, and as much runs beside it."""
        terms, most = self.terms(plan), self.trained
        share, borders = terms.stages.heaviest.trained, []
        if self._hidden_share(terms, least * share) != self._hidden_share(terms, most * share):
            borders = [count * SEGMENT_BYTES / share for count in range(2, PARTS + 1)]
        ends = least, *(border for border in borders if least < border < most), most
        return [(low * (1 - ROUNDING), high) for low, high in itertools.pairwise(ends)]

    def at_least(
        self, plan: Plan, whole: Sequence[Whole], least: PlacedCost, trained: tuple[float, float] | None = None
    ) -> tuple[Function, Function]:
        """Seconds, and bytes of the peak, that no step is below, for the totals of its placement (compiler/totals.py): of the plan
        with any of these parameters kept whole, each of which are more than those before.

        Both are convex in the totals, and grow with each but, it may be, with `sums`. The more are whole, the less is gathered
        and the more is held; but the largest block that is still gathered may be smaller, and where parameters have other shares
        of the gradients than of the bytes, the gather once a step may cost more than the others save. What buckets pack is not
        convex, and counts as of `least`, which no placement is below; nor is the largest part of a backward, which has at least
        an equal share and at least what it has of `least`; nor is the choice of how copies are summed, which count as what their
        bytes take at least.

        trained: one of the ranges of `alike_parts`, of whose placements this holds; None: of all
        """
        few, many = whole[0], whole[-1]
        fewer, more = (self.terms(plan, whole=each.count > 0) for each in (few, many))
        uneven = max(many.trained - w.trained - (many.held - w.held) for w in whole)
        gather = more.times.collective("all_gather", "dp_shard").rate
        gathered = uneven * more.stages.heaviest.trained * gather
        cut_for = self.trained if trained is None or trained[1] == self.trained else sum(trained) / 2  # at its end it has one more
        held = replace(few, left=many.left, largest=many.largest, alone=many.alone)
        parts = [self._parts_least(fewer, least, held, stage) for stage, _ in fewer.fullest]

        def seconds(cost: PlacedCost) -> float:
            found = sum(self._seconds(more, cost, many, cut_for)[0].values())
            return found - cost.trainable * gathered

        def size(cost: PlacedCost) -> float:
            return max(sum(each.values()) for each in self._stage_bytes(fewer, cost, held, parts))

        of_seconds = [*SECONDS_OF, *(("parameters", "read_again") if plan.zero == 3 else ()), *(("stream",) if more.pp > 1 else ())]
        depends = attrgetter(*of_seconds), attrgetter(*BYTES_OF)
        return by_totals(seconds, depends[0], least), by_totals(size, depends[1], least)

    def beside(self, plan: Plan, cost: PlacedCost) -> float:
        """Of a plan's first sums of gradients, the share that may run beside the backward."""
        terms = self.terms(plan)
        return self._hidden_share(terms, cost.trainable * terms.stages.heaviest.trained)

    def terms(self, plan: Plan, *, whole: bool | None = None) -> Terms:
        """Of a plan. whole: whether ZeRO-3 keeps parameters whole; None: as the plan says."""
        kept = bool(plan.whole) if whole is None else whole
        key = plan.mesh, plan.zero, plan.microbatches, plan.schedule, plan.small_copies, plan.beside, kept
        if key not in self._terms:
            stages = self.stages(plan.stages)
            self._terms[key] = Terms(
                zero=plan.zero,
                microbatches=plan.microbatches,
                share=self.batch.share(plan.mesh),
                stages=stages,
                fullest=stages.fullest(flying(plan.stages, plan.schedule, plan.microbatches)),
                bubble=bubble(plan),
                uneven=self.batch.mode == "global" and self.batch.rows % plan.data_size > 0,
                sums=self.sums_of(plan, level_of(plan.zero)),
                whole=self.sums_of(plan, 2) if kept else None,
                times=self.topology.on(plan.mesh),
            )
        return self._terms[key]

    def _seconds(
        self, terms: Terms, cost: PlacedCost, whole: Whole, cut_for: float | None = None
    ) -> tuple[dict[str, float], Moved]:
        """And what the data axes move. cut_for: what it takes at least, with copies at the least that they take, and a backward in
        as many parts as so many bytes of parameters with gradients make; None: just what it takes."""
        m, share = terms.microbatches, terms.share
        heaviest, work = terms.stages.heaviest, terms.stages.slowest.work
        runs = terms.bubble * work
        backward = cost.compute * share * work / m * BACKWARD_SHARE
        parts, at_least = self._parts(terms, cost, whole), cut_for is not None
        moved = Moved([*self._inside(terms, cost, whole)])
        moved.add(parts, heaviest.trained, at_least)
        trained = (cost.trainable if cut_for is None else cut_for) * heaviest.trained
        seconds = {
            "compute": (cost.compute * share + cost.launches * m) * runs,
            "tensor": (cost.traffic * share + (cost.latencies + cost.gathers) * m) * runs,
            "data": moved.seconds(terms.times, self._hidden_share(terms, trained), backward),
            "pipeline": self._pipeline_seconds(terms, cost),
            "optimizer": self._optimizer_seconds(sum(part.updated(at_least) for part in parts) * heaviest.trained),
        }
        return seconds, moved

    @staticmethod
    def _parts(terms: Terms, cost: PlacedCost, whole: Whole) -> list[Part]:
        return parts_of(terms, cost.trainable, cost.sums / terms.copies_rate if cost.sums else 0.0, whole)

    def sums_of(self, plan: Plan, level: int) -> GradientSums:
        """level: as `level_of` has it."""
        key = plan.mesh, level, plan.small_copies, plan.beside
        if key not in self._sums:
            self._sums[key] = GradientSums(plan.mesh, level, self.topology, plan.small_copies, plan.beside)
        return self._sums[key]

    def stages(self, count: int) -> Stages:
        """Of a model in so many stages."""
        if count not in self._stages:
            self._stages[count] = self.cuts.stages(count, self._sizes, self._kept)
        return self._stages[count]

    def _bytes(self, terms: Terms, cost: PlacedCost, whole: Whole) -> dict[str, float]:
        """Of the stage that needs the most."""
        return max(self._stage_bytes(terms, cost, whole), key=lambda found: sum(found.values()))

    def _stage_bytes(
        self, terms: Terms, cost: PlacedCost, whole: Whole, least: Sequence[PartsLeast] | None = None
    ) -> Iterator[dict[str, float]]:
        """Of the stages that may need the most. least: by stage, where what they need at least is meant, as `at_least` says; with
        copies cut over tp besides, wherever they may be."""
        m, share, parts = terms.microbatches, terms.share, self._parts(terms, cost, whole)
        for (stage, held_at_once), bound in zip(terms.fullest, least or itertools.repeat(None), strict=False):
            trained = cost.trainable * stage.trained
            frozen = max(0.0, cost.parameters * stage.held - trained)
            state = sum(part.state(stage.trained, least is not None) for part in parts)
            state += frozen_bytes(terms.zero, terms.dp_shard, frozen * (1 - whole.held)) + frozen * whole.held
            activations = cost.activations * share * held_at_once / m + cost.fixed * stage.kept + cost.temporaries * share / m
            # Under ZeRO-3 the backward of a block holds its parameters whole, and their gradients until they are scattered; the
            # first gradient of a parameter that is used twice waits for the second, which is added where it lies.
            waiting = self.shared * trained if terms.zero else 0.0
            if terms.zero == 3:
                waiting = max(2 * whole.largest * cost.parameters, waiting + 2 * whole.alone * cost.parameters, 2 * waiting)
            gathered = 2 * cost.gathered + waiting
            if terms.scatters_once:
                packed = bound.packed if bound else self._packed(terms, cost, whole, stage)
                gathered += self._part(terms, cost, whole, stage, bound) + packed
            yield {"state": state, "activation": activations, "gathered": gathered}

    def _received(self, terms: Terms, cost: PlacedCost, moved: Moved) -> dict[str, float]:
        mesh, stages, m, share = terms.times.mesh, terms.pp, terms.microbatches, terms.share
        found = {axis: 0.0 for axis in mesh.axes}
        for axis, kind, size, n in moved.moves:
            found[axis] = found.get(axis, 0.0) + n * collective_bytes(kind, size, mesh.size(axis))
        if "tp" in found:
            found["tp"] += (cost.received * share + cost.received_gathers * m) / stages
        if "pp" in found:
            found["pp"] += 2 * sum(terms.stages.widths) / stages * self._border(terms, cost) * m
        return found

    @staticmethod
    def _inside(terms: Terms, cost: PlacedCost, whole: Whole) -> Iterator[Move]:
        """What ZeRO-3 gathers and scatters inside the graphs."""
        if terms.zero < 3 or not whole.left:
            return
        stage = terms.stages.heaviest
        held, trainable, again = cost.parameters * stage.held, cost.trainable * stage.trained, cost.read_again * stage.again
        blocks = math.ceil(whole.left / terms.pp)
        times = terms.microbatches * blocks
        yield "dp_shard", "all_gather", held * (1 - whole.held) / blocks, times
        yield "dp_shard", "all_gather", again * (1 - whole.again) / blocks, times
        yield "dp_shard", "reduce_scatter", trainable * (1 - whole.trained) / blocks, times

    @staticmethod
    def _scattered(terms: Terms, cost: PlacedCost, whole: Whole, stage: StageShare) -> float:
        """Bytes of a stage's gradients that are scattered once a step, whole over the data axes."""
        return cost.trainable * stage.trained * (whole.trained if terms.zero == 3 else 1.0)

    def _largest(self, terms: Terms, cost: PlacedCost, whole: Whole, stage: StageShare) -> float:
        """Of these, the bytes of the largest gradient."""
        return min(self.largest * cost.trainable, self._scattered(terms, cost, whole, stage))

    def _part(self, terms: Terms, cost: PlacedCost, whole: Whole, stage: StageShare, least: PartsLeast | None = None) -> float:
        """Bytes of gradients that ZeRO-1 and 2 hold whole at their most, of which shards are to be left: where micro-batches add to
        them all of them, else those of a part of the backward. A parameter larger than a part is one by itself. least: what is
        convex in the totals, and nowhere more."""
        scattered, trained = self._scattered(terms, cost, whole, stage), cost.trainable * stage.trained
        if terms.microbatches > 1 or terms.uneven:
            return scattered
        largest = self._largest(terms, cost, whole, stage)
        if least is None or least.several:
            return max(largest, scattered * largest_part(trained, SEGMENT_BYTES) / (trained or 1.0))
        return max(largest, scattered / PARTS, least.part)

    def _parts_least(self, terms: Terms, least: PlacedCost, whole: Whole, stage: StageShare) -> PartsLeast:
        several = segments_of(least.trainable * stage.trained, SEGMENT_BYTES) > 1
        return PartsLeast(several, self._part(terms, least, whole, stage), self._packed(terms, least, whole, stage))

    def _packed(self, terms: Terms, cost: PlacedCost, whole: Whole, stage: StageShare) -> float:
        """To be scattered they are packed, a bucket at a time; a parameter larger than a bucket is one by itself."""
        packed = max(min(self._part(terms, cost, whole, stage), BUCKET_BYTES), self._largest(terms, cost, whole, stage))
        return packed - packed / terms.dp_shard  # its shards come after it

    def _hidden_share(self, terms: Terms, trained: float) -> float:
        """Of the first sums of gradients, what runs beside the last micro-batch's backward while that lasts: all but those of its
        last part. trained: bytes that decide how many parts there are."""
        parts = 1 if terms.uneven else segments_of(trained, SEGMENT_BYTES)
        return self.topology.overlap.get("data", 0.0) * (parts - 1) / parts

    @staticmethod
    def _border(terms: Terms, cost: PlacedCost) -> float:
        """Bytes that a micro-batch's activations have between two blocks, and their gradients."""
        return cost.stream * terms.share / terms.microbatches

    def _pipeline_seconds(self, terms: Terms, cost: PlacedCost) -> float:
        if terms.pp == 1:
            return 0.0
        size = self._border(terms, cost) * terms.stages.widest
        return 2 * (terms.microbatches + terms.pp - 2) * terms.times.collective("send", "pp").of(size)

    def _optimizer_seconds(self, size: float) -> float:
        """Read parameter, gradient and two moments, write three of them (AdamW)."""
        device = self.topology.device
        return 7 * size / (device.bandwidth * device.memory_efficiency)


def frozen_bytes(zero: int, dp_shard: int, size: float) -> float:
    """Bytes that a rank holds of so many bytes of parameters without gradients, whole over the data axes."""
    return size / (dp_shard if zero == 3 else 1)


def bubble(plan: Plan) -> float:
    """How much longer a stage's step takes than its micro-batches do."""
    return (plan.microbatches + plan.stages - 1) / plan.microbatches


@cache
def flying(stages: int, schedule: str, microbatches: int) -> tuple[int, ...]:
    """Micro-batches whose activations each stage holds at once."""
    return tuple(min(stages - k, microbatches) if schedule == "1f1b" else microbatches for k in range(stages))
