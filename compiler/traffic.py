"""What a rank's program sends in one step, collective by collective, as the emitted graphs and the schedule say it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ..passes.ops.collectives import COMMUNICATION
from ..runtime.program import Instruction, RankProgram
from .cost import communication_of
from .memory import bytes_moved
from .topology import collective_bytes


@dataclass(frozen=True)
class Collective:
    """One collective, or one message between stages ("send", over axis "pp").

    axis    as named in the program: "tp", or "dp_replicate+dp_shard" for several at once
    size    bytes of the whole value: what a rank holds after a gather and before a reduction
    phase   "forward", "backward" or "prologue" in a graph of that name; "schedule" for gathers of ZeRO-1/2, reductions of
            gradients, and the loss
    block   the repeated block it was emitted for, None outside of them
    """

    kind: str
    axis: str
    size: float
    phase: str
    block: object = None


def graph_collectives(gm: fx.GraphModule, phase: str) -> list[Collective]:
    """Those of one emitted graph, in order."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in COMMUNICATION:
            axis, kind, size = communication_of(node)
            found.append(Collective(kind, axis, size, phase, node.meta.get("block")))
    return found


def traffic(program: RankProgram) -> list[Collective]:
    """Those of one step, in the order of the schedule: every micro-batch counts."""
    graphs = {name: graph_collectives(spec.graph, name.split("_")[0]) for name, spec in program.graphs.items()}
    specs = {f"param.{s.name}": s for s in program.parameters}
    outputs = {o.key: float(o.dtype.itemsize) for o in program.outputs}
    found: list[Collective] = []
    for instruction in program.schedule:
        match instruction.kind:
            case "run":
                found += graphs[instruction.graph]
            case "send":
                found += [Collective("send", "pp", size, "schedule") for size in _messages(program, instruction)]
            case "receive":
                pass
            case _:
                names = [(k, specs.get(k.removeprefix("grad."))) for k in instruction.keys]
                size = sum(outputs[k] if s is None else bytes_moved(program, s, instruction) for k, s in names)
                found.append(Collective(instruction.kind.replace("gather", "all_gather"), instruction.axis, size, "schedule"))
    return found


def received(program: RankProgram) -> dict[str, float]:
    """Bytes that the rank receives in one step, by axis, as named in the program. Over "pp" counted where they are sent."""
    found: dict[str, float] = defaultdict(float)
    for c in traffic(program):
        n = math.prod(program.mesh.size(axis) for axis in c.axis.partition(":")[0].split("+"))
        found[c.axis] += collective_bytes(c.kind, c.size, n)  # type: ignore[arg-type]
    return dict(found)


def _messages(program: RankProgram, instruction: Instruction) -> Iterator[float]:
    for key in instruction.keys:
        shape, dtype = program.transfers.get(f"{key}[{instruction.microbatch}]") or program.transfers[key]
        size = float(dtype.itemsize)
        for n in shape:
            size *= n
        yield size
