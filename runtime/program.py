"""What one rank executes: graphs, and the schedule that runs them. Plain data.

Every value a program handles has a *key*, a string that says what it is:

    param.NAME     a parameter as the graphs use it: this rank's part on the tensor-parallel axes; whole on the data
                   axes, except under ZeRO-3, where it is the shard and the graph gathers it
    buffer.NAME    a buffer, likewise             const.NAME   a tensor constant of the model
    input.PATH     an input of the call           prologue.K   a value computed once a step from the batch alone
    act.K          an activation crossing pipeline stages
    saved.K        a value the forward keeps for the backward
    out.K          output K of the model          seed         the step's random seed, int64 []
    grad.KEY       the gradient of KEY

A graph's placeholders are its `inputs` in order, its output tuple its `outputs` in order. `const.*`, `param.*`,
`buffer.*` and `prologue.*` live outside micro-batches; everything else belongs to one micro-batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, dtype
from torch.fx import GraphModule

Key = str


@dataclass(frozen=True)
class Mesh:
    """Named axes, major first. Ranks are numbered row-major."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def world_size(self) -> int:
        n = 1
        for s in self.sizes:
            n *= s
        return n

    def coordinates(self, rank: int) -> dict[str, int]:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the mesh of {self.world_size} ranks")
        found = {}
        for axis, size in zip(reversed(self.axes), reversed(self.sizes), strict=True):
            found[axis], rank = rank % size, rank // size
        return {axis: found[axis] for axis in self.axes}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        rank = 0
        for axis, size in zip(self.axes, self.sizes, strict=True):
            rank = rank * size + coordinates[axis]
        return rank

    def size(self, axis: str) -> int:
        """Ranks on an axis, or on several joined by "+"; 1 of what the mesh lacks."""
        found = self._sizes.get(axis)
        if found is None:
            return math.prod(map(self.size, axis.split("+"))) if "+" in axis else 1
        return found

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.sizes, strict=True))

    def index(self, coordinates: Mapping[str, int], axis: str) -> int:
        """Where a rank stands on an axis, or on several joined by "+", major first."""
        found = 0
        for name in axis.split("+"):
            found = found * self.size(name) + coordinates.get(name, 0)
        return found

    def ranks_on(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that `axis` joins with `rank`, by their index on it: `dp`, several flattened as `dp+tp`, or some indices alone
        as `pp:0,2`, of which `rank` need not be."""
        joined, _, some = axis.partition(":")
        names, here = joined.split("+"), self.coordinates(rank)
        places = itertools.product(*(range(self.size(name)) for name in names))
        ranks = tuple(self.rank({**here, **dict(zip(names, place, strict=True))}) for place in places)
        return tuple(ranks[int(index)] for index in some.split(",")) if some else ranks


@dataclass(frozen=True)
class Cut:
    """One step from a whole tensor to a rank's part of it: `dim` sharded over `axis`, section by section.

    `sections[s][i]` is what index `i` of the axis holds of section `s` (see passes.types). Cuts apply in order, each to
    what the one before it left.
    """

    axis: str
    dim: int
    sections: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of the model and the part of it that this rank stores.

    name            as in the model's state_dict; tied names share one spec, `aliases` being the others
    cuts            from the whole tensor to what the rank stores and the optimizer updates
    gathered        axes, a suffix of `cuts`, gathered again into what the graphs take as `param.NAME` by the
                    `gather` instruction (ZeRO-1/2). Under ZeRO-3 the graph gathers and this is empty.
    replicated      axes on which every rank stores the same
    """

    name: str
    shape: tuple[int, ...]
    dtype: dtype
    cuts: tuple[Cut, ...] = ()
    gathered: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    trainable: bool = True
    persistent: bool = True


@dataclass(frozen=True)
class GraphSpec:
    """A graph and the keys of its placeholders and outputs."""

    graph: GraphModule
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]


InstructionKind = Literal[
    "gather",  # all-gather the parameters `keys` of one bucket over `axis` into what the graphs use
    "run",  # run graph `graph` for `microbatch`
    "send",  # send `keys` of `microbatch` to rank `peer`
    "receive",  # receive `keys` (shapes and dtypes in RankProgram.transfers) from rank `peer`
    "all_reduce",  # one bucket: sum the accumulated `keys` over `axis`
    "reduce_scatter",  # one bucket: sum the accumulated gradients `keys` over `axis`, keep this rank's cut
    "broadcast",  # `keys` from index `peer` of `axis` to all of it
]


@dataclass(frozen=True)
class Instruction:
    kind: InstructionKind
    keys: tuple[Key, ...] = ()
    graph: str = ""
    microbatch: int = 0
    axis: str = ""
    peer: int = -1

    def __str__(self) -> str:
        match self.kind:
            case "run":
                return f"run {self.graph} [{self.microbatch}]"
            case "send" | "receive":
                way = "to" if self.kind == "send" else "from"
                return f"{self.kind} {', '.join(self.keys)} [{self.microbatch}] {way} rank {self.peer}"
            case "broadcast":
                what = ", ".join(self.keys) if len(self.keys) < 3 else f"{len(self.keys)} tensors"
                return f"broadcast {what} over {self.axis} from index {self.peer}"
            case _:
                return f"{self.kind} over {self.axis}: {len(self.keys)} tensors"


@dataclass(frozen=True)
class InputSpec:
    """A tensor input of the call. `cuts` lead from the global batch to one micro-batch (axis "mb" included)."""

    key: Key
    shape: tuple[int, ...]
    dtype: dtype
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class OutputSpec:
    """An output of the model: its type after the schedule ran.

    cuts            the shards this rank holds of it (empty: equal on all ranks)
    stage           the pipeline stage that computes it
    accumulate      "sum" over micro-batches, or "cat" on the dim of the "mb" cut
    """

    key: Key
    shape: tuple[int, ...]
    dtype: dtype
    cuts: tuple[Cut, ...] = ()
    stage: int = 0
    accumulate: Literal["sum", "cat", "last"] = "last"


@dataclass(frozen=True)
class RankProgram:
    """Everything rank `rank` of `mesh` executes in one step.

    transfers       shape and dtype of what is received, by key, or by `KEY[m]` where they are those of micro-batch m
    constants       the tensors `const.*`
    """

    rank: int
    mesh: Mesh
    microbatches: int
    graphs: Mapping[str, GraphSpec]
    schedule: tuple[Instruction, ...]
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    transfers: Mapping[Key, tuple[tuple[int, ...], dtype]] = field(default_factory=dict)
    constants: Mapping[Key, Any] = field(default_factory=dict)
    training: bool = True
    device: str = "cpu"

    @property
    def coordinates(self) -> dict[str, int]:
        return self.mesh.coordinates(self.rank)

    def print_readable(self) -> str:
        """The schedule and every graph as Python, with source line and placement beside each node."""
        from .emit_python import program_text

        return program_text(self)

    def save(self, directory: str | Path) -> None:
        """Write the program as Python files that import torch alone, run on their own, and are meant to be read."""
        from .save import save_program

        save_program(self, Path(directory))


def value_bytes(value: Any) -> int:
    """Bytes of a value that a graph makes: of a tensor or several; 0 for what is none."""
    values = value if isinstance(value, tuple | list) else (value,)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
