"""The instruction list of one rank: the pipeline order between what a step needs before and after it.

gather parameters (ZeRO-1/2) ▶ prologue ▶ forwards and backwards, with sends and receives; after the last forward the sum of the
loss, in the last backward reductions of gradients ▶ loss to every stage ▶ the reductions left ▶ buffers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ..passes.rules.base import has_derivatives
from ..passes.schedule import ORDERS
from ..runtime.program import Instruction, OutputSpec, TensorSpec
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
    gradients   parameter key -> (its spec, axes its gradient is still to be summed over, stages that share it)
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
    gradients: Mapping[str, tuple[TensorSpec, tuple[str, ...], tuple[int, ...]]]
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
    for axis in dict.fromkeys(a for spec in parameters.values() for a in spec.gathered):
        for keys in _buckets((k, s) for k, s in parameters.items() if axis in s.gathered):
            yield Instruction("gather", keys, axis=axis)


class _Reductions:
    """Sums of gradients: over the data axes, of which ZeRO leaves a shard; then over tp, so much less; then over the stages that
    share a parameter.

    The first sum over data of each gradient may start as soon as its part of the last backward has run; what is summed again, or by
    the side of its stage's others, waits for the end.
    """

    def __init__(self, step: Step) -> None:
        self.grads = {f"grad.{key}": entry for key, entry in step.gradients.items()}

    def first(self, keys: frozenset[str]) -> Iterable[Instruction]:
        """The first sums of `keys` over the data axes."""
        yield from self._over_data([k for k in self.grads if k in keys], again=False)

    def rest(self) -> Iterable[Instruction]:
        yield from self._emit("all_reduce", "tp", [k for k, (_, axes, _) in self.grads.items() if "tp" in axes])
        yield from self._over_data(list(self.grads), again=True)
        tied: dict[str, list[str]] = {}
        for key, (_, _, stages) in self.grads.items():
            if len(stages) > 1:
                tied.setdefault("pp:" + ",".join(map(str, stages)), []).append(key)
        for axis, keys in tied.items():
            yield from self._emit("all_reduce", axis, keys)

    def _over_data(self, keys: list[str], again: bool) -> Iterable[Instruction]:
        """`again`: what is left after a reduce-scatter over dp_shard."""
        scattered = [k for k in keys if self._is_scattered(k)]
        if not again:
            yield from self._emit("reduce_scatter", "dp_shard", scattered)
        groups: dict[str, list[str]] = {}
        for key in scattered if again else [k for k in keys if k not in scattered]:
            left = [a for a in self.grads[key][1] if a in DATA_AXES and not (again and a == "dp_shard")]
            if left:
                groups.setdefault("+".join(left), []).append(key)
        for axis, members in groups.items():
            yield from self._emit("all_reduce", axis, members)

    def _is_scattered(self, key: str) -> bool:
        spec, axes, _ = self.grads[key]
        return "dp_shard" in axes and "dp_shard" in spec.gathered

    def _emit(self, kind: Literal["all_reduce", "reduce_scatter"], axis: str, keys: Iterable[str]) -> Iterable[Instruction]:
        for bucket in _buckets((k, self.grads[k][0]) for k in keys):
            yield Instruction(kind, bucket, axis=axis)


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
