"""From a normalized graph and a plan to the program of one rank. A pure function: no devices, no process group.

for each data axis, then micro-batches, then tp:  place ▶ shard ▶ check
▶ reroute ▶ stages ▶ prologue ▶ ZeRO gathers ▶ differentiate ▶ fuse, simplify ▶ partition ▶ buckets ▶ hoist, segment ▶ schedule
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import fx

from ..passes.buckets import bucket
from ..passes.check import check
from ..passes.differentiate import Seed, Templates, differentiate
from ..passes.fuse import fuse_loss, group_heads
from ..passes.graph_tools import Calls, Values, named_results, node_bytes, op_calls
from ..passes.hoist import hoist
from ..passes.ops import StaticCommunicator, use_communicator
from ..passes.partition import partition
from ..passes.prologue import TIME, split_prologue
from ..passes.reroute import reroute
from ..passes.rules.base import Axis
from ..passes.segment import segment
from ..passes.shard import shard
from ..passes.simplify import simplify
from ..passes.stages import as_received, split_stages
from ..passes.types import (
    I,
    Partial,
    R,
    Sections,
    Type,
    Varying,
    balanced_sizes,
)
from ..passes.zero import gather_parameters, zero_cut
from ..runtime.program import (
    Cut,
    GraphSpec,
    InputSpec,
    OutputSpec,
    RankProgram,
    TensorSpec,
)
from .collector import without_collection
from .cost import Seconds
from .gradient_sums import Sums
from .groups import Groups, regrouped
from .keeping import sized_for
from .known_placements import KnownPlacements
from .layouts import Layouts
from .offers import offers
from .place import Barred, Placement, Policy, Rules, place
from .plan import DATA_AXES, Plan
from .prices import Prices, Volume
from .schedules import Step, build, crossing, part_name
from .shards import Sharding
from .tensor_axis import mixed_rules, rules

SEGMENT_BYTES = 8 * 2**20
"""Gradients in a part of the backward graph: enough that latency does not count, few enough that most are summed while others
are computed, and that a part's bucket takes the memory of what earlier parts have used up. (Of a model with 25 MB of gradients on a
CPU, parts of 8 MB take the time of one part, and 5 to 10 MB less.)"""


@dataclass(frozen=True)
class Problem:
    """What is to be run: the normalized graph of the *global* batch, and how the batch lies on the data ranks.

    batch_inputs    input keys whose dim 0 is the batch
    local_batches   samples of each data rank; their sum is the graph's batch
    aliases         tied names: canonical -> others
    persistent      names of buffers that are in the state dict
    trainable       names of parameters with requires_grad; None: those that the loss depends on
    buffers         values of the buffers that are whole numbers, by key: where the model has them, checks by numbers need them
    share_outputs   whether every pipeline stage gets all outputs, not the loss alone
    ragged          whether data ranks call with other lengths, so that their graphs have other shapes
    """

    graph: fx.GraphModule
    loss: str | None
    batch_inputs: tuple[str, ...]
    local_batches: tuple[int, ...]
    aliases: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, torch.Tensor]
    training: bool = True
    persistent: frozenset[str] = frozenset()
    trainable: frozenset[str] | None = None
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    share_outputs: bool = False
    ragged: bool = False


@dataclass(frozen=True)
class Lowered:
    """A graph lowered along every axis at one rank's coordinates, and how: the placement of each axis."""

    graph: fx.GraphModule
    placements: Mapping[str, Placement]


def coordinates_of(plan: Plan, rank: int) -> StaticCommunicator:
    sizes = {**dict(zip(plan.mesh.axes, plan.mesh.sizes, strict=True)), TIME: plan.microbatches}
    return StaticCommunicator(sizes, {**plan.mesh.coordinates(rank), TIME: 0})


def data_sections(plan: Plan, local_batches: Sequence[int], coordinates: Mapping[str, int]) -> dict[str, Sections]:
    """How each data axis cuts the batch, at these coordinates: major axes cut first."""
    found: dict[str, Sections] = {}
    batches = list(local_batches)
    for axis in plan.data_axes:
        n = plan.mesh.size(axis)
        group = len(batches) // n
        found[axis] = (tuple(sum(batches[k * group : (k + 1) * group]) for k in range(n)),)
        k = coordinates[axis]
        batches = batches[k * group : (k + 1) * group]
    return found


def lower(
    problem: Problem,
    plan: Plan,
    coordinates: Mapping[str, int],
    values: Values,
    microbatch: int = 0,
    known: KnownPlacements | None = None,
    barred: Mapping[str, Barred] | None = None,
) -> Lowered:
    """Place, shard and check the graph along every axis of the plan. barred: by axis, what `place` leaves out.

    All data ranks must make the same collectives in the same order, and all micro-batches give outputs of the same types; so where
    their samples differ the fewest decide: the others take those placements, with shapes of their own.
    """
    gm, placements = problem.graph, {}
    leader, last = _leader(problem, plan, coordinates), plan.microbatches - 1  # the last is the smallest
    decided: Mapping[str, Placement] = {}
    here = {k: v for k, v in coordinates.items() if k != TIME}
    if (leader, last) != (here, microbatch) and _has_unequal_shapes(problem, plan):
        sizes = coordinates_of(plan, 0).sizes
        with use_communicator(StaticCommunicator(sizes, {**leader, TIME: last})):
            decided = lower(problem, plan, leader, values, last, known, barred).placements
    seconds = Seconds(plan.topology, plan.mesh) if plan.topology is not None else None
    axes: list[Axis] = []
    for step in _axis_steps(problem, plan, coordinates, microbatch, seconds):
        axis, policy, calls, like = step.axis, step.policy, op_calls(gm), decided.get(step.axis.name)
        find = partial(_placed, gm, step, calls, like, (barred or {}).get(axis.name))
        if like is not None and not placements:  # of the same graph
            placement = like
        else:
            placement = find() if known is None else known.of(gm, axis, policy, calls, like is not None, find)
        ways = seconds.ways(axis) if seconds is not None and axis.name != TIME else None
        twins = regrouped(gm, step.groups, policy.pinned)
        gm = shard(gm, axis, step.index, placement.choice, placement.placeholders, placement.outputs, values, calls, ways, twins)
        check(gm, axis, step.index, placement.placeholders)
        placements[axis.name] = placement
        axes.append(axis)
    priced = seconds.of_conversion if seconds is not None and _alike(problem, plan) else None
    if priced is not None and len(axes) > 1 and reroute(gm, axes, values, priced, frozenset({TIME})):
        check(gm, axes[-1], {**coordinates, TIME: microbatch}[axes[-1].name])
    return Lowered(gm, placements)


def _alike(problem: Problem, plan: Plan) -> bool:
    """Whether all ranks see alike which types a value may take on its way, and so find the same: not where sequences have other
    lengths, nor where micro-batches cut unequal shares."""
    return not problem.ragged and (plan.microbatches == 1 or not _unequal(problem))


def _unequal(problem: Problem) -> bool:
    return len(set(problem.local_batches)) > 1


def lower_for(problem: Problem, plan: Plan, rank: int = 0, barred: Mapping[str, Barred] | None = None) -> Lowered:
    """`lower` at the coordinates of a rank, by itself."""
    communicator = coordinates_of(plan, rank)
    with use_communicator(communicator):
        return lower(problem, plan, communicator.indices, Values(), barred=barred)


def _placed(gm: fx.GraphModule, step: _AxisStep, calls: Calls, like: Placement | None, barred: Barred | None = None) -> Placement:
    axis, policy, mixed = step.axis, step.policy, step.mixed
    offered = offers(gm, axis, calls, policy.role, policy.pinned, policy.slices, step.groups)
    counted = sized_for(calls, offered, policy, mixed)
    return place(gm, axis, policy, step.prices, calls, barred, like, counted, offered, mixed=mixed)


@dataclass(frozen=True)
class _AxisStep:
    """How the graph is placed along one axis, and at which of its ranks. mixed, groups: as `place` and `offers` take them."""

    axis: Axis
    index: int
    policy: Policy
    prices: Prices
    mixed: Rules | None = None
    groups: Groups = field(default_factory=dict)


def _axis_steps(
    problem: Problem, plan: Plan, coordinates: Mapping[str, int], microbatch: int, seconds: Seconds | None
) -> Iterator[_AxisStep]:
    cuts = data_sections(plan, problem.local_batches, coordinates)
    for axis in plan.data_axes:
        pinned: dict[str, Type] = {key: Varying(0, cuts[axis]) for key in problem.batch_inputs}
        policy = Policy("data", pinned, problem.loss)
        yield _AxisStep(_axis(problem, plan, axis), coordinates[axis], policy, Volume())
    if plan.microbatches > 1:
        rows = problem.local_batches[plan.data_rank(coordinates)]
        slices: dict[str, Type] = {key: Varying(0, (balanced_sizes(rows, plan.microbatches),)) for key in problem.batch_inputs}
        yield _AxisStep(Axis(TIME, plan.microbatches), microbatch, Policy("time", {}, problem.loss, slices=slices), Volume())
    if plan.mesh.size("tp") > 1:
        # Ranks with sequences of other lengths place each by itself: alike by bytes, which grow together, but not by time.
        layouts = Layouts() if problem.ragged else plan.layouts
        policy, prices = rules(layouts, problem.loss, plan.layout, seconds)
        mixed = mixed_rules(layouts, problem.loss, seconds)
        yield _AxisStep(_axis(problem, plan, "tp"), coordinates["tp"], policy, prices, mixed, plan.layouts.groups)


def _axis(problem: Problem, plan: Plan, name: str) -> Axis:
    """Data axes cut dims evenly where others come after: what ranks have there differs by their samples alone.

    Joined are axes in the order of the mesh, in which ranks are numbered. None, where ranks of other lengths place each by itself,
    and might not agree; nor data axes over which samples lie in unequal shares (`Axis.unequal`), which no one cuts anew.
    """
    before = plan.mesh.axes[: plan.mesh.axes.index(name)]
    unequal = _unequal(problem) and name in DATA_AXES
    joins = () if problem.ragged or unequal else tuple(a for a in before if a in DATA_AXES)
    more = name in DATA_AXES and (name != plan.data_axes[-1] or plan.microbatches > 1 or plan.mesh.size("tp") > 1)
    return Axis(name, plan.mesh.size(name), joins, even=more, unequal=unequal)


def _leader(problem: Problem, plan: Plan, coordinates: Mapping[str, int]) -> dict[str, int]:
    """The coordinates with the place on the data axes of the rank with the fewest samples."""
    batches = problem.local_batches
    rank = min(range(len(batches)), key=batches.__getitem__)
    found = {k: v for k, v in coordinates.items() if k != TIME}
    for axis in reversed(plan.data_axes):
        rank, found[axis] = divmod(rank, plan.mesh.size(axis))
    return found


def _has_unequal_shapes(problem: Problem, plan: Plan) -> bool:
    rows = problem.local_batches
    return len(set(rows)) > 1 or rows[0] % plan.microbatches > 0


@without_collection()
def emit(
    problem: Problem, plan: Plan, rank: int, templates: Templates | None = None, known: KnownPlacements | None = None
) -> RankProgram:
    """The program of `rank`. Ranks may share `templates` and `known`: what was differentiated or placed for one serves all."""
    return _Emission(problem, plan, rank, coordinates_of(plan, rank), templates or Templates(Values()), known).program()


def emit_all(
    problem: Problem, plan: Plan, templates: Templates | None = None, ranks: Iterable[int] | None = None
) -> list[RankProgram]:
    """The programs of all ranks, or of `ranks`. What they have in common is found once."""
    templates, known = templates or Templates(Values()), KnownPlacements()
    return [emit(problem, plan, rank, templates, known) for rank in (range(plan.mesh.world_size) if ranks is None else ranks)]


class _Emission:
    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        rank: int,
        communicator: StaticCommunicator,
        templates: Templates,
        known: KnownPlacements | None,
    ) -> None:
        self.problem, self.plan, self.rank, self.templates, self.known = problem, plan, rank, templates, known
        self.communicator = communicator
        self.coordinates = {k: v for k, v in communicator.indices.items() if k != TIME}
        self.stage = self.coordinates.get("pp", 0)
        self.graphs: dict[str, GraphSpec] = {}
        self.parts: dict[str, tuple[frozenset[str], ...]] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.sums: dict[str, Sums] = {}
        self.sharding = Sharding(plan.mesh, self.coordinates, plan.topology, plan.small_copies, plan.beside)
        self.transfers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def program(self) -> RankProgram:
        rows = self.problem.local_batches[self.plan.data_rank(self.coordinates)]
        sizes = balanced_sizes(rows, self.plan.microbatches)
        variants: dict[int, str] = {}
        for k, size in enumerate(sizes):
            if size not in variants:
                variants[size] = "" if not variants else f"_{size}"
                self.emit_microbatch(k, variants[size], sizes)
        names = [variants[size] for size in sizes]
        parameters = tuple(s for n in self.parameter_nodes() for s in self._spec(n, "param."))
        buffers = tuple(s for n in self.problem.graph.graph.nodes if n.op == "placeholder" for s in self._spec(n, "buffer."))
        outputs = self.outputs()
        return RankProgram(
            rank=self.rank,
            mesh=self.plan.mesh,
            microbatches=self.plan.microbatches,
            graphs=self.graphs,
            schedule=build(self.plan, self.stage, self.step(tuple(names)), outputs, self.neighbours()),
            parameters=parameters,
            buffers=buffers,
            inputs=self.inputs(),
            outputs=outputs,
            transfers=self.transfers,
            constants={k: v for k, v in self.problem.constants.items()},
            training=self.problem.training,
            device=self.plan.device,
        )

    def parameter_nodes(self) -> list[fx.Node]:
        """Placeholders of the parameters this stage stores: those its graph uses, and unused ones that are assigned to it."""
        used = {n.meta["key"] for gm in self.stages for n in gm.graph.nodes if n.op == "placeholder"}
        here = {n.meta["key"]: n for n in self.stages[self.stage].graph.nodes if n.op == "placeholder"}
        found = []
        for node in self.lowered.graph.graph.nodes:
            if node.op == "placeholder" and node.meta["key"].startswith("param."):
                key = node.meta["key"]
                if key in here or (key not in used and node.meta.get("stage", 0) == self.stage):
                    found.append(here.get(key, node))
        return found

    def emit_microbatch(self, microbatch: int, suffix: str, sizes: Sequence[int]) -> None:
        """The graphs of one micro-batch (all of one size share them)."""
        first = microbatch == 0
        values = self.templates.values
        here = StaticCommunicator(self.communicator.sizes, {**self.communicator.indices, TIME: microbatch})
        with use_communicator(here):
            self._emit_microbatch(microbatch, suffix, sizes, values, first)

    def _emit_microbatch(self, microbatch: int, suffix: str, sizes: Sequence[int], values: Values, first: bool) -> None:
        self.lowered = lower(self.problem, self.plan, self.coordinates, values, microbatch, self.known)
        self.assign_stages(self.lowered.graph)
        stages = split_stages(self.lowered.graph, self.plan.stages)
        if first:
            self.stages = stages
        gm = stages[self.stage]
        self.note_transfers(gm, range(len(sizes)) if first else [k for k, n in enumerate(sizes) if n == sizes[microbatch]])
        if self.plan.microbatches > 1:
            prologue, gm = split_prologue(gm)
            if prologue is not None and first:
                self.add("prologue", differentiate(self.gather(prologue), {}, self.templates))
        gm = self.gather(group_heads(gm, values))
        roots: dict[str, Seed] = {key: "input" for key, _ in named_results(gm) if key.startswith("act.")}
        if self.problem.loss and self.problem.training:
            roots[self.problem.loss] = "one"
        joint = differentiate(gm, roots if self.problem.training and self.problem.loss else {}, self.templates)
        forward, backward = partition(simplify(fuse_loss(joint, values), values))
        self.add("forward" + suffix, hoist(bucket(forward, values)))
        if backward.meta["outputs"]:
            parts = self.segments(bucket(backward, values))
            for k, part in enumerate(parts):
                self.add(part_name("backward" + suffix, k), part)
            self.parts[suffix] = tuple(frozenset(part.meta["outputs"]) for part in parts)

    def segments(self, backward: fx.GraphModule) -> list[fx.GraphModule]:
        """The backward in parts, after each of which gradients are summed over the data ranks; whole where these run graphs of
        other shapes, which might be cut elsewhere."""
        if self.plan.data_size == 1 or self.problem.ragged or _unequal(self.problem):
            return [backward]
        sizes = {n.meta["key"]: node_bytes(n) for n in self.problem.graph.graph.find_nodes(op="placeholder")}
        if (tensor := self.lowered.placements.get("tp")) is not None:
            for key, type_ in tensor.placeholders.items():
                sizes[key] //= self.plan.mesh.size("tp") if isinstance(type_, Varying) else 1
        return segment(backward, SEGMENT_BYTES, sizes)

    def note_transfers(self, gm: fx.GraphModule, microbatches: Iterable[int]) -> None:
        """Shapes of what crosses stage borders."""
        nodes = [(n.meta["key"], n) for n in gm.graph.nodes if n.op == "placeholder" and n.meta["key"].startswith("act.")]
        nodes += [(k, n) for k, n in named_results(gm) if k.startswith("act.")]
        for key, node in nodes:
            fact = (tuple(node.meta["val"].shape), node.meta["val"].dtype)
            for k in microbatches:
                self.transfers[f"{key}[{k}]"] = self.transfers[f"grad.{key}[{k}]"] = fact

    def step(self, suffixes: tuple[str, ...]) -> Step:
        """What the schedule needs to know of this stage."""
        entering, leaving, entering_gradients, leaving_gradients = crossing(self.stages[self.stage], self.stage)
        users: dict[str, list[int]] = {}
        for k, gm in enumerate(self.stages):
            for n in gm.graph.nodes:
                if n.op == "placeholder" and n.meta["key"].startswith("param."):
                    users.setdefault(n.meta["key"], []).append(k)
        parameters = {k: s for k, s in self.specs.items() if k.startswith("param.")}
        given = {k.removeprefix("grad.") for parts in self.parts.values() for part in parts for k in part}
        gradients = {k: (parameters[k], self.sums[k], tuple(users[k])) for k in reversed(parameters) if k in given}
        loss = self.problem.loss
        home = dict(named_results(self.lowered.graph)).get(loss) if loss else None
        return Step(
            suffixes,
            frozenset(self.graphs),
            entering,
            leaving,
            entering_gradients,
            leaving_gradients,
            parameters,
            self.parts,
            gradients,
            loss,
            self.pending(home) if home is not None else (),
            self.problem.share_outputs,
        )

    def neighbours(self) -> tuple[int, int]:
        """Ranks of the stages before and after, at the same coordinates otherwise."""
        at = dict(self.coordinates)
        ranks = []
        for k in (self.stage - 1, self.stage + 1):
            ranks.append(self.plan.mesh.rank({**at, "pp": k}) if 0 <= k < self.plan.stages else -1)
        return ranks[0], ranks[1]

    def add(self, name: str, gm: fx.GraphModule) -> None:
        gm = as_received(gm, self.templates.values)
        keys = tuple(n.meta["key"] for n in gm.graph.nodes if n.op == "placeholder")
        self.graphs[name] = GraphSpec(gm, keys, gm.meta["outputs"])

    def assign_stages(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op == "placeholder" and node.meta["key"].startswith("param."):
                node.meta["stage"] = self.plan.stage_of.get(node.meta["key"].removeprefix("param."), 0)

    def gather(self, gm: fx.GraphModule) -> fx.GraphModule:
        """ZeRO-3: parameters enter as shards."""
        if self.plan.zero < 3 or self.plan.mesh.size("dp_shard") == 1:
            return gm
        axis = Axis("dp_shard", self.plan.mesh.size("dp_shard"))
        cuts = {}
        for node in gm.graph.nodes:
            key = node.meta["key"] if node.op == "placeholder" else ""
            if key.startswith("param.") and self.plan.zero_of(key.removeprefix("param.")) == 3:
                cut = zero_cut(tuple(node.meta["val"].shape), axis.size)
                if cut is not None:
                    cuts[key] = cut
        return gather_parameters(gm, axis, self.coordinates["dp_shard"], cuts, self.templates.values)

    def _spec(self, node: fx.Node, prefix: str) -> list[TensorSpec]:
        key = node.meta["key"]
        if not key.startswith(prefix):
            return []
        name = key.removeprefix(prefix)
        if key not in self.specs:
            self.specs[key] = self._make_spec(name, key, node)
        return [self.specs[key]]

    def _make_spec(self, name: str, key: str, node: fx.Node) -> TensorSpec:
        whole = self.original(key).meta["val"]
        parameter = key.startswith("param.")
        types = node.meta.get("types", {})
        cuts = [
            Cut(axis, type_.dim, type_.sections)
            for axis, type_ in types.items()
            if axis != TIME and isinstance(type_, Varying) and axis not in DATA_AXES
        ]
        gathered: tuple[str, ...] = ()
        if parameter:
            level = self.plan.zero_of(name)
            copied = self.copied[level == 3] if _is_copied(node) else None
            shards = self.sharding.shards(level, cuts, tuple(whole.shape), copied)
            cuts, gathered, self.sums[key] = [*cuts, *shards.cuts], shards.gathered, shards.sums
        cut_axes = {axis for cut in cuts for axis in cut.axis.split("+")}
        return TensorSpec(
            name=name,
            shape=tuple(whole.shape),
            dtype=whole.dtype,
            cuts=tuple(cuts),
            gathered=gathered,
            replicated=tuple(a for a in self.plan.mesh.axes if a not in cut_axes and a != "pp"),
            aliases=self.problem.aliases.get(name, ()),
            trainable=bool(node.meta.get("grad")) if self.problem.trainable is None else name in self.problem.trainable,
            persistent=parameter or name in self.problem.persistent,
        )

    @cached_property
    def copied(self) -> Mapping[bool, float]:
        """Bytes of the parameters whose gradients are to be summed over tp: of those under ZeRO-3, and of the others."""
        found = {True: 0.0, False: 0.0}
        for node in self.lowered.graph.graph.find_nodes(op="placeholder"):
            if _is_copied(node):
                found[self.plan.zero_of(node.meta["key"].removeprefix("param.")) == 3] += node_bytes(node)
        return found

    def original(self, key: str) -> fx.Node:
        if not hasattr(self, "_originals"):
            self._originals = {n.meta["key"]: n for n in self.problem.graph.graph.nodes if n.op == "placeholder"}
        return self._originals[key]

    def inputs(self) -> tuple[InputSpec, ...]:
        """The call's inputs as this rank gets them: its data share of the batch, whole on the other axes."""
        cuts = data_sections(self.plan, self.problem.local_batches, self.coordinates)
        specs = []
        for key, node in ((n.meta["key"], n) for n in self.problem.graph.graph.nodes if n.op == "placeholder"):
            if key.startswith("input."):
                path = tuple(Cut(a, 0, cuts[a]) for a in self.plan.data_axes) if key in self.problem.batch_inputs else ()
                specs.append(InputSpec(key, tuple(node.meta["val"].shape), node.meta["val"].dtype, path))
        return tuple(specs)

    def pending(self, node: fx.Node) -> tuple[str, ...]:
        """Axes over which a value is still to be summed."""
        return tuple(a for a, t in node.meta.get("types", {}).items() if isinstance(t, Partial) and a != TIME)

    def outputs(self) -> tuple[OutputSpec, ...]:
        specs = []
        stage_of = {key: k for k, gm in enumerate(self.stages) for key in gm.meta["outputs"]}
        wholes = dict(named_results(self.problem.graph))
        for key, node in named_results(self.lowered.graph):
            types: Mapping[str, Type] = node.meta.get("types", {})
            cuts = tuple(Cut(a, t.dim, t.sections) for a, t in types.items() if isinstance(t, Varying))
            time = types.get(TIME, I)
            how = "sum" if isinstance(time, Partial) else "cat" if isinstance(time, Varying) else "last"
            value = wholes[key].meta["val"]
            specs.append(OutputSpec(key, tuple(value.shape), value.dtype, cuts, stage_of.get(key, 0), how))
        return tuple(specs)


def _is_copied(node: fx.Node) -> bool:
    """Whether tp holds copies of a parameter, each with a gradient of its own part of the work."""
    return node.meta["key"].startswith("param.") and bool(node.meta.get("grad")) and node.meta.get("types", {}).get("tp") == R


__all__ = ["Lowered", "Problem", "emit", "lower"]
