"""The plans a request allows, and what each would cost: every factorization of the devices, priced by the cost and memory model."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ..passes.graph_tools import Calls, metas, op_calls
from ..passes.prologue import TIME
from ..passes.rules.base import Axis
from ..passes.shard import ShardingError
from ..passes.types import Type, Varying, balanced_sizes
from ..runtime.program import Mesh
from .emit import Problem
from .gathers import Whole
from .groups import runs
from .keeping import keeping
from .layout import with_places
from .layouts import Layouts
from .place import Placement, Policy, place
from .placed_cost import PlacedCost
from .plan import Plan, Prediction, data_size
from .prices import Volume
from .refine import Refinement
from .samples import samples
from .step_cost import Batch, StepCost, load_of
from .step_sums import level_of
from .strategy import Limits, Request, Strategy, StrategyError, divisors
from .tensor_axis import Load, TensorAxis
from .topology import Topology


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
        like: Search | None = None,
    ) -> None:
        """like: of the same graph and captured batch, on a topology with the same innermost level."""
        self.problem, self.request, self.topology, self.limit = problem, request, topology, limit
        self.microbatches = microbatches if microbatches is not None else request.strategy.microbatches
        self.batch = Batch(rows, batch, sum(problem.local_batches))
        placeholders = problem.graph.graph.find_nodes(op="placeholder")
        self.parameters = {n.meta["key"]: metas(n)[0] for n in placeholders if n.meta["key"].startswith("param.")}
        self.calls = like.calls if like else op_calls(problem.graph)
        self.kept = like.kept if like else keeping(self.calls)
        cut = partial(samples, problem.graph, self.batch.captured, problem.batch_inputs, problem.loss, self.calls)
        tensor = like.tensor if like else None
        self.tensor = tensor or TensorAxis(problem.graph, problem.loss, topology, self.calls, self.kept, cut)
        self.steps = StepCost(problem, topology, self.batch, self.calls, self.kept)
        self.runs = like.runs if like else runs(problem.graph)
        self.bound = math.inf  # seconds a sample; see `Refinement.bound`
        self._coupled: ShardingError | Literal[False] | None = None

    def candidates(self) -> Iterable[Candidate]:
        pins = self.request.strategy
        limits = Limits(
            tensor=min(self.topology.node_size, 64),
            stages=max(1, len(self.parameters)),
            batch=self.batch.rows if self.batch.mode == "global" else None,
            hybrid=pins.zero != 3,  # who asks for ZeRO-3 wants it over all data ranks
        )
        fastest: list[Candidate] = []
        best = math.inf
        for mesh in self.request.meshes(limits):
            for plan in self.variants(mesh, pins):
                first = self.price(plan)
                searched = plan.layouts.any  # what fits is searched for (compiler/refine.py)
                if searched:
                    fastest.append(first)
                for candidate in self.completed(first) if searched else self.like(first):
                    if self.fits(candidate):
                        best = min(best, candidate.per_sample)
                    yield candidate
        refinement = Refinement(self, best)
        yield from refinement.candidates(fastest)
        self.bound = refinement.bound

    def fits(self, candidate: Candidate) -> bool:
        return candidate.predicted.peak_bytes <= self.limit

    def like(self, first: Candidate) -> Iterator[Candidate]:
        """It, and what else may be done with its mesh and its layouts."""
        for candidate in self.accumulating(first):
            yield from self.completed(candidate)

    def completed(self, candidate: Candidate) -> Iterator[Candidate]:
        """It, and with parameters kept whole."""
        yield candidate
        if self.keeps_whole(candidate.plan):
            yield from self.filled(candidate)

    def keeps_whole(self, plan: Plan) -> bool:
        """Whether parameters may be kept whole: not by who pins ZeRO-3."""
        return plan.zero == 3 and self.request.strategy.zero is None

    def fits_whole(self, candidate: Candidate) -> bool:
        """Whether it fits, with all parameters whole that may be."""
        if not self.fits(candidate) or not self.keeps_whole(candidate.plan):
            return self.fits(candidate)
        whole = self.steps.whole(candidate.plan.stages)[-1]
        return self.fits(self.price(replace(candidate.plan, whole=whole.names), whole))

    def accumulating(self, first: Candidate) -> Iterator[Candidate]:
        """It, and while it does not fit with all that may be whole, the same with twice the micro-batches, whose activations are
        not held together."""
        yield first
        candidate, plan = first, first.plan
        while not self.fits_whole(candidate):
            parts, wanted = candidate.predicted.parts, 2 * plan.microbatches
            if parts["state bytes"] + parts["gathered bytes"] > self.limit or not self.may_accumulate(plan, wanted):
                return
            plan = replace(plan, microbatches=wanted)
            candidate = self.price(plan)
            yield candidate

    def may_accumulate(self, plan: Plan, microbatches: int) -> bool:
        """Whether the plan's micro-batches are free to be so many more: without a pipeline, where there are samples."""
        free = plan.stages == 1 and self.microbatches is None and microbatches <= self.batch.local_rows(plan.mesh)
        return free and not self.samples_are_coupled()

    def filled(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same with as many parameters kept whole as memory is left for, where some are but not all."""
        plan = candidate.plan
        if not self.fits(candidate):
            return
        whole, cost = self.steps.whole(plan.stages), self.cost(plan)
        fast = self.fast(plan, cost)
        ways = [*fast, replace(fast[-1], small_copies=True)] if plan.zero and cost.sums else fast  # as `predict` tries them

        def fits(k: int) -> bool:
            return any(self.steps.peak(way, cost, whole[k]) <= self.limit for way in ways)

        counts = range(len(whole))
        fitting = bisect_right(counts, 0, key=lambda k: int(not fits(k))) - 1
        if 0 < fitting < len(counts) - 1:
            yield self.price(replace(plan, whole=whole[fitting].names), whole[fitting])

    def without_pins(self) -> Search | None:
        """The same search with nothing pinned, None if nothing is."""
        free = Strategy()
        if self.request.strategy == free:
            return None
        return self.of(request=replace(self.request, strategy=free), microbatches=None)

    def of(self, **changed: Any) -> Search:
        """The same search with other arguments; what depends on the graph and the innermost level of the topology is shared."""
        own = {name: getattr(self, name) for name in ("problem", "request", "topology", "microbatches", "limit")}
        return Search(**{**own, "rows": self.batch.rows, "batch": self.batch.mode, "like": self, **changed})

    def first(self) -> Candidate | None:
        """One that fits, the first of Megatron's layouts: any layouts, of which these are some, take long to search for in vain.
        None where none does, or the request cannot be met."""
        pins = self.request.strategy
        plain = pins if pins.tp == 1 else replace(pins, layouts="megatron")
        search = self.of(request=replace(self.request, strategy=plain))
        try:
            return next(filter(search.fits, search.candidates()), None)
        except StrategyError:
            return None

    def variants(self, mesh: Mesh, pins: Strategy) -> Iterable[Plan]:
        """Plans over one mesh: ZeRO level, layouts over tp, micro-batches."""
        shard = mesh.size("dp_shard") > 1
        levels = [pins.zero] if pins.zero is not None else ([2, 3] if shard else [0])  # 1 runs as 2 does
        data = data_size(mesh)
        if self.batch.mode == "global" and data > self.batch.rows:
            sizes = ", ".join(str(d) for d in divisors(mesh.world_size) if d <= self.batch.rows)
            raise StrategyError(
                f"dim 0 of the batch, {self.batch.rows} samples, cannot be cut over {data} data ranks: dp of {sizes} works, "
                "or a larger batch"
            )
        local = self.batch.local_rows(mesh)
        counts = self.microbatch_counts(mesh.size("pp"), local)
        for zero in levels:
            for count in sorted({max(1, min(int(count), max(1, local))) for count in counts}):
                for layouts in self.layouts(mesh, pins):
                    yield Plan(
                        mesh=mesh,
                        zero=int(zero if shard else 0),
                        layouts=layouts,
                        schedule=pins.schedule or "1f1b",
                        microbatches=count,
                    )

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

    def layouts(self, mesh: Mesh, pins: Strategy) -> list[Layouts]:
        """What to try first over the mesh's tensor axis. Who pins it means Megatron's layouts, if nothing else is said."""
        n = mesh.size("tp")
        if n == 1:
            return [Layouts()]
        megatron = pins.tp is not None or pins.sequence_parallel is not None
        if pins.layouts == "any" or (pins.layouts is None and not megatron):
            return [Layouts(byte_price=0.0)]
        sequence = [False, True] if pins.sequence_parallel is None else [pins.sequence_parallel]
        return [Layouts(sequence=s) for s in sequence]

    def placement(self, plan: Plan) -> Placement | None:
        """Over tp; None where there is no such axis."""
        return self.tensor.placement(plan.mesh.size("tp"), plan.layouts, self.load(plan))

    def price(self, plan: Plan, whole: Whole | None = None) -> Candidate:
        """`whole`: the shares of `plan.whole`. The plan's copies are small where it takes that to fit."""
        plan, predicted = self.predict(plan, self.cost(plan), whole)
        return Candidate(plan, self.batch.samples(plan.mesh), predicted)

    def cost(self, plan: Plan) -> PlacedCost:
        """Of its placement over tp."""
        return self.tensor.cost(plan.mesh.size("tp"), plan.layouts, self.load(plan))

    def predict(self, plan: Plan, cost: PlacedCost, whole: Whole | None = None) -> tuple[Plan, Prediction]:
        """The plan, at this cost, in the least time; where that does not fit, with small copies, if these take fewer bytes."""
        tried = [(way, self.steps.predict(way, cost, whole)) for way in self.fast(plan, cost)]
        fits = [found for found in tried if found[1].peak_bytes <= self.limit]
        fast, found = min(fits or tried, key=lambda found: found[1].step_seconds)
        if not fits and plan.zero and cost.sums:
            small = replace(tried[-1][0], small_copies=True)
            smaller = self.steps.predict(small, cost, whole)
            if smaller.peak_bytes < found.peak_bytes:
                return small, smaller
        return fast, found

    def fast(self, plan: Plan, cost: PlacedCost) -> list[Plan]:
        """The plan with its copies summed in the least time; and, if they are summed in another way then, with the least that is
        waited for, where the first sums run beside the backward as far as its parts let them."""
        fast = replace(plan, small_copies=False, beside=0.0) if plan.small_copies or plan.beside else plan
        if not cost.sums or not (share := self.steps.beside(fast, cost)):
            return [fast]
        beside, size = replace(fast, beside=share), cost.sums / self.steps.terms(fast).copies_rate
        levels = {level_of(plan.zero), 2} if plan.zero else {0}  # of ZeRO-3, what is kept whole
        one, other = ([self.steps.sums_of(way, level).copies(size) for level in levels] for way in (fast, beside))
        return [fast] if one == other else [fast, beside]

    def load(self, plan: Plan) -> Load:
        ways = self.steps.sums_of(plan, level_of(plan.zero))
        return load_of(plan, ways, self.batch.share(plan.mesh), self.batch.captured)

    def with_layout(self, plan: Plan) -> Plan:
        """The plan with where its parameters lie over tp and pp: a rank, or a call, of other shapes would find other places."""
        return with_places(plan, self.placement(plan), lambda: self.steps.cuts)


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
