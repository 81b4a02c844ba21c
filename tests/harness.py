"""Equality with one device: run every rank's program of a model in one process, and compare with the captured graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwright.compiler import emit as emission
from shardwright.compiler import verify
from shardwright.compiler.capture import Captured, capture
from shardwright.compiler.emit import Problem
from shardwright.compiler.layout import with_layout
from shardwright.compiler.plan import Plan
from shardwright.compiler.prepare import prepare as prepare_graph
from shardwright.passes.differentiate import Templates
from shardwright.passes.normalize.promote import double
from shardwright.passes.ops.collectives import take_shard
from shardwright.runtime.clip import grad_norm
from shardwright.runtime.delivery import add_gradients
from shardwright.runtime.executor import Executor, StepResult
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.parameters import ParameterStore
from shardwright.runtime.program import Mesh, RankProgram

SEED = 7
"""Of the random ops of a step."""


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

    @property
    def loss_key(self) -> str:
        return self.captured.loss or "out.0"

    @property
    def norm(self) -> Tensor:
        """Of all gradients as one vector."""
        return torch.nn.utils.get_total_norm(list(self.gradients.values()))


@dataclass(frozen=True)
class Ran:
    """What a rank's step gave, and the norm of all gradients as the runtime computes it."""

    result: StepResult
    norm: Tensor


def prepare(model: nn.Module, batch: Mapping[str, Any]) -> Case:
    model = model.double()
    batch = {k: double(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    captured = capture(model, (), batch)
    graph = prepare_graph(captured, float64=True)
    state: dict[str, Tensor] = {f"param.{n}": p.detach().clone() for n, p in model.named_parameters()}
    state |= {f"buffer.{n}": b.detach().clone() for n, b in model.named_buffers()}
    state |= dict(captured.constants)
    inputs = {f"input.{k}": v for k, v in batch.items() if isinstance(v, Tensor)}
    state = {k: double(v) for k, v in state.items()}
    loss, gradients = verify.reference(graph, captured.loss or "out.0", state, inputs, SEED)
    size = next(iter(inputs.values())).shape[0]
    return Case(captured, graph, state, inputs, size, loss, gradients)


def problem_of(case: Case, local_batches: Sequence[int]) -> Problem:
    return Problem(
        case.graph,
        case.captured.loss,
        tuple(k for k, v in case.inputs.items() if v.dim() and v.shape[0] == case.batch),
        tuple(local_batches),
        case.captured.aliases,
        case.captured.constants,
    )


def emit_all(case: Case, plan: Plan, local_batches: Sequence[int], templates: Templates | None = None) -> list[RankProgram]:
    """Every rank's program. `templates` may be shared by plans and models."""
    problem = problem_of(case, local_batches)
    plan = with_layout(problem, plan)
    return emission.emit_all(problem, plan, templates)


def run(case: Case, programs: Sequence[RankProgram]) -> list[Ran]:
    """One step on every rank, its parameters in the runtime's own store."""

    def body(rank: int, world: Any) -> Ran:
        program = programs[rank]
        communicator = world.communicator(program.mesh, rank)
        store = ParameterStore(program.parameters, program.buffers, communicator, "cpu")
        for spec in store.specs():
            prefix = "buffer." if spec.name in store.buffers else "param."
            store.set_whole(spec.name, case.state[prefix + spec.name])
        inputs = {}
        for spec in program.inputs:
            value = case.inputs[spec.key]
            for c in spec.cuts:
                value = take_shard(value, c.dim, c.sections, program.coordinates[c.axis])
            inputs[spec.key] = value
        store.refresh(stale=True)
        result = Executor(program, communicator, "cpu", gather=store.gather).run(store.working(), inputs, SEED)
        add_gradients(store, {key: g.clone() for key, g in result.gradients.items()})
        return Ran(result, grad_norm(store))

    return run_ranks(len(programs), body, timeout=300)


def compare(case: Case, programs: Sequence[RankProgram], ranks: Sequence[Ran]) -> float:
    """The largest relative error of loss, gradients and gradient norm. Raises beyond the bounds of design section 8."""
    names = {s.name for p in programs for s in p.parameters if s.trainable}
    missing = {k.removeprefix("param.") for k in case.gradients} - names
    assert not missing, f"no rank holds parameters {sorted(missing)}"
    worst = verify.compare(programs, [r.result for r in ranks], case.loss_key, case.loss, case.gradients)
    for rank, ran in enumerate(ranks):
        error = float((ran.norm - case.norm).abs() / case.norm)
        assert error <= verify.RELATIVE, f"the gradient norm on rank {rank} is {ran.norm}, on one device {case.norm}"
        worst = max(worst, error)
    return worst


def mesh(**axes: int) -> Mesh:
    order = [a for a in ("pp", "dp_replicate", "dp_shard", "tp") if axes.get(a, 1) > 1]
    return Mesh(tuple(order), tuple(axes[a] for a in order))
