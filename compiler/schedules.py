"""The instruction list of one rank: the pipeline order between what a step needs before and after it.

gather parameters (ZeRO-1/2) ▶ prologue ▶ forwards and backwards, with sends and receives; after the last forward the sum of the
loss, in the last backward reductions of gradients ▶ loss to every stage ▶ the reductions left ▶ buffers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..passes.rules.base import has_derivatives
from ..passes.schedule import ORDERS
from ..runtime.program import Instruction, OutputSpec, TensorSpec
from .gradient_sums import Sum, Sums
from .plan import DATA_AXES, Plan

BUCKET_BYTES = 128 * 2**20
"""Tensors that one collective carries: large enough that latency does not count, small enough as a temporary buffer."""


@dataclass(frozen=True)
class Step:
    """What a schedule needs to know of a stage's graphs.

    suffixes    per micro-batch, the suffix of its graphs' names
    entering, leaving            keys of activations from the stage before, to the stage after
    entering_gradients, ...      those of them that carry a gradient
    parts       by suffix: the keys that each part of that backward graph gives (passes/segment.py)
    gradients   parameter key -> (its spec, the sums of its gradient, stages that share it)
    loss_axes   axes the loss is still to be summed over
    share       whether outputs other than the loss go to every stage
    """

    suffixes: tuple[str, ...]
    graphs: frozenset[str]
    entering: tuple[str, ...]
    leaving: tuple[str, ...]
    entering_gradients: tuple[str, ...]
    leaving_gradients: tuple[str, ...]
    parameters: Mapping[str, TensorSpec]
    parts: Mapping[str, tuple[frozenset[str], ...]]
    gradients: Mapping[str, tuple[TensorSpec, Sums, tuple[int, ...]]]
    loss: str | None
    loss_axes: tuple[str, ...]
    share: bool = False


def crossing(gm: fx.GraphModule, stage: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(entering, leaving, entering with gradient, leaving with gradient) activations of a stage's graph."""
    entering = [n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["key"].startswith("act.")]
    output = next(n for n in gm.graph.nodes if n.op == "output")
    leaving = [(k, n) for k, n in zip(gm.meta["outputs"], output.args[0], strict=True) if k.startswith("act.")]  # type: ignore[arg-type]

    def has_gradient(n: fx.Node) -> bool:
        return bool(n.meta.get("grad")) and has_derivatives(n.meta["val"].dtype)

    return (
        tuple(n.meta["key"] for n in entering),
        tuple(k for k, _ in leaving),
        tuple(n.meta["key"] for n in entering if has_gradient(n)),
        tuple(k for k, n in leaving if has_gradient(n)),
    )


def build(
    plan: Plan, stage: int, step: Step, outputs: Sequence[OutputSpec], neighbours: tuple[int, int]
) -> tuple[Instruction, ...]:
    """The schedule of a rank in `stage`; `neighbours` are the ranks of the stages before and after (-1: none)."""
    before, after = neighbours
    found = list(_gathers(step.parameters))
    if "prologue" in step.graphs:
        found.append(Instruction("run", graph="prologue"))
    training = any(g.startswith("backward") for g in step.graphs)
    order = list(ORDERS[plan.schedule](plan.stages, plan.microbatches, stage))
    last = {phase: i for i, (phase, _) in enumerate(order)}
    reductions = _Reductions(step)
    for i, (phase, k) in enumerate(order):
        suffix = step.suffixes[k]
        if phase == "forward":
            if step.entering:
                found.append(Instruction("receive", step.entering, microbatch=k, peer=before))
            found.append(Instruction("run", graph="forward" + suffix, microbatch=k))
            if step.leaving:
                found.append(Instruction("send", step.leaving, microbatch=k, peer=after))
            if i == last["forward"]:  # while backwards go on
                found.extend(_loss_sum(stage, step, outputs))
        elif training:
            if step.leaving_gradients:
                found.append(Instruction("receive", _grads(step.leaving_gradients), microbatch=k, peer=after))
            for part, keys in enumerate(step.parts[suffix]):
                found.append(Instruction("run", graph=part_name("backward" + suffix, part), microbatch=k))
                if i == last["backward"]:
                    found.extend(reductions.first(keys))
            if step.entering_gradients:
                found.append(Instruction("send", _grads(step.entering_gradients), microbatch=k, peer=before))
    if step.loss is not None and plan.stages > 1:
        found.append(Instruction("broadcast", (step.loss,), axis="pp", peer=_home(step.loss, outputs)))
    if training:
        found.extend(reductions.rest())
    if plan.stages > 1:
        others = [o for o in outputs if o.key.startswith("out.") and o.key != step.loss] if step.share else []
        found.extend(Instruction("broadcast", (o.key,), axis="pp", peer=o.stage) for o in others)
        found.extend(_buffers(outputs))
    return tuple(found)


def part_name(graph: str, part: int) -> str:
    return f"{graph}_part{part}" if part else graph


def _grads(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"grad.{key}" for key in keys)


def _buckets(items: Iterable[tuple[str, TensorSpec | OutputSpec]]) -> list[tuple[str, ...]]:
    """Consecutive keys of one dtype, up to BUCKET_BYTES of whole tensors together."""
    found: list[list[str]] = []
    room, dtype = 0, None
    for key, spec in items:
        size = spec.dtype.itemsize
        for n in spec.shape:
            size *= n
        if not found or spec.dtype != dtype or room < size:
            found.append([])
            room, dtype = BUCKET_BYTES, spec.dtype
        found[-1].append(key)
        room -= size
    return [tuple(keys) for keys in found]


def _gathers(parameters: Mapping[str, TensorSpec]) -> Iterable[Instruction]:
    """Of each parameter over the axis of its last cut first."""
    for place in reversed(range(max((len(spec.gathered) for spec in parameters.values()), default=0))):
        there = {key: spec for key, spec in parameters.items() if place < len(spec.gathered)}
        for axis in dict.fromkeys(spec.gathered[place] for spec in there.values()):
            for keys in _buckets((key, spec) for key, spec in there.items() if spec.gathered[place] == axis):
                yield Instruction("gather", keys, axis=axis)


class _Reductions:
    """Sums of gradients (compiler/gradient_sums.py), and then over the stages that share a parameter.

    Where a gradient is summed over the data axes, its first sum may start as soon as its part of the last backward has run; what is
    summed again, or over tp alone, waits for the end.
    """

    def __init__(self, step: Step) -> None:
        self.grads = {f"grad.{key}": entry for key, entry in step.gradients.items()}

    def first(self, keys: frozenset[str]) -> Iterable[Instruction]:
        """The first sums of `keys`."""
        yield from self._sums([k for k in self.grads if k in keys and self._starts_early(k)], 0)

    def rest(self) -> Iterable[Instruction]:
        yield from self._sums([k for k in self.grads if not self._starts_early(k)], 0)
        for place in range(1, max((len(sums) for _, sums, _ in self.grads.values()), default=0)):
            yield from self._sums(list(self.grads), place)
        tied: dict[Sum, list[str]] = {}
        for key, (_, _, stages) in self.grads.items():
            if len(stages) > 1:
                tied.setdefault(Sum("all_reduce", "pp:" + ",".join(map(str, stages))), []).append(key)
        yield from self._emit(tied)

    def _starts_early(self, key: str) -> bool:
        return any(axis in DATA_AXES for step in self.grads[key][1] for axis in step.axes)

    def _sums(self, keys: Iterable[str], place: int) -> Iterable[Instruction]:
        """Of each of the keys the sum at so many places after the first."""
        groups: dict[Sum, list[str]] = {}
        for key in keys:
            for step in self.grads[key][1][place : place + 1]:
                groups.setdefault(step, []).append(key)
        yield from self._emit(groups)

    def _emit(self, groups: Mapping[Sum, list[str]]) -> Iterable[Instruction]:
        for step, keys in groups.items():
            for bucket in _buckets((k, self.grads[k][0]) for k in keys):
                yield Instruction(step.kind, bucket, axis=step.axis)


def _home(key: str, outputs: Sequence[OutputSpec]) -> int:
    return next(o.stage for o in outputs if o.key == key)


def _loss_sum(stage: int, step: Step, outputs: Sequence[OutputSpec]) -> Iterable[Instruction]:
    """The loss summed over the axes it is Partial on, in the stage that makes it."""
    if step.loss is not None and step.loss_axes and stage == _home(step.loss, outputs):
        yield Instruction("all_reduce", (step.loss,), axis="+".join(step.loss_axes))


def _buffers(outputs: Sequence[OutputSpec]) -> Iterable[Instruction]:
    """Buffers that a stage updates (BatchNorm's statistics), to all stages: whichever reads them next has them."""
    for home in sorted({o.stage for o in outputs if o.key.startswith("buffer.")}):
        for keys in _buckets((o.key, o) for o in outputs if o.stage == home and o.key.startswith("buffer.")):
            yield Instruction("broadcast", keys, axis="pp", peer=home)
