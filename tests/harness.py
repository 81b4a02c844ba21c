"""Equality with one device: run every rank's program of a model in one process, and compare with the captured graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwright.compiler.capture import Captured, capture
from shardwright.compiler.emit import Problem, emit
from shardwright.compiler.layout import with_layout
from shardwright.compiler.plan import Plan
from shardwright.compiler.prepare import prepare as prepare_graph
from shardwright.passes.differentiate import Templates
from shardwright.passes.graph_tools import Values
from shardwright.passes.ops.collectives import join_shards, take_shard
from shardwright.runtime.executor import Executor
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.program import Mesh, RankProgram, TensorSpec


@dataclass(frozen=True)
class Case:
    """A captured model in float64 with its state, inputs by key, and what one device computes."""

    captured: Captured
    graph: fx.GraphModule
    state: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    batch: int
    loss: Tensor
    gradients: Mapping[str, Tensor]


def prepare(model: nn.Module, batch: Mapping[str, Any]) -> Case:
    model = model.double()
    batch = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    captured = capture(model, (), batch)
    graph = prepare_graph(captured, float64=True)
    state: dict[str, Tensor] = {f"param.{n}": p.detach().clone() for n, p in model.named_parameters()}
    state |= {f"buffer.{n}": b.detach().clone() for n, b in model.named_buffers()}
    state |= dict(captured.constants)
    inputs = {f"input.{k}": v for k, v in batch.items() if isinstance(v, Tensor)}
    state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    loss, gradients = reference(graph, captured.loss, state, inputs)
    size = next(iter(inputs.values())).shape[0]
    return Case(captured, graph, state, inputs, size, loss, gradients)


def reference(
    graph: fx.GraphModule, loss_key: str | None, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the graph on one device."""
    leaves: dict[str, Tensor] = {}
    args = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            key = node.meta["key"]
            value = torch.tensor(7) if key == "seed" else inputs[key] if key in inputs else state[key]
            if node.meta.get("grad"):
                value = leaves[key] = value.detach().clone().requires_grad_(True)
            args.append(value)
    results = dict(zip(graph.meta["outputs"], fx.Interpreter(graph).run(*args), strict=True))
    loss = results[loss_key or "out.0"]
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {k: g for k, g in zip(leaves, found, strict=True) if g is not None}


def problem_of(case: Case, local_batches: Sequence[int]) -> Problem:
    return Problem(
        case.graph,
        case.captured.loss,
        tuple(k for k, v in case.inputs.items() if v.dim() and v.shape[0] == case.batch),
        tuple(local_batches),
        case.captured.aliases,
        case.captured.constants,
    )


def cut(whole: Tensor, spec: TensorSpec, program: RankProgram, *, stored: bool) -> Tensor:
    """The part of a whole tensor that a rank stores, or that its graphs take."""
    for c in spec.cuts:
        if stored or c.axis not in spec.gathered:
            whole = take_shard(whole, c.dim, c.sections, program.coordinates[c.axis])
    return whole.clone()


def emit_all(case: Case, plan: Plan, local_batches: Sequence[int]) -> list[RankProgram]:
    problem = problem_of(case, local_batches)
    plan = with_layout(problem, plan)
    templates = Templates(Values())
    return [emit(problem, plan, rank, templates) for rank in range(plan.mesh.world_size)]


def run(case: Case, programs: Sequence[RankProgram], seed: int = 7) -> list[Any]:
    """Every rank's StepResult."""

    def body(rank: int, world: Any) -> Any:
        program = programs[rank]
        communicator = world.communicator(program.mesh, rank)
        working = dict(case.captured.constants)
        for prefix, specs in (("param.", program.parameters), ("buffer.", program.buffers)):
            for spec in specs:
                working[prefix + spec.name] = cut(case.state[prefix + spec.name], spec, program, stored=False)
        inputs = {}
        for spec in program.inputs:
            value = case.inputs[spec.key]
            for c in spec.cuts:
                value = take_shard(value, c.dim, c.sections, program.coordinates[c.axis])
            inputs[spec.key] = value
        executor = Executor(program, communicator, "cpu", gather=lambda i: {k: working[k] for k in i.keys})
        return executor.run(working, inputs, seed)

    return run_ranks(len(programs), body)


def join_gradient(programs: Sequence[RankProgram], results: Sequence[Any], name: str) -> list[Tensor]:
    """Every copy of a parameter's whole gradient that the ranks hold together (one for each setting of the uncut axes)."""
    found = []
    holders = [p for p in programs if any(s.name == name for s in p.parameters)]
    for program in holders:
        spec = next(s for s in program.parameters if s.name == name)
        if any(program.coordinates[c.axis] for c in spec.cuts):
            continue

        def whole(coordinates: dict[str, int], cuts: Sequence[Any], program: RankProgram = program) -> Tensor:
            if not cuts:
                return results[program.mesh.rank(coordinates)].gradients[f"grad.param.{name}"]
            first, *rest = cuts
            parts = [whole({**coordinates, first.axis: i}, rest) for i in range(len(first.sections[0]))]
            return join_shards(parts, first.dim, first.sections)

        # Cuts nest: the last one applies to what the first left, so join from the inside out.
        found.append(whole(dict(program.coordinates), spec.cuts))
    return found


def compare(case: Case, programs: Sequence[RankProgram], results: Sequence[Any]) -> float:
    """The largest difference in loss or any gradient, relative to the gradient's largest entry. Asserts design section 8."""
    key = case.captured.loss or "out.0"
    largest = max(float(g.abs().max()) for g in case.gradients.values())
    worst = 0.0
    for rank, result in enumerate(results):
        difference = float((result.outputs[key] - case.loss).abs())
        assert difference <= 1e-9 * max(1.0, float(case.loss.abs())), f"loss on rank {rank}: {result.outputs[key]} for {case.loss}"
    names = {s.name for p in programs for s in p.parameters if s.trainable}
    missing = {k.removeprefix("param.") for k in case.gradients} - names
    assert not missing, f"no rank holds parameters {sorted(missing)}"
    for name in sorted(names):
        expected = case.gradients.get(f"param.{name}")
        if expected is None:
            continue
        copies = join_gradient(programs, results, name)
        assert copies, f"nobody holds {name}"
        for got in copies:
            assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} for {tuple(expected.shape)}"
            error = float((got - expected).abs().max()) if got.numel() else 0.0
            bound = max(1e-9 * float(expected.abs().max()), 1e-12 * largest)
            assert error <= bound, f"gradient of {name} is off by {error:.3g} (largest entry {float(expected.abs().max()):.3g})"
            worst = max(worst, error / max(float(expected.abs().max()), 1e-3 * largest))
    return worst


def mesh(**axes: int) -> Mesh:
    order = [a for a in ("pp", "dp_replicate", "dp_shard", "tp") if axes.get(a, 1) > 1]
    return Mesh(tuple(order), tuple(axes[a] for a in order))
