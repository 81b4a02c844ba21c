"""The public calls: auto_parallelize, and plan, emit and verify, which need no devices."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from ..passes.differentiate import Templates
from ..passes.graph_tools import Values
from ..runtime.communicator import MeshCommunicator, ProcessGroupCommunicator
from ..runtime.errors import ShardwrightError
from ..runtime.faults import Control, GlooControl, install_abort_hook
from ..runtime.module import ParallelModule
from ..runtime.program import Mesh, RankProgram
from . import emit as emission
from .bind import BatchMode, batch_keys, bind
from .call_structure import flatten_call
from .certify import Certificate, certify
from .choose import choose
from .engine import ModelEngine, Options
from .explain_node import explain_node
from .guess import likely_plan, spread
from .plan import Plan
from .reduce import Capture
from .strategy import Strategy, resolve
from .topology import Topology

TIMEOUT_SECONDS = 300.0


def auto_parallelize(
    model: nn.Module,
    mesh: Any = "auto",
    *,
    example_inputs: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    strategy: Literal["auto"] | Strategy = "auto",
    topology: Topology | None = None,
    memory_limit: float | None = None,
    precision: torch.dtype | None = None,
    microbatches: int | Literal["auto"] = "auto",
    batch: BatchMode = "local",
    outputs: Literal["loss", "all"] = "loss",
    verify: bool = False,
    state: Any = None,
) -> ParallelModule:
    """Make an unmodified model train on every rank of this job.

    model           consumed: its storage becomes this rank's shards. May live on the meta device
    mesh            "auto": all ranks of this torchrun job (one rank outside of it); a tuple of sizes; a torch DeviceMesh, whose
                    axis names dp, dp_replicate, dp_shard, tp, pp pin roles
    example_inputs  what one call gets: a dict of keyword arguments, a tuple of positional ones, or a tensor; real or meta. Left
                    out, the first call is the example
    loss_fn         `loss_fn(output, target)`, `target` being the call's keyword of that name or its last positional argument
    strategy        "auto", or a `Strategy` that pins parts
    topology        what the cost model prices with: see `Topology`
    memory_limit    bytes per rank; None: 92 % of the device's memory
    precision       dtype that products run in (autocast); None: the model's own dtypes
    microbatches    per step and data rank; "auto": as a pipeline runs best with, without one as many as memory asks for
    batch           "local": each data rank passes its own share; "global": every rank passes the whole batch
    outputs         "loss", or "all": other outputs come back under a pipeline too
    verify          first compare the captured graph with the eager model, loss and gradients, on the example inputs; then check the
                    plan, as `verify` does, on rank 0: `parallel.certificate` says what was checked
    state           for a model on the meta device: a state dict, or the path of safetensors files; None: its own initialization

    Raises StrategyError for a mesh or strategy that cannot be, DoesNotFit where memory does not suffice, CaptureError for a model
    that cannot be captured, and the same error on every rank.
    """
    control, connect, world_size, device = _connect()
    count = None if microbatches == "auto" else int(microbatches)
    options = Options(
        request=resolve(mesh, strategy, world_size),
        loss_fn=loss_fn,
        topology=topology or _topology(device, world_size),
        memory_limit=memory_limit,
        precision=precision,
        microbatches=count,
        batch=batch,
        outputs=outputs,
        verify=verify,
        source=state,
    )
    engine = ModelEngine(model, options, control, connect, device, report=_Steps(control.rank))
    if example_inputs is None:
        return ParallelModule(engine, None, model, control)
    args, kwargs = as_call(example_inputs)
    store = engine.prepare(args, kwargs)
    return ParallelModule(engine, store, model, control)


class _Steps:
    """Says on rank 0 what planning is doing, on stderr, once it has taken two seconds."""

    def __init__(self, rank: int) -> None:
        self.console = Console(stderr=True, quiet=rank != 0, highlight=False)
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        elapsed = time.monotonic() - self.start
        if elapsed > 2.0:
            self.console.print(f"shardwright: {text} ({elapsed:.0f} s)", style="dim")


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs: a mapping is keywords, a tuple or list positional, anything else one argument."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}


class SoloControl:
    """A `Control` of one rank."""

    rank = 0
    world_size = 1

    def start_exchange(self, header: list[int]) -> Callable[[], list[list[int]]]:
        return lambda: [header]

    def exchange_text(self, text: str) -> list[str]:
        return [text]


def _connect() -> tuple[Control, Callable[[Mesh], MeshCommunicator], int, torch.device]:
    """This process's place in the job: control, communicators, world size and device. Starts the process group under torchrun."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        return SoloControl(), lambda mesh: ProcessGroupCommunicator(mesh, 0, device), 1, device
    store = dist.distributed_c10d.PrefixStore("shardwright", _default_store())
    rank = dist.get_rank()
    install_abort_hook(store, rank)

    def connect(mesh: Mesh) -> MeshCommunicator:
        return ProcessGroupCommunicator(mesh, rank, device, TIMEOUT_SECONDS, store)

    return GlooControl(TIMEOUT_SECONDS, store), connect, dist.get_world_size(), device


def _default_store() -> Any:
    from .torch_compat import default_store

    return default_store()


@cache
def _measured(world_size: int) -> Topology:
    """This job's CPUs, once: later models are priced alike."""
    return Topology.measure("cpu", seconds=1.0)


def _topology(device: torch.device, world_size: int) -> Topology:
    """Prices for this machine: a shipped profile of the GPU; a CPU is measured (about a second, a collective)."""
    if device.type != "cuda":
        return _measured(world_size) if dist.is_initialized() else Topology.preset("cpu", devices=world_size)
    name = torch.cuda.get_device_name(device).lower()
    known = next((p for p in ("b200", "h200", "h100", "a100-80", "a100-40") if p.split("-")[0] in name), None)
    if known == "a100-80" and torch.cuda.get_device_properties(device).total_memory < 60 * 2**30:
        known = "a100-40"
    return Topology.preset(known, devices=world_size) if known else Topology.measure(device)


@dataclass(frozen=True)
class PlannedModel:
    """A plan with what it was made for: `plan.plan`, and programs of any rank by `emit(plan, rank)`.

    example    the tensors of one call that it was planned for, by key
    capture    captures the same call again, with other local batches
    """

    plan: Plan
    problem: emission.Problem
    templates: Templates
    topology: Topology
    example: Mapping[str, Tensor]
    capture: Capture

    def explain(self, name: str | None = None) -> str:
        """The plan; or of an op of the captured graph, a parameter or a module, by name: where it lies over every axis, what that
        costs, and the next best placement with what it would cost more."""
        return self.plan.explain() if name is None else explain_node(self.problem, self.plan, self.topology, name)

    def __str__(self) -> str:
        return self.plan.explain()


def plan(
    model: nn.Module,
    topology: Topology,
    *,
    example_inputs: Any,
    mesh: Any = None,
    strategy: Literal["auto"] | Strategy = "auto",
    loss_fn: Callable[..., Tensor] | None = None,
    memory_limit: float | None = None,
    precision: torch.dtype | None = None,
    microbatches: int | Literal["auto"] = "auto",
    batch: BatchMode = "local",
    device: str = "cuda",
) -> PlannedModel:
    """Plan a model for `topology` on a machine that has none of it. No process group, no devices.

    Arguments as of auto_parallelize; `mesh` None takes every device of the topology. `example_inputs` is one data rank's call
    (batch="local") or the whole batch (batch="global").
    """
    if not isinstance(topology, Topology):
        raise TypeError(
            f"topology is {topology!r}, not a Topology: the machine to plan for, as in Topology.preset('h100', devices=8). "
            "The shape of the mesh is the argument `mesh`."
        )
    request = resolve(mesh if mesh is not None else (topology.world_size,), strategy)
    args, kwargs = as_call(example_inputs)
    _, tensors = flatten_call(args, kwargs)
    shapes = [{k: (tuple(t.shape), str(t.dtype)) for k, t in tensors.items()}]
    keys = batch_keys(shapes)
    rows = next((shapes[0][k][0][0] for k in keys), 1)
    count = None if microbatches == "auto" else int(microbatches)

    def captured(batches: Sequence[int]) -> emission.Problem:
        return bind(model, args, kwargs, batches, keys, loss_fn=loss_fn, training=model.training, precision=precision).problem

    facts = {"rows": rows, "memory_limit": memory_limit, "batch": batch, "microbatches": count}
    guess = likely_plan(model, request, topology, captured, **facts)
    problem = captured(spread(rows, guess.data_size, batch))
    chosen = replace(choose(problem, request, topology, **facts, known=guess.known), device=device)
    batches = spread(rows, chosen.data_size, batch)
    if batches != problem.local_batches:
        problem = replace(problem, local_batches=batches) if sum(batches) == sum(problem.local_batches) else captured(batches)
    return PlannedModel(chosen, problem, Templates(Values()), topology, tensors, captured)


def emit(planned: PlannedModel, rank: int) -> RankProgram:
    """The program of any rank, on no devices: the same that auto_parallelize would run there."""
    if not 0 <= rank < planned.plan.mesh.world_size:
        raise ShardwrightError(f"rank {rank} is outside the plan's mesh of {planned.plan.mesh.world_size} ranks")
    return emission.emit(planned.problem, planned.plan, rank, planned.templates)


def verify(
    planned: PlannedModel, inputs: Mapping[str, Tensor] | None = None, *, numbers: bool = True, memory_limit: float | None = None
) -> Certificate:
    """Check a plan: types and schedules at any size, and by numbers against one device, every rank in this process.

    inputs        tensors by key (`input.NAME`) to compare with, of any number of samples; None: the example given to `plan`
    numbers       False: types and schedules alone
    memory_limit  bytes that the comparison may take; None: half of what is free. Where the whole model does not fit, one of each
                  distinct block and the two ends are compared ("reduced", as the certificate says)

    Raises TypeCheckError, MismatchError, DeadlockError or VerificationError, naming what does not hold.
    """
    given = planned.example if inputs is None else inputs
    return certify(
        planned.problem,
        planned.plan,
        given if numbers else None,
        capture=planned.capture,
        memory_limit=memory_limit,
        report=_Steps(0),
    )
