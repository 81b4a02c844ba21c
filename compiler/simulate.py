"""Run the schedules of a set of programs against a clock: who does what when, the step time, the bubble, the memory.

The rules are the runtime's. A rank does its instructions in order. A send takes its turn on the link of its two ranks and does
not hold the sender up; a receive waits for it. A collective begins when its last rank has come to it. A rank that starts a sum
goes on, and waits for it where it needs the result, or at the end of the step; collectives of one rank follow each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ..runtime.errors import DeadlockError
from ..runtime.program import Instruction, RankProgram
from .cost import graph_cost
from .memory import bytes_moved, memory_over_time
from .topology import CollectiveKind, Topology, collective_seconds

Duration = Callable[[RankProgram, Instruction], float]
COLLECTIVES = ("gather", "all_reduce", "reduce_scatter", "broadcast")
STARTED = ("all_reduce", "reduce_scatter")
"""Those that run beside what follows them."""


@dataclass(frozen=True)
class Event:
    """One instruction of one rank, from `start` to `end` seconds. A receive starts when the rank is ready for it, a collective
    when every rank is; between events a rank waits."""

    rank: int
    start: float
    end: float
    instruction: Instruction


@dataclass(frozen=True)
class Timeline:
    """One step. `events` by rank, in the order of their ends; `memory[rank]`: bytes during each instruction, parameters and
    optimizer state aside."""

    events: Mapping[int, tuple[Event, ...]]
    memory: Mapping[int, tuple[float, ...]]

    @property
    def step_seconds(self) -> float:
        return max((event.end for events in self.events.values() for event in events), default=0.0)

    def busy_seconds(self, rank: int) -> float:
        """Seconds in which the rank runs graphs."""
        return sum(e.end - e.start for e in self.events[rank] if e.instruction.kind == "run")

    @property
    def bubble(self) -> float:
        """The share of the step in which ranks run no graph, on average over ranks."""
        total = self.step_seconds * len(self.events)
        return 1.0 - sum(map(self.busy_seconds, self.events)) / total if total else 0.0

    def peak_bytes(self, rank: int) -> float:
        return max(self.memory[rank], default=0.0)

    def render(self, width: int = 100) -> Text:
        """A line per rank: digits are micro-batches, forward plain and backward on a background, "=" collectives, "." waiting."""
        step, digits = self.step_seconds, "0123456789abcdefghijklmnopqrstuvwxyz"
        label = max((len(str(rank)) for rank in self.events), default=1) + 6
        columns = max(10, width - label - 20)
        text = Text()
        for rank, events in sorted(self.events.items()):
            cells: list[tuple[str, str]] = [(".", "dim")] * columns
            for event in sorted(events, key=lambda e: e.instruction.kind == "run"):  # over the sums that go on beside
                kind = event.instruction.kind
                if kind not in ("run", *COLLECTIVES) or event.end == event.start:
                    continue
                backward = event.instruction.graph.startswith("backward")
                mark = digits[event.instruction.microbatch % len(digits)] if kind == "run" else "="
                style = ("black on green" if backward else "bold blue") if kind == "run" else "magenta"
                first = int(event.start / step * columns) if step else 0
                for column in range(first, max(first + 1, round(event.end / step * columns) if step else 0)):
                    if column < columns:
                        cells[column] = (mark, style)
            text.append(f"rank {rank}".ljust(label))
            for mark, style in cells:
                text.append(mark, style=style)
            text.append(f"  {self.busy_seconds(rank) / step if step else 0:4.0%} {self.peak_bytes(rank) / 2**20:8.0f} MiB\n")
        text.append(f"step {_seconds(step)}, bubble {self.bubble:.0%}")
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render(options.max_width)


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def simulate(programs: Sequence[RankProgram], duration: Duration, hidden: float = 0.0) -> Timeline:
    """The timeline of one step.

    programs    of all ranks, or of some that no transfer leaves (one pipeline, standing for the others): the rest of a group
                is taken to be as fast as those of it that are there
    duration    seconds of an instruction on its rank: of a graph, of a collective, of the transfer that a send begins
    hidden      the share of a sum's seconds that costs the compute beside it nothing (`Topology.overlap["data"]`); where it is 0,
                as on a CPU, which does both, sums are waited for
    Raises DeadlockError where a rank waits for what never comes.
    """
    run = _Simulation({p.rank: p for p in programs}, duration, hidden)
    run.to_the_end()
    memory = {p.rank: tuple(u.gradients + u.held + u.temporaries for u in memory_over_time(p)) for p in programs}
    return Timeline({rank: tuple(sorted(found, key=lambda e: e.end)) for rank, found in run.events.items()}, memory)


@dataclass
class _Sum:
    """A sum that ranks start: when each came to it, and its end once all have."""

    came: dict[int, float] = field(default_factory=dict)
    end: float | None = None


class _Simulation:
    """Every rank's clock and place in its schedule, what is on its way, and who stands at which collective."""

    def __init__(self, programs: Mapping[int, RankProgram], duration: Duration, hidden: float) -> None:
        self.programs = programs
        self.duration = duration
        self.hidden = hidden
        self.clock = dict.fromkeys(programs, 0.0)
        self.at = dict.fromkeys(programs, 0)
        self.events: dict[int, list[Event]] = {rank: [] for rank in programs}
        self.arrivals: dict[tuple[int, int], deque[float]] = {}
        self.link_free: dict[tuple[int, int], float] = {}
        self.standing: dict[int, tuple[int, ...]] = {}
        self.busy = dict.fromkeys(programs, 0.0)  # until when a rank's collectives take
        self.sums: dict[tuple[int, ...], list[_Sum]] = {}
        self.due: dict[int, dict[str, _Sum]] = {rank: {} for rank in programs}  # by rank and key
        self._groups: dict[tuple[int, str], tuple[int, ...]] = {}

    def to_the_end(self) -> None:
        # The rank that is behind goes first: when the last one comes to a collective, what came before it is known.
        while any(self.advance(rank) for rank in sorted(self.clock, key=self.clock.__getitem__) if self.next(rank) is not None):
            pass
        for rank in self.programs:
            if self.next(rank) is not None:
                raise DeadlockError(f"rank {rank} waits for ever in '{self.next(rank)}'")
            if late := [key for key, found in self.due[rank].items() if found.end is None]:
                raise DeadlockError(f"rank {rank} waits for ever for the sum of {late[0]!r}")

    def next(self, rank: int) -> Instruction | None:
        schedule = self.programs[rank].schedule
        return schedule[self.at[rank]] if self.at[rank] < len(schedule) else None

    def advance(self, rank: int) -> bool:
        """Do the next instruction of a rank; False where it has to wait."""
        program = self.programs[rank]
        instruction = program.schedule[self.at[rank]]
        if instruction.kind not in ("run", "receive", "gather") and not self._settled(rank, instruction):
            return False
        start = self.clock[rank]
        match instruction.kind:
            case "run":
                self._finish(rank, start + self.duration(program, instruction))
            case "send":
                link = (rank, instruction.peer)
                self.link_free[link] = max(start, self.link_free.get(link, 0.0)) + self.duration(program, instruction)
                self.arrivals.setdefault(link, deque()).append(self.link_free[link])
                self._finish(rank, start)
            case "receive":
                queue = self.arrivals.get((instruction.peer, rank))
                if not queue:
                    return False
                self._finish(rank, max(start, queue.popleft()))
            case kind if kind in STARTED and self.hidden:
                self._start(rank, instruction)
            case _:
                return self._join(rank, instruction.axis)
        return True

    def _settled(self, rank: int, instruction: Instruction) -> bool:
        """Whether the sums whose results an instruction reads are done; the rank has then waited for them."""
        read = [self.due[rank][key] for key in instruction.keys if key in self.due[rank]]
        if any(found.end is None for found in read):
            return False
        self.clock[rank] = max(self.clock[rank], *(found.end or 0.0 for found in read)) if read else self.clock[rank]
        return True

    def _start(self, rank: int, instruction: Instruction) -> None:
        group = self._members(rank, instruction.axis)
        started = self.sums.setdefault(group, [])
        found = next((s for s in started if rank not in s.came), None)
        if found is None:
            found = _Sum()
            started.append(found)
        found.came[rank] = self.clock[rank]
        self.due[rank].update(dict.fromkeys(instruction.keys, found))
        seconds = self.duration(self.programs[rank], instruction)
        self.clock[rank] += (1.0 - self.hidden) * seconds
        self.at[rank] += 1
        if len(found.came) == len(group):
            begin = max(*found.came.values(), *(self.busy[r] for r in group))
            found.end = begin + seconds
            for r in group:
                self.busy[r] = found.end
                self.events[r].append(Event(r, begin, found.end, instruction))

    def _members(self, rank: int, axis: str) -> tuple[int, ...]:
        if (rank, axis) not in self._groups:
            self._groups[rank, axis] = tuple(r for r in self.programs[rank].mesh.ranks_on(rank, axis) if r in self.programs)
        return self._groups[rank, axis]

    def _join(self, rank: int, axis: str) -> bool:
        group = self.standing[rank] = self._members(rank, axis)
        if any(self.standing.get(r) != group for r in group):
            return False
        begin = max(max(self.clock[r], self.busy[r]) for r in group)
        for r in group:
            del self.standing[r]
            program = self.programs[r]
            self.clock[r] = begin
            self._finish(r, begin + self.duration(program, program.schedule[self.at[r]]))
        return True

    def _finish(self, rank: int, end: float) -> None:
        self.events[rank].append(Event(rank, self.clock[rank], end, self.programs[rank].schedule[self.at[rank]]))
        self.clock[rank] = end
        self.at[rank] += 1


class Durations:
    """Seconds of instructions on a topology, from emitted graphs: what `simulate` asks for. Graphs are costed once.

    What a graph communicates it waits for.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._graphs: dict[tuple[int, tuple[str, ...], tuple[int, ...]], float] = {}

    def __call__(self, program: RankProgram, instruction: Instruction) -> float:
        match instruction.kind:
            case "run":
                return self._run(program, instruction.graph)
            case "send":
                size = sum(self._transfer_bytes(program, key, instruction.microbatch) for key in instruction.keys)
                return collective_seconds("send", size, self.topology.span_of([program.rank, instruction.peer]))
            case "receive":
                return 0.0
            case _:
                return self._collective(program, instruction)

    def _run(self, program: RankProgram, name: str) -> float:
        graph = program.graphs[name].graph
        key = (id(graph), program.mesh.axes, program.mesh.sizes)
        if key not in self._graphs:
            self._graphs[key] = graph_cost(graph, self.topology, program.mesh).seconds
        return self._graphs[key]

    def _transfer_bytes(self, program: RankProgram, key: str, microbatch: int) -> float:
        found = program.transfers.get(f"{key}[{microbatch}]") or program.transfers.get(key)
        return 0.0 if found is None else float(torch.Size(found[0]).numel() * found[1].itemsize)

    def _collective(self, program: RankProgram, instruction: Instruction) -> float:
        specs = {f"param.{name}": spec for spec in program.parameters for name in (spec.name, *spec.aliases)}
        size = 0.0
        for key in instruction.keys:
            spec = specs.get(key.removeprefix("grad."))
            if spec is None:
                size += self._transfer_bytes(program, key, instruction.microbatch)
            else:
                size += bytes_moved(program, spec, instruction)
        kind = cast(CollectiveKind, "all_gather" if instruction.kind == "gather" else instruction.kind)
        return self.topology.device.launch + self.topology.collective(kind, program.mesh, instruction.axis).of(size)
