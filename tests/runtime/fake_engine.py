"""A `ParallelModule` over the hand-built programs: two-layer MLP, loss and gradients known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from hand_built import F64, mlp_loss, pipeline, tensor_parallel, weights, zero
from torch import Tensor, nn

from shardwright.runtime.communicator import MeshCommunicator
from shardwright.runtime.executor import Executor
from shardwright.runtime.faults import Agreement, CallFacts, CommunicatorControl, batch_groups
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.parameters import ParameterStore
from shardwright.runtime.program import Instruction, Mesh, RankProgram


class Mlp(nn.Module):
    """The eager model of the hand-built programs."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(width=6)
        w1, w2, _ = weights()
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)

    def forward(self, x: Tensor) -> Tensor:
        return mlp_loss(self.w1, self.w2, x)

    def generate(self) -> None: ...


@dataclass
class Bound:
    program: RankProgram
    executor: Executor
    loss: str | None = "out.loss"

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"input.x": args[0] if args else kwargs["x"]}

    def rebuild(self, outputs: Mapping[str, Any]) -> Any:
        return SimpleNamespace(loss=outputs.get("out.loss"), y=outputs.get("out.y"))

    def place_of(self, key: str) -> str:
        return key.removeprefix("out.")


class Engine:
    """Runs one program, and its forward alone where no gradients are wanted."""

    plan = "the plan"
    certificate = None

    def __init__(self, program: RankProgram, communicator: MeshCommunicator) -> None:
        self.program, self.communicator = program, communicator
        self.device = torch.device("cpu")
        self.groups = batch_groups(program.mesh)
        self.store: ParameterStore | None = None

    def describe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallFacts:
        return CallFacts.of(f"({len(args)}, {sorted(kwargs)})", {"input.x": args[0] if args else kwargs["x"]})

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ParameterStore:
        assert self.store is not None
        return self.store

    def program_for(self, args: Any, kwargs: Any, *, training: bool, grad: bool, agreed: Agreement) -> Bound:
        program = self.program
        if not grad:
            forward = tuple(i for i in program.schedule if _is_forward(i))
            program = replace(program, schedule=forward)
        return Bound(program, Executor(program, self.communicator, "cpu"))


def _is_forward(i: Instruction) -> bool:
    return "backward" not in i.graph and not any(key.startswith("grad.") for key in i.keys)


def zero1(rank: int) -> RankProgram:
    """`zero` with its parameters gathered in the step."""
    program = zero(rank)
    gather = Instruction("gather", ("param.w1", "param.w2"), axis="dp_shard")
    return replace(program, schedule=(gather, *program.schedule))


def data_parallel(rank: int) -> RankProgram:
    """Every rank has all of the parameters."""
    program = zero(rank)
    schedule = tuple(replace(i, kind="all_reduce") if i.kind == "reduce_scatter" else i for i in program.schedule)
    whole = tuple(replace(spec, cuts=(), gathered=()) for spec in program.parameters)
    return replace(program, schedule=schedule, parameters=whole)


PROGRAMS: dict[str, Callable[[int], RankProgram]] = {
    "tensor": tensor_parallel,
    "zero1": zero1,
    "data": data_parallel,
    "pipeline": pipeline,
}
DATA = ("zero1", "data")


def build(name: str, rank: int, world: World, *, wait: bool = False) -> ParallelModule:
    """The parallel module of a rank; `wait`: as without example inputs."""
    program = PROGRAMS[name](rank)
    communicator = world.communicator(program.mesh, rank)
    store = ParameterStore(program.parameters, program.buffers, communicator, "cpu")
    model = Mlp()
    for key, value in model.state_dict().items():
        if key in store.slots:
            store.set_whole(key, value)
    engine = Engine(program, communicator)
    engine.store = store
    return ParallelModule(engine, None if wait else store, model, CommunicatorControl(communicator))


def mesh_of(name: str) -> Mesh:
    return PROGRAMS[name](0).mesh


def on_ranks(name: str, fn: Callable[[ParallelModule, int], Any], *, wait: bool = False) -> list[Any]:
    """`fn(parallel, rank)` on every rank of the program's mesh."""
    return run_ranks(mesh_of(name).world_size, lambda rank, world: fn(build(name, rank, world, wait=wait), rank))


def batch(name: str, rank: int, step: int = 0) -> Tensor:
    """What `rank` is given: its own share where the program is data parallel."""
    generator = torch.Generator().manual_seed(100 * step + (rank if name in DATA else 0))
    return torch.randn(7, 5, dtype=F64, generator=generator)


def total_loss(name: str, model: nn.Module, step: int = 0) -> Tensor:
    """The loss of the whole job's batch, on one device."""
    shares = range(mesh_of(name).world_size) if name in DATA else range(1)
    losses = [model(batch(name, rank, step)) for rank in shares]
    return torch.stack(losses).sum()
