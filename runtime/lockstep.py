"""All ranks of a mesh in one process, as threads that pass one baton: one runs at a time, in an order that never changes.

The ranks run the same executor and module code as under torchrun. A collective is computed when its last member arrives.
What can never complete, or does not match, is reported at once in every rank, with each rank's position.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .communicator import AxisGroup, Standing, describe_rank
from .errors import GRAPH_MARK, DeadlockError, MismatchError, PeerLostError, ShardwrightError, graph_line
from .program import Mesh

T = TypeVar("T")


def run_ranks(world_size: int, fn: Callable[[int, World], T], *, timeout: float = 60.0) -> list[T]:
    """`fn(rank, world)` on every rank; its results by rank.

    The first rank that raises stops the others (their next communication raises PeerLostError), and its error is raised
    here with a note of its rank. Raises DeadlockError with every rank's position where no rank can go on, and where
    ranks are still running after `timeout` seconds.
    """
    world = World(world_size)
    results: list[Any] = [None] * world_size
    threads = []
    for rank in range(world_size):
        context = contextvars.copy_context()
        target = world._body(rank, fn, results)
        threads.append(threading.Thread(target=context.run, args=(target,), name=f"rank {rank}", daemon=True))
    for rank, thread in enumerate(threads):
        thread.start()
        world._ranks[rank].thread = thread.ident
    world._ranks[0].baton.release()
    if not world._finished.wait(timeout):
        raise DeadlockError(f"ranks still run after {timeout:g} seconds:\n{world.report()}")
    for thread in threads:
        thread.join()
    world._raise_first_error()
    return results


@dataclass(eq=False)
class _Rank:
    """A thread: what it waits for ("" while it may run), and what comes out of it."""

    number: int
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: int | None = None
    waits: str = ""
    ended: bool = False
    communicator: LockstepCommunicator | None = None
    received: Any = None
    unread: int = 0
    """Messages sent by this rank that no rank has taken yet."""


@dataclass(frozen=True)
class _Call:
    """What the members of a collective must agree on."""

    kind: str
    detail: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.kind}{detail} of {str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass
class _Meeting:
    """A collective that some of its members have joined."""

    call: _Call
    first: int
    joined: dict[int, Tensor] = field(default_factory=dict)


class World:
    """The ranks of one `run_ranks`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks = [_Rank(i) for i in range(size)]
        self._meetings: dict[tuple[int, ...], _Meeting] = {}
        self._mail: dict[tuple[int, int], deque[Tensor]] = {}
        self._errors: list[tuple[int, BaseException]] = []
        self._failure: Callable[[], ShardwrightError] | None = None
        self._finished = threading.Event()

    def communicator(self, mesh: Mesh, rank: int) -> LockstepCommunicator:
        """This rank's communicator on `mesh`, whose ranks are the world's first `mesh.world_size`."""
        if mesh.world_size > self.size:
            raise ShardwrightError(f"a mesh of {mesh.world_size} ranks does not fit a world of {self.size}")
        made = LockstepCommunicator(self, mesh, rank)
        self._ranks[rank].communicator = made
        return made

    def report(self) -> str:
        """One line for every rank: where it is and what it waits for."""
        return "\n".join(f"  {self._line(rank)}" for rank in self._ranks)

    def _line(self, rank: _Rank) -> str:
        name = describe_rank(rank.communicator.mesh, rank.number) if rank.communicator else f"rank {rank.number}"
        if rank.ended:
            return f"{name} has ended"
        line = f"{name} waits in {rank.waits}" if rank.waits else f"{name} is running"
        if rank.communicator and rank.communicator.position:
            line += f", at {rank.communicator.position}"
        node = _node_of(rank.thread)
        return f"{line}, {node}" if node else line

    def _body(self, number: int, fn: Callable[[int, World], Any], results: list[Any]) -> Callable[[], None]:
        def run() -> None:
            rank = self._ranks[number]
            rank.baton.acquire()
            try:
                results[number] = fn(number, self)
            except BaseException as error:  # noqa: BLE001  (raised again by run_ranks)
                self._errors.append((number, error))
                if self._failure is None:
                    reason = f"rank {number} stopped: {type(error).__name__}: {error}"
                    self._fail(lambda: PeerLostError(reason))
            rank.ended = True
            self._pass_baton(rank)

        return run

    def _raise_first_error(self) -> None:
        if self._errors:
            number, error = self._errors[0]
            error.add_note(f"raised on rank {number} of {self.size}")
            raise error
        left = [f"{len(box)} from rank {source} to rank {target}" for (source, target), box in self._mail.items() if box]
        if left:
            raise MismatchError(f"messages that were sent were never received: {'; '.join(left)}")

    def _fail(self, make: Callable[[], ShardwrightError]) -> None:
        """From here on every communication of every rank raises what `make` gives."""
        self._failure = make
        for rank in self._ranks:
            rank.waits = ""

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure()

    def _pass_baton(self, rank: _Rank) -> None:
        """Let the next rank that may run do so; where none may, every rank waits in vain."""
        order = [self._ranks[(rank.number + step) % self.size] for step in range(1, self.size + 1)]
        following = next((r for r in order if not r.ended and not r.waits), None)
        if following is None and not all(r.ended for r in self._ranks):
            report = self.report()
            self._fail(lambda: DeadlockError(f"no rank can go on: what they wait for can never complete.\n{report}"))
            following = next(r for r in order if not r.ended)
        if following is None:
            self._finished.set()
        elif following is not rank:
            following.baton.release()
            if not rank.ended:
                rank.baton.acquire()

    def _wait(self, rank: _Rank, what: str) -> None:
        rank.waits = what
        self._pass_baton(rank)
        self._check()

    def _meet(
        self, number: int, group: AxisGroup, call: _Call, x: Tensor, compute: Callable[[list[Tensor]], list[Tensor]]
    ) -> Tensor:
        """Join a collective of `group`; the last member to come computes everyone's result."""
        self._check()
        rank = self._ranks[number]
        here = f"{call} over axis {group.axis!r}"
        meeting = self._meetings.get(group.ranks)
        if meeting is None:
            meeting = self._meetings[group.ranks] = _Meeting(call, number)
        elif meeting.call != call:
            rank.waits = here
            report = self.report()
            rank.waits = ""
            self._fail(lambda: MismatchError(f"ranks {meeting.first} and {number} joined different collectives.\n{report}"))
            self._check()
        meeting.joined[number] = x.detach()
        if len(meeting.joined) < len(group.ranks):
            self._wait(rank, here)
        else:
            del self._meetings[group.ranks]
            with torch.no_grad():
                results = compute([meeting.joined[r] for r in group.ranks])
            for r, result in zip(group.ranks, results, strict=True):
                self._ranks[r].received = result
                self._ranks[r].waits = ""
        result, rank.received = rank.received, None
        return result

    def _send(self, source: int, target: int, x: Tensor) -> None:
        self._check()
        if not 0 <= target < self.size or target == source:
            raise MismatchError(f"rank {source} cannot send to rank {target} of {self.size}")
        self._mail.setdefault((source, target), deque()).append(x.detach().clone(memory_format=torch.contiguous_format))
        self._ranks[source].unread += 1
        if self._ranks[target].waits.startswith(f"receive from rank {source}:"):
            self._ranks[target].waits = ""

    def _receive(self, source: int, target: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._check()
        rank = self._ranks[target]
        box = self._mail.setdefault((source, target), deque())
        wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        if not box:
            self._wait(rank, f"receive from rank {source}: {wanted}")
        x = box.popleft()
        if tuple(x.shape) != shape or x.dtype != dtype:
            found = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            report = self.report()
            self._fail(lambda: MismatchError(f"rank {target} expected {wanted} from rank {source}, which sent {found}.\n{report}"))
            self._check()
        sender = self._ranks[source]
        sender.unread -= 1
        if not sender.unread and sender.waits.startswith("flush"):
            sender.waits = ""
        return x

    def _flush(self, number: int) -> None:
        self._check()
        rank = self._ranks[number]
        if rank.unread:
            targets = sorted(target for (source, target), box in self._mail.items() if source == number and box)
            self._wait(rank, f"flush: what it sent to rank {', '.join(map(str, targets))} has not been received")


def _node_of(thread: int | None) -> str:
    """The emitted graph's line that a thread is in, "" if it is in none."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame is not None:
        name = frame.f_globals.get(GRAPH_MARK)
        if name:
            return f"graph {name}: {graph_line(frame.f_code.co_filename, frame.f_lineno)}"
        frame = frame.f_back
    return ""


def _reduce(xs: Sequence[Tensor], op: str) -> Tensor:
    """Reduced in rank order; sums of floating-point values are made in float64."""
    first = xs[0]
    if op == "sum" and first.dtype != torch.bool:
        wide = torch.float64 if first.is_floating_point() else first.dtype
        total = first.to(wide, copy=True)
        for x in xs[1:]:
            total += x.to(wide)
        return total.to(first.dtype)
    if op not in ("sum", "max", "min"):
        raise ValueError(f"unknown reduction {op!r}: one of sum, max, min")
    rows = torch.stack(list(xs))
    return rows.amin(0) if op == "min" else rows.amax(0)


class LockstepCommunicator(Standing):
    """A `MeshCommunicator` among the ranks of a `World`."""

    def __init__(self, world: World, mesh: Mesh, rank: int) -> None:
        super().__init__(mesh, rank)
        self.device = torch.device("cpu")
        self._world = world

    def _join(self, kind: str, axis: str, x: Tensor, compute: Callable[[list[Tensor]], list[Tensor]], detail: str = "") -> Tensor:
        self.pass_gate()
        call = _Call(kind, detail, tuple(x.shape), x.dtype)
        return self._world._meet(self.rank, self.group(axis), call, x, compute)

    def all_reduce(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        def compute(xs: list[Tensor]) -> list[Tensor]:
            total = _reduce(xs, op)
            return [total, *(total.clone() for _ in xs[1:])]

        return self._join("all_reduce", axis, x, compute, op)

    def reduce_(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        return self.all_reduce(x, axis, op)

    def all_gather(self, x: Tensor, axis: str) -> Tensor:
        return self._join("all_gather", axis, x, lambda xs: [torch.stack(xs) for _ in xs])

    def reduce_scatter(self, x: Tensor, axis: str) -> Tensor:
        self._rows("reduce_scatter", x, axis)
        return self._join("reduce_scatter", axis, x, lambda xs: [_reduce([row[i] for row in xs], "sum") for i in range(len(xs))])

    def all_to_all(self, x: Tensor, axis: str) -> Tensor:
        self._rows("all_to_all", x, axis)
        return self._join("all_to_all", axis, x, lambda xs: [torch.stack([row[i] for row in xs]) for i in range(len(xs))])

    def start_reduce(self, x: Tensor, axis: str) -> Callable[[], Tensor]:
        result = self.reduce_(x, axis)
        return lambda: result

    def start_reduce_scatter(self, x: Tensor, axis: str) -> Callable[[], Tensor]:
        result = self.reduce_scatter(x, axis)
        return lambda: result

    def broadcast(self, x: Tensor, axis: str, root_index: int) -> Tensor:
        return self._join("broadcast", axis, x, lambda xs: [xs[root_index].clone() for _ in xs], f"from index {root_index}")

    def send(self, x: Tensor, peer: int) -> None:
        self.pass_gate()
        self._world._send(self.rank, peer, x)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, peer: int) -> Tensor:
        self.pass_gate()
        return self._world._receive(peer, self.rank, tuple(shape), dtype)

    def flush(self) -> None:
        self._world._flush(self.rank)

    def barrier(self) -> None:
        everyone = AxisGroup("+".join(self.mesh.axes), tuple(range(self.mesh.world_size)), self.rank)
        call = _Call("barrier", "", (), torch.uint8)
        self._world._meet(self.rank, everyone, call, torch.zeros((), dtype=torch.uint8), lambda xs: xs)

    def _rows(self, kind: str, x: Tensor, axis: str) -> None:
        if x.dim() == 0 or x.shape[0] != self.size(axis):
            raise MismatchError(f"{kind} over axis {axis!r} takes one row for each of {self.size(axis)} ranks, not {list(x.shape)}")
