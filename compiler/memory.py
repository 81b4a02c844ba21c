"""How many bytes a rank needs: parameters, gradients, optimizer state, what the forward keeps, and temporaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache

import sympy
import torch
from torch import fx

from ..passes.graph_tools import node_bytes
from ..runtime.program import Cut, Instruction, Key, RankProgram, TensorSpec
from ..runtime.reuse import donated, held_bytes, last_reads, memories, owner, placeholders_at, reused

STEPWISE = ("param.", "buffer.", "const.", "prologue.", "grad.param.", "out.")
MICROBATCH = "mb"

_P, _N, _M = sympy.symbols("parameters shards moments", positive=True)
ZERO_FORMULAS: dict[int, tuple[sympy.Expr, sympy.Expr, sympy.Expr]] = {
    0: (_P, _P, _M * _P),
    1: (_P + _P / _N, _P, _M * _P / _N),
    2: (_P + _P / _N, _P / _N, _M * _P / _N),
    3: (_P / _N, _P / _N, _M * _P / _N),
}
"""Bytes of (parameters, gradients, optimizer state) by ZeRO level, for `parameters` bytes over `shards` ranks and `moments` tensors
of optimizer state per parameter (Rajbhandari et al. 2020, "ZeRO", section 5 and figure 1). Levels 1 and 2 hold the shard that the
optimizer updates beside the whole that the graphs use; the paper counts that shard with the optimizer state."""


@dataclass(frozen=True)
class StateMemory:
    """Bytes that a rank holds all the time."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


@cache
def _compiled(zero: int) -> Callable[[float, float, float], tuple[float, float, float]]:
    return sympy.lambdify((_P, _N, _M), ZERO_FORMULAS[zero], modules="math")


def state_memory(parameters: float, zero: int, shards: int, moments: float = 2.0) -> StateMemory:
    """State of `parameters` bytes of trainable parameters (after tensor and pipeline parallelism) sharded over `shards` data ranks.

    moments     tensors of optimizer state per parameter, of its dtype: 2 for AdamW, 1 for SGD with momentum
    """
    return StateMemory(*map(float, _compiled(zero)(parameters, shards, moments)))


def state_bytes(parameters: float, zero: int, shards: int) -> float:
    """The total of `state_memory` for AdamW."""
    held, gradients, optimizer = _compiled(zero)(parameters, shards, 2.0)
    return held + gradients + optimizer


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. `peak` is the largest total at any time; `activations` and `temporaries` are what it held then."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    temporaries: float

    @property
    def peak(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.activations + self.temporaries

    def __str__(self) -> str:
        names = ("parameters", "gradients", "optimizer", "buffers", "activations", "temporaries")
        unit, size = ("GiB", 2**30) if self.peak >= 2**30 else ("MiB", 2**20)
        parts = ", ".join(f"{name} {getattr(self, name) / size:.2f}" for name in names)
        return f"{self.peak / size:.2f} {unit}: {parts}"


def program_memory(program: RankProgram, moments: float = 2.0) -> RankMemory:
    """The memory of a rank over one step of its program; see `state_memory` for `moments`."""
    values = memory_over_time(program)
    worst = max(values, key=lambda u: u.gradients + u.held + u.temporaries, default=Usage(0.0, 0.0, 0.0))
    summed = _gradients(program)
    trainable = sum(tensor_bytes(program, s) for s in program.parameters if s.trainable and {s.name, *s.aliases} & summed)
    return RankMemory(
        parameters=sum(tensor_bytes(program, s) + (working_bytes(program, s) if s.gathered else 0.0) for s in program.parameters),
        gradients=worst.gradients,
        optimizer=moments * trainable if program.training else 0.0,
        buffers=sum(tensor_bytes(program, spec) for spec in program.buffers),
        activations=worst.held,
        temporaries=worst.temporaries,
    )


def _gradients(program: RankProgram) -> set[str]:
    """Parameters whose gradients the program makes or sums: for one that no op uses an optimizer keeps nothing."""
    keys = {key for graph in program.graphs.values() for key in graph.outputs}
    keys.update(key for instruction in program.schedule for key in instruction.keys)
    return {key.removeprefix("grad.param.") for key in keys if key.startswith("grad.param.")}


@dataclass(frozen=True)
class Usage:
    """Bytes while one instruction runs: accumulated gradients, values held between instructions, temporaries inside."""

    gradients: float
    held: float
    temporaries: float


def memory_over_time(program: RankProgram) -> list[Usage]:
    """What the executor holds during each instruction of the schedule, parameters, buffers and optimizer state aside.

    Values die at their last use, as in the executor; gradients live to the end of the step, of those that are scattered a shard.
    """
    specs = {f"grad.param.{name}": s for s in program.parameters for name in (s.name, *s.aliases)}
    sizes = _key_sizes(program)
    keys = [_keys_of(program, instruction) for instruction in program.schedule]
    last: dict[tuple[Key, int], int] = {}
    for i, (reads, _) in enumerate(keys):
        last.update((key, i) for key in reads)
    inputs = sum(_cut_bytes(program, s.shape, s.dtype, s.cuts) for s in program.inputs)
    given = donated(program)
    temporaries = {
        name: temporary_bytes(spec.graph, placeholders_at(spec, given.get(name, ()))) for name, spec in program.graphs.items()
    }
    held: dict[tuple[Key, int], float] = {}
    gradients: dict[Key, float] = {}
    found = []
    for i, instruction in enumerate(program.schedule):
        reads, writes = keys[i]
        for key, microbatch in writes:
            if key.startswith("grad.param."):
                gradients.setdefault(key, sizes[key])
            elif not key.startswith(("param.", "buffer.")):
                held[key, microbatch] = sizes.get(key, 0.0)
        inside = temporaries[instruction.graph] if instruction.kind == "run" else 0.0
        scattered = [key for key, _ in writes] if instruction.kind == "reduce_scatter" else []
        inside += sum(gradients[key] for key in scattered)  # packed by rank
        found.append(Usage(sum(gradients.values()), inputs + sum(held.values()), inside))
        gradients |= {key: bytes_over(program, specs[key], instruction.axis)[1] for key in scattered}
        for made in (*reads, *writes):
            if last.get(made, i) == i and not made[0].startswith("out."):
                held.pop(made, None)
    return found


def _keys_of(program: RankProgram, instruction: Instruction) -> tuple[list[tuple[Key, int]], list[tuple[Key, int]]]:
    """(read, written) values of an instruction; -1 is the micro-batch of what lives outside of them."""

    def scoped(keys: Iterable[Key]) -> list[tuple[Key, int]]:
        return [(key, -1 if key == "seed" or key.startswith(STEPWISE) else instruction.microbatch) for key in keys]

    match instruction.kind:
        case "run":
            spec = program.graphs[instruction.graph]
            return scoped(spec.inputs), scoped(spec.outputs)
        case "send":
            return scoped(instruction.keys), []
        case "receive" | "gather":
            return [], scoped(instruction.keys)
        case _:
            return scoped(instruction.keys), scoped(instruction.keys)


def _key_sizes(program: RankProgram) -> dict[Key, float]:
    """Bytes of every key that a graph makes or a transfer brings."""
    sizes: dict[Key, float] = {}
    for key, (shape, dtype) in program.transfers.items():
        sizes[key.split("[")[0]] = float(torch.Size(shape).numel() * dtype.itemsize)
    for spec in program.graphs.values():
        output = next(node for node in spec.graph.graph.nodes if node.op == "output")
        inputs = {id(node) for node in spec.graph.graph.nodes if node.op == "placeholder"}
        results = [(key, node) for key, node in zip(spec.outputs, output.args[0], strict=True) if isinstance(node, fx.Node)]
        shown = Counter(owner(node) for _, node in results)
        for key, node in results:
            # A value handed through is counted where it was made; storage that several show (a bucket's parts), in equal shares.
            base = owner(node)
            sizes[key] = 0.0 if id(base) in inputs else max(sizes.get(key, 0.0), node_bytes(base) / shown[base])
    return sizes


def tensor_bytes(program: RankProgram, spec: TensorSpec) -> float:
    """Bytes of what this rank stores of a parameter or buffer."""
    return _cut_bytes(program, spec.shape, spec.dtype, spec.cuts)


def working_bytes(program: RankProgram, spec: TensorSpec) -> float:
    """Bytes of a parameter as the graphs take it, its `gathered` axes whole."""
    return _cut_bytes(program, spec.shape, spec.dtype, spec.cuts[: len(spec.cuts) - len(spec.gathered)])


def bytes_over(program: RankProgram, spec: TensorSpec, axis: str) -> tuple[float, float]:
    """Bytes of a parameter before its cut over `axis`, of which it is gathered and its gradient scattered, and after it."""
    place = next(k for k, cut in enumerate(spec.cuts) if cut.axis == axis)
    before, after = (_cut_bytes(program, spec.shape, spec.dtype, spec.cuts[:count]) for count in (place, place + 1))
    return before, after


def bytes_moved(program: RankProgram, spec: TensorSpec, instruction: Instruction) -> float:
    """Bytes of a parameter or its gradient in a collective of the schedule. What is summed and not scattered is so after all of its
    cuts (compiler/gradient_sums.py)."""
    if instruction.kind in ("gather", "reduce_scatter"):
        return bytes_over(program, spec, instruction.axis)[0]
    return tensor_bytes(program, spec)


def _cut_bytes(program: RankProgram, shape: tuple[int, ...], dtype: torch.dtype, cuts: tuple[Cut, ...]) -> float:
    left = list(shape)
    for cut in cuts:
        if cut.axis == MICROBATCH:
            continue
        index = program.mesh.index(program.coordinates, cut.axis)
        left[cut.dim] = sum(section[index] for section in cut.sections)
    return float(torch.Size(left).numel() * dtype.itemsize)


def temporary_bytes(gm: fx.GraphModule, given: Collection[fx.Node] = ()) -> float:
    """The largest sum of intermediate values alive at once while a graph runs, its inputs and outputs left out.

    Memory is held from the node that takes it to the last use of a value that lies in it. `given`: placeholders that the graph may
    write over.
    """
    nodes = list(gm.graph.nodes)
    over = reused(nodes, given)
    memory = memories(nodes, over)
    kept = {memory[node] for node in next(node for node in nodes if node.op == "output").all_input_nodes}
    made = {node for node in nodes if node.op == "call_function" and memory[node] is node} - kept
    return float(max(held_bytes(nodes, last_reads(nodes, memory), made), default=0))
