"""Where a rank stands on each axis of its mesh, and communication over torch.distributed.

An axis name may join several with `+`, major first in the mesh's order (`"dp_replicate+dp_shard"`): the flattened axis. A
list of indices after a colon leaves only these (`"pp:0,3"`: the first and the fourth stage). `"mb"`, the micro-batch axis, is
one of time: its size and index are the `microbatch` being run, and nothing communicates over it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..passes.ops.collectives import Communicator
from .errors import ABORT_KEY, AFTER_A_LOSS, PeerLostError, ShardwrightError
from .program import Mesh
from .transports import GlooTransport, NcclTransport, Transport, as_bytes

MICROBATCH = "mb"
T = TypeVar("T")


class MeshCommunicator(Communicator, Protocol):
    """A communicator that also knows its mesh and sends from rank to rank: what the executor and the parameters need.

    microbatch   (index, count) of the micro-batch being run
    position     what the rank is doing, for error messages
    gate         called once, before the rank next communicates
    """

    mesh: Mesh
    rank: int
    microbatch: tuple[int, int]
    position: str
    gate: Callable[[], None] | None

    def group(self, axis: str) -> AxisGroup: ...

    def reduce_(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        """`all_reduce` whose result may be `x` itself, overwritten: `x` is not to be used again."""
        ...

    def start_reduce_scatter(self, x: Tensor, axis: str) -> Callable[[], Tensor]:
        """`reduce_scatter` as `start_reduce` is for sums; `x` is not to be used again."""
        ...

    def broadcast(self, x: Tensor, axis: str, root_index: int) -> Tensor:
        """The `x` of index `root_index`; the others' say its shape and dtype."""
        ...

    def send(self, x: Tensor, peer: int) -> None:
        """Send to rank `peer` without waiting. Sends to one rank arrive in order."""
        ...

    def receive(self, shape: Sequence[int], dtype: torch.dtype, peer: int) -> Tensor: ...

    def pass_gate(self) -> None: ...

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        ...

    def barrier(self) -> None: ...


class KeyStore(Protocol):
    """What is read of torch.distributed's stores."""

    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that an axis joins with this one, by their index on it."""

    axis: str
    ranks: tuple[int, ...]
    index: int


def axis_group(mesh: Mesh, rank: int, axis: str) -> AxisGroup:
    """The group of `rank` on `axis`, which may be flattened. Raises ShardwrightError for an axis the mesh lacks."""
    names = axis.partition(":")[0].split("+")
    order = [mesh.axes.index(name) if name in mesh.axes else -1 for name in names]
    if -1 in order or order != sorted(set(order)):
        known = ", ".join(mesh.axes)
        raise ShardwrightError(f"{axis!r} is no axis of the mesh ({known}): use these, or several joined by '+' in this order")
    ranks = mesh.ranks_on(rank, axis)
    if rank not in ranks:
        raise ShardwrightError(f"{describe_rank(mesh, rank)} is none of the indices that {axis!r} joins")
    return AxisGroup(axis, ranks, ranks.index(rank))


def describe_rank(mesh: Mesh, rank: int) -> str:
    """`rank 3 (dp 1, tp 1)`."""
    where = ", ".join(f"{axis} {index}" for axis, index in mesh.coordinates(rank).items())
    return f"rank {rank} ({where})" if where else f"rank {rank}"


def _first_sentence(error: Exception) -> str:
    """What torch.distributed says, without the place in its source and the advice after it."""
    text = re.sub(r"^(\[[^]]*\]\s*)+", "", str(error).strip()) or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".")


def abort_reason(store: KeyStore | None) -> str:
    """What the rank that failed first left in the job's store, "" if nothing."""
    try:
        return store.get(ABORT_KEY).decode() if store is not None and store.check([ABORT_KEY]) else ""
    except RuntimeError:
        return ""  # the store's host is what was lost


class Standing:
    """A rank's place on its mesh: the half of a communicator that needs no peers."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh = mesh
        self.rank = rank
        self.microbatch: tuple[int, int] = (0, 1)
        self.position = ""
        self.gate: Callable[[], None] | None = None
        self._axis_groups: dict[str, AxisGroup] = {}

    def pass_gate(self) -> None:
        gate, self.gate = self.gate, None
        if gate is not None:
            gate()

    def group(self, axis: str) -> AxisGroup:
        found = self._axis_groups.get(axis)
        if found is None:
            found = self._axis_groups[axis] = axis_group(self.mesh, self.rank, axis)
        return found

    def size(self, axis: str) -> int:
        return self.microbatch[1] if axis == MICROBATCH else len(self.group(axis).ranks)

    def index(self, axis: str) -> int:
        return self.microbatch[0] if axis == MICROBATCH else self.group(axis).index


class ProcessGroupCommunicator(Standing):
    """A `MeshCommunicator` over torch.distributed: NCCL where `device` is CUDA, Gloo elsewhere.

    Needs the default process group, whose rank numbers are the mesh's, unless the mesh has one rank. Its constructor is a
    collective over all ranks, as is the first use of a joined or listed axis over the ranks that it joins. Once a peer is
    lost, every call raises.

    timeout   seconds after which a collective that does not complete raises PeerLostError
    store     where ranks that fail leave their reason (`ABORT_KEY`), to be quoted when a peer is lost
    """

    def __init__(
        self, mesh: Mesh, rank: int, device: torch.device | str, timeout: float = 300.0, store: KeyStore | None = None
    ) -> None:
        super().__init__(mesh, rank)
        if mesh.world_size > 1 and (dist.get_world_size() != mesh.world_size or dist.get_rank() != rank):
            raise ShardwrightError(
                f"rank {rank} of a mesh of {mesh.world_size} was asked for in process {dist.get_rank()} of "
                f"{dist.get_world_size()}: the mesh must name every process of the job, in order"
            )
        self.device = torch.device(device)
        self.timeout = timeout
        self._store = store
        self._transports: dict[tuple[int, ...], Transport] = {}
        self._pending: list[tuple[dist.Work | None, Tensor, int]] = []
        self._lost: PeerLostError | None = None
        self._up = self._down = None
        if mesh.world_size > 1:
            everyone = list(range(mesh.world_size))
            self._up = self._down = self._new_group(everyone)
            if self.device.type == "cuda":
                # One NCCL communicator per direction: two ranks sending to each other at once would otherwise each wait.
                self._down = self._new_group(everyone)
        for axis in mesh.axes:
            if self.size(axis) > 1:
                self._transport(self.group(axis))

    def _new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=self.timeout)
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup), "this rank is a member"
        return group

    def _transport(self, group: AxisGroup) -> Transport:
        found = self._transports.get(group.ranks)
        if found is None:
            members = self._call("the creation of a group", group, lambda: self._new_group(group.ranks))
            found = NcclTransport(members) if self.device.type == "cuda" else GlooTransport(members)
            self._transports[group.ranks] = found
        return found

    def process_group(self, axis: str) -> dist.ProcessGroup:
        """torch's group of this rank's peers on an axis of the mesh. Raises ShardwrightError for an axis of size 1."""
        found = self._transports.get(self.group(axis).ranks)
        if found is None:
            raise ShardwrightError(f"no process group joins axis {axis!r} of size {self.size(axis)}")
        return found.group

    def _call(self, what: str, where: AxisGroup | int, work: Callable[[], T]) -> T:
        """Run `work`, turning what torch.distributed raises into an error that says what was being done, with whom."""
        if self._lost is not None:
            raise PeerLostError(str(self._lost))
        self.pass_gate()
        try:
            return work()
        except RuntimeError as error:
            if isinstance(where, AxisGroup):
                place = f"{what} over axis {where.axis!r} (ranks {', '.join(map(str, where.ranks))})"
            else:
                place = f"{what} rank {where}"
            reason = abort_reason(self._store)
            reason = reason.split(AFTER_A_LOSS)[0].rstrip(". ")
            cause = f"A peer said: {reason}" if reason else f"torch.distributed said: {_first_sentence(error)}"
            self._lost = PeerLostError(f"{describe_rank(self.mesh, self.rank)} lost a peer in {place}. {cause}. {AFTER_A_LOSS}")
            raise self._lost.at(self.position) from error

    def all_reduce(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        return self._all_reduce(x, axis, op, overwrite=False)

    def reduce_(self, x: Tensor, axis: str, op: str = "sum") -> Tensor:
        return self._all_reduce(x, axis, op, overwrite=True)

    def _all_reduce(self, x: Tensor, axis: str, op: str, overwrite: bool) -> Tensor:
        group = self.group(axis)
        if len(group.ranks) == 1 or not x.numel():
            return x if overwrite else x.clone()
        transport = self._transport(group)
        return self._call("all_reduce", group, lambda: transport.all_reduce(x, op, overwrite))

    def all_gather(self, x: Tensor, axis: str) -> Tensor:
        group = self.group(axis)
        if len(group.ranks) == 1 or not x.numel():
            return x.unsqueeze(0).repeat(len(group.ranks), *[1] * x.dim())
        transport = self._transport(group)
        return self._call("all_gather", group, lambda: transport.all_gather(x))

    def reduce_scatter(self, x: Tensor, axis: str) -> Tensor:
        group = self.group(axis)
        if len(group.ranks) == 1 or not x.numel():
            return x[0].clone()
        transport = self._transport(group)
        return self._call("reduce_scatter", group, lambda: transport.reduce_scatter(x))

    def all_to_all(self, x: Tensor, axis: str) -> Tensor:
        group = self.group(axis)
        if len(group.ranks) == 1 or not x.numel():
            return x.clone()
        transport = self._transport(group)
        return self._call("all_to_all", group, lambda: transport.all_to_all(x))

    def start_reduce(self, x: Tensor, axis: str) -> Callable[[], Tensor]:
        group = self.group(axis)
        if len(group.ranks) == 1 or not x.numel():
            return lambda: x
        transport = self._transport(group)
        finish = self._call("all_reduce", group, lambda: transport.start_all_reduce(x))
        return lambda: self._call("all_reduce", group, finish)

    def start_reduce_scatter(self, x: Tensor, axis: str) -> Callable[[], Tensor]:
        group = self.group(axis)
        if len(group.ranks) == 1 or not x.numel():
            return lambda: x[0]
        transport = self._transport(group)
        finish = self._call("reduce_scatter", group, lambda: transport.start_reduce_scatter(x))
        return lambda: self._call("reduce_scatter", group, finish)

    def broadcast(self, x: Tensor, axis: str, root_index: int) -> Tensor:
        group = self.group(axis)
        result = x.clone(memory_format=torch.contiguous_format)
        if len(group.ranks) > 1 and x.numel():
            transport = self._transport(group)
            self._call("broadcast", group, lambda: transport.broadcast_(result, root_index))
        return result

    def _peers(self, source: int, target: int) -> dist.ProcessGroup | None:
        return self._up if source < target else self._down

    def send(self, x: Tensor, peer: int) -> None:
        self._pending = [item for item in self._pending if item[0] is not None and not item[0].is_completed()]
        if x.numel():
            data = as_bytes(x.contiguous())
            work = self._call("send to", peer, lambda: dist.isend(data, peer, group=self._peers(self.rank, peer)))
            self._pending.append((work, data, peer))

    def receive(self, shape: Sequence[int], dtype: torch.dtype, peer: int) -> Tensor:
        x = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        if x.numel():
            self._call("receive from", peer, lambda: self._wait(dist.irecv(as_bytes(x), peer, group=self._peers(peer, self.rank))))
        return x

    def flush(self) -> None:
        while self._pending:
            work, _, peer = self._pending.pop(0)
            self._call("send to", peer, lambda work=work: self._wait(work))

    def _wait(self, work: dist.Work | None) -> None:
        if work is not None:
            work.wait()

    def barrier(self) -> None:
        if self.mesh.world_size == 1:
            return
        self.reduce_(torch.zeros(1, device=self.device), "+".join(self.mesh.axes))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
