"""Prove that the programs of all ranks fit together before any of them runs.

The ranks are walked together as the runtime would run them, on keys alone: sends do not wait, receives take what a rank
sent in order, a collective waits for its whole group. Such programs are deterministic (a Kahn process network), so that
one walk that ends proves that every run ends, whatever the timing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..runtime.errors import DeadlockError, MismatchError
from ..runtime.program import Cut, GraphSpec, Instruction, Key, Mesh, RankProgram
from .graph_tools import map_operands
from .ops.collectives import COMMUNICATION, ops
from .types import Type, Varying

_STEPWISE = ("param.", "buffer.", "const.", "prologue.", "grad.param.", "out.")
_GIVEN = ("param.", "buffer.", "const.")


def check_schedules(programs: Sequence[RankProgram]) -> None:
    """Refuse a set of programs, one for every rank of their mesh, that could hang or read what is not there.

    Raises MismatchError where a transfer's two ends or a group's collectives differ, or a key is read before anything gives
    it, and DeadlockError where ranks wait for each other; both name ranks and instructions.
    """
    mesh = programs[0].mesh
    by_rank = {p.rank: p for p in programs}
    if sorted(by_rank) != list(range(mesh.world_size)) or len(programs) != mesh.world_size or any(p.mesh != mesh for p in programs):
        raise MismatchError(
            f"the programs are of ranks {sorted(p.rank for p in programs)}, but all of the {mesh.world_size} are needed"
        )
    collectives: dict[int, tuple[_Collective, ...]] = {}
    ranks = [_Rank(by_rank[r], collectives) for r in range(mesh.world_size)]
    channels: dict[tuple[int, int], deque[tuple[Instruction, tuple[tuple[Any, ...], ...]]]] = {}
    active = deque(ranks)
    while active:
        rank = active.popleft()
        rank.queued = False
        for woken in rank.advance(ranks, channels):
            if not (woken.done or woken.queued):
                woken.queued = True
                active.append(woken)
    stuck = [rank for rank in ranks if not rank.done]
    if stuck:
        raise _deadlock(stuck)
    for (source, to), queue in channels.items():
        if queue:
            raise MismatchError(f"rank {source}: '{queue[0][0]}' is never received: rank {to} has no receive left for it")


def collectives_of(program: RankProgram) -> dict[str, list[tuple[str, str]]]:
    """Per axis the collectives of a rank in order: what must be equal on all ranks of a group, as text, and where it stands.

    For ranks that each have their own program alone. Raises MismatchError for a key that is read before anything gives it.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    rank = _Rank(program, {})
    while (event := rank.waiting) is not None:
        if isinstance(event, _Collective):
            found.setdefault(event.axis, []).append((str(event.what), rank.here()))
        rank._step()
    return found


@dataclass(frozen=True)
class _Collective:
    """One collective over `axis`; `what` must be equal on all ranks of the group. `inside`: the op, if it is one of a graph."""

    axis: str
    what: Hashable
    inside: str = ""


class _Rank:
    """A program and how far it has come. `waiting` is the event it cannot pass alone."""

    def __init__(self, program: RankProgram, collectives: dict[int, tuple[_Collective, ...]]):
        self.program = program
        self.rank = program.rank
        self.done = False
        self.waiting: _Collective | Instruction | None = None
        self.at: Instruction | None = None
        self.queued = True
        self._groups: dict[str, tuple[int, ...]] = {}
        self._collectives = collectives
        self._keys = _Keys(program)
        self._events = self._walk()
        self._step()

    def _step(self) -> None:
        self.waiting = next(self._events, None)
        self.done = self.waiting is None

    def _walk(self) -> Iterator[_Collective | Instruction]:
        """The events of the program that involve others, its keys being checked in between."""
        for instruction in self.program.schedule:
            self.at = instruction
            match instruction.kind:
                case "run":
                    graph = self._keys.run(instruction)
                    yield from self._inside(graph)
                    self._keys.give(graph.outputs, instruction.microbatch)
                case "send":
                    self._keys.need(instruction.keys, instruction)
                    yield instruction
                case "receive":
                    yield instruction
                    self._keys.give(instruction.keys, instruction.microbatch)
                case _:
                    self._keys.collective(instruction)
                    yield _Collective(instruction.axis, self._keys.signature(instruction))
                    self._keys.give(instruction.keys, instruction.microbatch)

    def _inside(self, spec: GraphSpec) -> tuple[_Collective, ...]:
        found = self._collectives.get(id(spec.graph))
        if found is None:
            found = self._collectives[id(spec.graph)] = tuple(_graph_collectives(spec.graph))
        return found

    def here(self) -> str:
        """The instruction it is at, and the op inside its graph."""
        inside = self.waiting.inside if isinstance(self.waiting, _Collective) else ""
        return f"'{self.at}'" + (f", {inside}" if inside else "")

    def group(self, axis: str) -> tuple[int, ...]:
        if axis not in self._groups:
            self._groups[axis] = _group(self.program.mesh, self.rank, axis)
        return self._groups[axis]

    def advance(self, ranks: list[_Rank], channels: dict[tuple[int, int], deque]) -> list[_Rank]:
        """Go on until something must be waited for. Returns the ranks that may go on because of it."""
        woken: dict[int, _Rank] = {}
        while self.waiting is not None:
            event = self.waiting
            if isinstance(event, Instruction):
                if not 0 <= event.peer < len(ranks) or event.peer == self.rank:
                    raise MismatchError(f"rank {self.rank}: '{event}': there is no such peer")
                if event.kind == "send":
                    channels.setdefault((self.rank, event.peer), deque()).append((event, self._keys.transfer(event)))
                    woken[event.peer] = ranks[event.peer]
                else:
                    queue = channels.get((event.peer, self.rank))
                    if not queue:
                        break
                    self._take(event, *queue.popleft())
                self._step()
                continue
            group = self.group(event.axis)
            peers = [ranks[r] for r in group]
            if any(not isinstance(p.waiting, _Collective) or p.group(p.waiting.axis) != group for p in peers):
                break
            _check_equal(peers)
            for peer in peers:
                peer._step()
                woken[peer.rank] = peer
        woken.pop(self.rank, None)
        return list(woken.values())

    def _take(self, receive: Instruction, send: Instruction, payload: tuple[tuple[Any, ...], ...]) -> None:
        mine = self._keys.transfer(receive)
        if (send.keys, send.microbatch) != (receive.keys, receive.microbatch):
            raise MismatchError(f"rank {self.rank}: '{receive}' meets '{send}' of rank {receive.peer}")
        # A graph that hands on what it was given says of no cut; the two ends are compared where both do.
        if any(a != b and (a[:-1] != b[:-1] or (a[-1] and b[-1])) for a, b in zip(mine, payload, strict=True)):
            raise MismatchError(f"rank {self.rank}: '{receive}' expects {mine}, but rank {receive.peer} sends {payload}")


def _cuts_met(cuts: Sequence[Cut], axis: str) -> tuple[Cut, ...]:
    """Those that all ranks of a collective over `axis` have alike. What a cut over that axis leaves is another part on each rank,
    and may be cut otherwise."""
    found = tuple(c for c in cuts if c.axis != "pp")
    last = next((k for k, c in enumerate(found) if c.axis == axis), len(found))
    return found[: last + 1]


def _check_equal(peers: list[_Rank]) -> None:
    first = peers[0].waiting
    assert isinstance(first, _Collective)
    for peer in peers[1:]:
        other = peer.waiting
        assert isinstance(other, _Collective)
        if other is not first and other.what != first.what:
            raise MismatchError(
                f"ranks {peers[0].rank} and {peer.rank} meet in different collectives over {first.axis!r}: "
                f"{peers[0].here()} {_short(first.what)} and {peer.here()} {_short(other.what)}"
            )


def _short(what: Hashable) -> str:
    text = str(what)
    return text if len(text) < 200 else text[:200] + "..."


def _group(mesh: Mesh, rank: int, axis: str) -> tuple[int, ...]:
    """The ranks that `axis` joins with `rank`. Raises MismatchError for an axis the mesh lacks."""
    unknown = [name for name in axis.partition(":")[0].split("+") if name not in mesh.axes]
    if unknown:
        raise MismatchError(f"rank {rank}: {unknown[0]!r} is no axis of the mesh ({', '.join(mesh.axes)})")
    return mesh.ranks_on(rank, axis)


def _deadlock(stuck: list[_Rank]) -> DeadlockError:
    """Name a circle of waits, or the rank that ended without doing its part."""
    lines = []
    by_rank = {rank.rank: rank for rank in stuck}
    at, seen = stuck[0], []
    while at not in seen:
        seen.append(at)
        event = at.waiting
        if isinstance(event, Instruction):
            missing = [event.peer]
        else:
            assert event is not None
            group = at.group(event.axis)
            missing = [r for r in group if r != at.rank and not _stands_at(by_rank.get(r), group)]
        lines.append(f"rank {at.rank} waits in {at.here()} for rank {missing[0]}")
        if missing[0] not in by_rank:
            return DeadlockError("; ".join([*lines, f"rank {missing[0]} has nothing left to do"]))
        at = by_rank[missing[0]]
    return DeadlockError("ranks wait in a circle: " + "; ".join(lines[seen.index(at) :]))


def _stands_at(rank: _Rank | None, group: tuple[int, ...]) -> bool:
    return rank is not None and isinstance(rank.waiting, _Collective) and rank.group(rank.waiting.axis) == group


@dataclass
class _Keys:
    """Which keys a rank holds so far. Those outside micro-batches stand under micro-batch -1."""

    program: RankProgram
    held: set[tuple[Key, int]] = field(default_factory=set)
    made: dict[str, tuple[Key, ...]] = field(default_factory=dict)
    """Per graph the inputs that some instruction has to give."""
    lies: dict[tuple[Key, str], Hashable] = field(default_factory=dict)
    """Of what is sent or received the types, by axis."""

    def __post_init__(self) -> None:
        self.inputs = {spec.key for spec in self.program.inputs}
        specs = (*self.program.parameters, *self.program.buffers)
        self.specs = {name: spec for spec in specs for name in (spec.name, *spec.aliases)}
        self.gathered = {
            f"param.{name}" for spec in self.program.parameters if spec.gathered for name in (spec.name, *spec.aliases)
        }

    def _scope(self, key: Key, microbatch: int) -> tuple[Key, int]:
        return (key, -1 if key.startswith(_STEPWISE) else microbatch)

    def has(self, key: Key, microbatch: int) -> bool:
        if self._scope(key, microbatch) in self.held:
            return True
        given = key == "seed" or key.startswith(_GIVEN) or key in self.inputs
        return given and key not in self.gathered

    def need(self, keys: Sequence[Key], reader: Instruction) -> None:
        for key in keys:
            if not self.has(key, reader.microbatch):
                gathered = " before it is gathered" if key in self.gathered else ", which nothing before it gives"
                raise MismatchError(f"rank {self.program.rank}: '{reader}' reads {key!r}{gathered}")

    def give(self, keys: Sequence[Key], microbatch: int) -> None:
        self.held.update(self._scope(key, microbatch) for key in keys)

    def run(self, instruction: Instruction) -> GraphSpec:
        spec = self.program.graphs.get(instruction.graph)
        if spec is None:
            raise MismatchError(f"rank {self.program.rank}: '{instruction}': the program has no such graph")
        if not 0 <= instruction.microbatch < self.program.microbatches:
            raise MismatchError(f"rank {self.program.rank}: '{instruction}': there are {self.program.microbatches} micro-batches")
        if instruction.graph not in self.made:
            fixed = (k == "seed" or k in self.inputs or (k.startswith(_GIVEN) and k not in self.gathered) for k in spec.inputs)
            self.made[instruction.graph] = tuple(k for k, known in zip(spec.inputs, fixed, strict=True) if not known)
        self.need(self.made[instruction.graph], instruction)
        return spec

    def collective(self, instruction: Instruction) -> None:
        """Operands of a collective: a gradient that this rank has no part in enters as zeros, a broadcast has one source."""
        if instruction.kind == "broadcast":
            place = self.program.mesh.index(self.program.coordinates, instruction.axis)
            self.need(instruction.keys if place == instruction.peer else (), instruction)
        elif instruction.kind == "gather":
            self._spec_of(instruction)
        else:
            keys = [k for k in instruction.keys if not (k.startswith("grad.param.") and instruction.kind == "all_reduce")]
            self.need(keys, instruction)
            self._spec_of(instruction)

    def _spec_of(self, instruction: Instruction) -> None:
        for key in instruction.keys:
            name = key.removeprefix("grad.").removeprefix("param.").removeprefix("buffer.")
            if key.startswith(("grad.param.", "param.", "buffer.")) and name not in self.specs:
                raise MismatchError(f"rank {self.program.rank}: '{instruction}': {key!r} is no parameter or buffer of the program")

    def signature(self, instruction: Instruction) -> Hashable:
        """What must agree over the group: op, and of every tensor its name, whole shape, dtype and how it is cut."""
        parts = []
        for key in instruction.keys:
            spec = self.specs.get(key.removeprefix("grad.").removeprefix("param.").removeprefix("buffer."))
            if spec is not None and not key.startswith("out."):
                own = _cuts_met(spec.cuts, instruction.axis)
                parts.append((spec.name, spec.shape, str(spec.dtype), tuple((c.axis, c.dim, c.sections) for c in own)))
            else:
                parts.append((key, *self._size(key, instruction.microbatch)))
        return (instruction.kind, instruction.axis, instruction.peer, tuple(parts))

    def _size(self, key: Key, microbatch: int) -> tuple[Any, ...]:
        found = self.program.transfers.get(f"{key}[{microbatch}]") or self.program.transfers.get(key)
        return () if found is None else (tuple(found[0]), str(found[1]))

    def transfer(self, instruction: Instruction) -> tuple[tuple[Any, ...], ...]:
        """Of what a send or receive moves the keys, shapes, dtypes and types, the last as far as a graph says them.

        A receive must say shapes and dtypes, a send's are also those of its graph."""
        sizes = []
        for key in instruction.keys:
            size = self._size(key, instruction.microbatch) or self._made(key)
            if not size:
                raise MismatchError(f"rank {self.program.rank}: '{instruction}': the program does not say the shape of {key!r}")
            sizes.append((key, *size, self._types(key, instruction.kind)))
        return tuple(sizes)

    def _made(self, key: Key) -> tuple[Any, ...]:
        """The shape and dtype of a key as the graph that makes it says."""
        for node in self._nodes(key, "send"):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                return tuple(value.shape), str(value.dtype)
        return ()

    def _types(self, key: Key, kind: str) -> Hashable:
        """How a key lies on the ranks of each axis, as the graph says that makes it, or that it is received for."""
        if (key, kind) not in self.lies:
            found = (_types(node, "") for node in self._nodes(key, kind))
            self.lies[key, kind] = next(filter(None, found), ())
        return self.lies[key, kind]

    def _nodes(self, key: Key, kind: str) -> Iterator[fx.Node]:
        """What stands for a key in the graphs that make it, or, of a receive, that take it."""
        for spec in self.program.graphs.values():
            if kind == "send" and key in spec.outputs:
                output = next(n for n in spec.graph.graph.nodes if n.op == "output")
                node = output.args[0][spec.outputs.index(key)]
                if isinstance(node, fx.Node):
                    yield node
            elif kind != "send" and key in spec.inputs:
                yield spec.graph.graph.find_nodes(op="placeholder")[spec.inputs.index(key)]


def _graph_collectives(gm: fx.GraphModule) -> Iterator[_Collective]:
    """The communication ops of a graph in order."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in COMMUNICATION:
            continue
        axis, *static = (_frozen(argument) for argument in node.args[1:])
        named = tuple((k, _frozen(v)) for k, v in node.kwargs.items())
        value = node.meta.get("of"), node.meta.get("phase")
        what = (node.target.name(), axis, tuple(static), named, value, _payload(node), _types(node, str(axis)))
        yield _Collective(str(axis), what, f"{node.target.name()} at {node.name}")


def _types(node: fx.Node, axis: str) -> Hashable:
    """The types over other axes than this: what one rank has reduced and its peer has not cannot be summed, nor can parts of other
    cuts be joined."""
    types = {a: t for a, t in node.meta.get("types", {}).items() if a not in axis.split("+")}
    return tuple(sorted((a, tuple(map(_cut, t)) if isinstance(t, tuple) else _cut(t)) for a, t in types.items()))


def _cut(t: Type) -> Hashable:
    return (str(t.dim), t.sections) if isinstance(t, Varying) else (str(t),)


def _payload(node: fx.Node) -> Hashable:
    """The shapes, whole along the axis, and dtypes that all ranks must agree on; local lengths of uneven shards may differ."""
    gathers = node.target in (ops.all_gather.default, ops.all_gather_bucket.default)
    value = node.meta.get("val") if gathers else map_operands(node.args[0], lambda n: n.meta.get("val"))
    free = node.args[2] if node.target is ops.all_to_all.default else None
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(
        (tuple(None if d == free else n for d, n in enumerate(t.shape)), str(t.dtype)) for t in items if isinstance(t, torch.Tensor)
    )


def _frozen(value: Any) -> Hashable:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value
