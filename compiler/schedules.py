"""The instruction list of one rank: the pipeline order between what a step needs before and after it.

gather parameters (ZeRO-1/2) ▶ prologue ▶ forwards and backwards, with sends and receives ▶ reduce gradients ▶ loss ▶ buffers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..passes.schedule import gpipe, one_f_one_b
from ..runtime.program import Instruction, OutputSpec, TensorSpec
from .plan import DATA_AXES, Plan

BUCKET_BYTES = 128 * 2**20
"""Tensors that one collective carries: large enough that latency does not count, small enough as a temporary buffer."""

ORDERS = {"gpipe": gpipe, "1f1b": one_f_one_b}


@dataclass(frozen=True)
class Step:
    """What a schedule needs to know of a stage's graphs.

    suffixes    per micro-batch, the suffix of its graphs' names
    entering, leaving            keys of activations from the stage before, to the stage after
    entering_gradients, ...      those of them that carry a gradient
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
    gradients: Mapping[str, tuple[TensorSpec, tuple[str, ...], tuple[int, ...]]]
    loss: str | None
    loss_axes: tuple[str, ...]
    share: bool = False


def crossing(gm: fx.GraphModule, stage: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(entering, leaving, entering with gradient, leaving with gradient) activations of a stage's graph."""
    entering = [n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["key"].startswith("act.")]
    output = next(n for n in gm.graph.nodes if n.op == "output")
    leaving = [(k, n) for k, n in zip(gm.meta["outputs"], output.args[0], strict=True) if k.startswith("act.")]  # type: ignore[arg-type]

    def differentiable(n: fx.Node) -> bool:
        return bool(n.meta.get("grad")) and n.meta["val"].dtype.is_floating_point

    return (
        tuple(n.meta["key"] for n in entering),
        tuple(k for k, _ in leaving),
        tuple(n.meta["key"] for n in entering if differentiable(n)),
        tuple(k for k, n in leaving if differentiable(n)),
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
    for phase, k in ORDERS[plan.schedule](plan.stages, plan.microbatches, stage):
        suffix = step.suffixes[k]
        if phase == "forward":
            if step.entering:
                found.append(Instruction("receive", step.entering, microbatch=k, peer=before))
            found.append(Instruction("run", graph="forward" + suffix, microbatch=k))
            if step.leaving:
                found.append(Instruction("send", step.leaving, microbatch=k, peer=after))
        elif training:
            if step.leaving_gradients:
                found.append(Instruction("receive", _grads(step.leaving_gradients), microbatch=k, peer=after))
            found.append(Instruction("run", graph="backward" + suffix, microbatch=k))
            if step.entering_gradients:
                found.append(Instruction("send", _grads(step.entering_gradients), microbatch=k, peer=before))
    if training:
        found.extend(_reductions(plan, step))
    found.extend(_loss(plan, stage, step, outputs))
    if plan.stages > 1:
        others = [o for o in outputs if o.key.startswith("out.") and o.key != step.loss] if step.share else []
        found.extend(Instruction("broadcast", (o.key,), axis="pp", peer=o.stage) for o in others)
        found.extend(_buffers(outputs))
    return tuple(found)


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


def _reductions(plan: Plan, step: Step) -> Iterable[Instruction]:
    """Sum gradients over tp, then the data axes (ZeRO keeps a shard after dp_shard), then the stages that share a parameter."""
    grads = {f"grad.{key}": entry for key, entry in step.gradients.items()}

    def emit(kind: str, axis: str, keys: Iterable[str]) -> Iterable[Instruction]:
        for bucket in _buckets((k, grads[k][0]) for k in keys):
            yield Instruction(kind, bucket, axis=axis)  # type: ignore[arg-type]

    yield from emit("all_reduce", "tp", [k for k, (_, axes, _) in grads.items() if "tp" in axes])
    scattered = [k for k, (spec, axes, _) in grads.items() if "dp_shard" in axes and "dp_shard" in spec.gathered]
    yield from emit("reduce_scatter", "dp_shard", scattered)
    groups: dict[str, list[str]] = {}
    for key, (_, axes, _) in grads.items():
        left = [a for a in axes if a in DATA_AXES and not (a == "dp_shard" and key in scattered)]
        if left:
            groups.setdefault("+".join(left), []).append(key)
    for axis, keys in groups.items():
        yield from emit("all_reduce", axis, keys)
    tied: dict[str, list[str]] = {}
    for key, (_, _, stages) in grads.items():
        if len(stages) > 1:
            tied.setdefault("pp:" + ",".join(map(str, stages)), []).append(key)
    for axis, keys in tied.items():
        yield from emit("all_reduce", axis, keys)


def _loss(plan: Plan, stage: int, step: Step, outputs: Sequence[OutputSpec]) -> Iterable[Instruction]:
    """The loss summed over the axes it is Partial on, then known to every stage."""
    if step.loss is None:
        return
    home = next(o.stage for o in outputs if o.key == step.loss)
    if stage == home and step.loss_axes:
        yield Instruction("all_reduce", (step.loss,), axis="+".join(step.loss_axes))
    if plan.stages > 1:
        yield Instruction("broadcast", (step.loss,), axis="pp", peer=home)


def _buffers(outputs: Sequence[OutputSpec]) -> Iterable[Instruction]:
    """Buffers that a stage updates (BatchNorm's statistics), to all stages: whichever reads them next has them."""
    for home in sorted({o.stage for o in outputs if o.key.startswith("buffer.")}):
        for keys in _buckets((o.key, o) for o in outputs if o.stage == home and o.key.startswith("buffer.")):
            yield Instruction("broadcast", keys, axis="pp", peer=home)
