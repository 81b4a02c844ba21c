"""The communication instructions of a program: collectives over a named mesh axis, and the local slices between them.

Every op names its axis, never a process group. Which ranks an axis joins, and where this rank stands on it, is asked of
the current `Communicator` (`use_communicator`): a process group at run time, the lockstep interpreter in `verify` and in
tests, a `StaticCommunicator` while graphs are emitted, where only shapes are needed.

`sizes` is `flatten_sections(sections)` of the sharded dim (see `passes.types`), or `[]` for one even section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..types import Sections, even_sections, unflatten_sections

NAMESPACE = "shardwright"
library = torch.library.Library(NAMESPACE, "DEF")


class Communicator(Protocol):
    """What the collective ops need of their surroundings. Results are new tensors; inputs are contiguous.

    device      where ops make tensors that they are given none like
    """

    @property
    def device(self) -> torch.device: ...
    def size(self, axis: str) -> int: ...
    def index(self, axis: str) -> int: ...
    def all_reduce(self, x: Tensor, axis: str, op: str) -> Tensor: ...

    def start_reduce(self, x: Tensor, axis: str) -> Callable[[], Tensor]:
        """A sum that may go on while the rank computes: what is returned waits for it and gives it. `x` may be overwritten."""
        ...

    def all_gather(self, x: Tensor, axis: str) -> Tensor:
        """The equally shaped `x` of every rank of the axis, stacked on a new leading dim."""
        ...

    def reduce_scatter(self, x: Tensor, axis: str) -> Tensor:
        """`x` is [n, ...]: the sum over ranks of row `index(axis)`."""
        ...

    def all_to_all(self, x: Tensor, axis: str) -> Tensor:
        """`x` is [n, ...]: row i goes to rank i; row i of the result came from rank i."""
        ...


@dataclass(frozen=True)
class StaticCommunicator:
    """A rank's coordinates and no peers: enough to emit its graphs on fake tensors, anywhere."""

    sizes: dict[str, int]
    indices: dict[str, int]
    device: torch.device = torch.device("cpu")

    def size(self, axis: str) -> int:
        return math.prod(self.sizes[name] for name in axis.split("+"))

    def index(self, axis: str) -> int:
        found = 0
        for name in axis.split("+"):
            found = found * self.sizes[name] + self.indices[name]
        return found

    def all_reduce(self, x: Tensor, axis: str, op: str) -> Tensor:
        raise self._no_peers("all_reduce", axis)

    def start_reduce(self, x: Tensor, axis: str) -> Callable[[], Tensor]:
        raise self._no_peers("start_all_reduce", axis)

    def all_gather(self, x: Tensor, axis: str) -> Tensor:
        raise self._no_peers("all_gather", axis)

    def reduce_scatter(self, x: Tensor, axis: str) -> Tensor:
        raise self._no_peers("reduce_scatter", axis)

    def all_to_all(self, x: Tensor, axis: str) -> Tensor:
        raise self._no_peers("all_to_all", axis)

    def _no_peers(self, what: str, axis: str) -> RuntimeError:
        if self.size(axis) == 1:
            return RuntimeError(f"{what} over axis {axis!r} of one rank was emitted; it should have been left out")
        return RuntimeError(f"{what} over axis {axis!r} was run while graphs are only being emitted")


_current: ContextVar[Communicator | None] = ContextVar("shardwright_communicator", default=None)


def communicator() -> Communicator:
    found = _current.get()
    if found is None:
        raise RuntimeError("a shardwright program ran outside `use_communicator`: there is no mesh to communicate over")
    return found


def current_communicator() -> Communicator | None:
    return _current.get()


@contextmanager
def use_communicator(value: Communicator) -> Iterator[Communicator]:
    token = _current.set(value)
    try:
        yield value
    finally:
        _current.reset(token)


def resolve_sections(sizes: Sequence[int], n: int, local: int | None = None, whole: int | None = None) -> Sections:
    """`sizes` as sections; `[]` stands for the even cut of a dim of which each rank holds `local` (or all hold `whole`)."""
    if len(sizes):
        return unflatten_sections(sizes, n)
    total = whole if whole is not None else (local or 0) * n
    return even_sections(total, n)


def take_shard(x: Tensor, dim: int, sections: Sections, index: int) -> Tensor:
    """Rank `index`'s shard of the whole `x`. A view where the shard is one piece."""
    pieces, start = [], 0
    for section in sections:
        pieces.append(x.narrow(dim, start + sum(section[:index]), section[index]))
        start += sum(section)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def join_shards(shards: Sequence[Tensor], dim: int, sections: Sections) -> Tensor:
    """The whole, from every rank's shard: the inverse of `take_shard`. Contiguous, as the fakes of the ops say, whatever memory
    format torch would take over from the shards."""
    if len(sections) == 1:
        return torch.cat(list(shards), dim).contiguous()
    pieces = []
    starts = [0] * len(shards)
    for section in sections:
        for rank, length in enumerate(section):
            pieces.append(shards[rank].narrow(dim, starts[rank], length))
            starts[rank] += length
    return torch.cat(pieces, dim).contiguous()


def pad_to(x: Tensor, dim: int, length: int) -> Tensor:
    if x.shape[dim] == length:
        return x
    shape = list(x.shape)
    shape[dim] = length - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def _lengths(sections: Sections) -> list[int]:
    return [sum(column) for column in zip(*sections, strict=True)]


def _all_reduce(x: Tensor, axis: str, op: str = "sum") -> Tensor:
    return communicator().all_reduce(x.contiguous(), axis, op)


_started: MutableMapping[Tensor, Callable[[], Tensor]] = WeakIdKeyDictionary()
"""What waits for a collective, by the tensor that stands for its result in a graph until it is awaited."""


def _start_all_reduce(x: Tensor, axis: str) -> Tensor:
    standing = x.clone(memory_format=torch.contiguous_format)
    _started[standing] = communicator().start_reduce(standing, axis)
    return standing


def _wait(started: Tensor) -> Tensor:
    # Cloned where the sum was made in place: an op's result is never its operand.
    result = _started.pop(started)()
    return result.clone() if result is started else result


def _all_gather(x: Tensor, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    comm = communicator()
    sections = resolve_sections(sizes, comm.size(axis), local=x.shape[dim])
    lengths = _lengths(sections)
    rows = comm.all_gather(pad_to(x, dim, max(lengths)).contiguous(), axis)
    if dim == 0 and len(sections) == 1 and len(set(lengths)) == 1:
        return rows.flatten(0, 1)
    return join_shards([row.narrow(dim, 0, n) for row, n in zip(rows, lengths, strict=True)], dim, sections)


def _reduce_scatter(x: Tensor, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    comm = communicator()
    n, index = comm.size(axis), comm.index(axis)
    sections = resolve_sections(sizes, n, whole=x.shape[dim])
    lengths = _lengths(sections)
    if dim == 0 and len(sections) == 1 and len(set(lengths)) == 1:
        return comm.reduce_scatter(x.contiguous().unflatten(0, (n, lengths[0])), axis)
    rows = torch.stack([pad_to(take_shard(x, dim, sections, i), dim, max(lengths)) for i in range(n)])
    return comm.reduce_scatter(rows, axis).narrow(dim, 0, lengths[index]).contiguous()


def _all_to_all(
    x: Tensor, axis: str, gather_dim: int, gather_sizes: Sequence[int], split_dim: int, split_sizes: Sequence[int]
) -> Tensor:
    comm = communicator()
    n, index = comm.size(axis), comm.index(axis)
    gather = resolve_sections(gather_sizes, n, local=x.shape[gather_dim])
    split = resolve_sections(split_sizes, n, whole=x.shape[split_dim])
    held, taken = _lengths(gather), _lengths(split)
    padded = pad_to(x, gather_dim, max(held))
    rows = torch.stack([pad_to(take_shard(padded, split_dim, split, i), split_dim, max(taken)) for i in range(n)])
    received = comm.all_to_all(rows, axis).narrow(split_dim + 1, 0, taken[index])
    return join_shards([row.narrow(gather_dim, 0, m) for row, m in zip(received, held, strict=True)], gather_dim, gather)


def _shard(x: Tensor, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    comm = communicator()
    sections = resolve_sections(sizes, comm.size(axis), whole=x.shape[dim])
    return take_shard(x, dim, sections, comm.index(axis)).clone(memory_format=torch.contiguous_format)


def _unshard(x: Tensor, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    comm = communicator()
    n, index = comm.size(axis), comm.index(axis)
    sections = resolve_sections(sizes, n, local=x.shape[dim])
    shape = list(x.shape)
    shards = []
    for rank, length in enumerate(_lengths(sections)):
        shape[dim] = length
        shards.append(x if rank == index else x.new_zeros(shape))
    return join_shards(shards, dim, sections)


def _keep_first(x: Tensor, axis: str) -> Tensor:
    return x.clone() if communicator().index(axis) == 0 else torch.zeros_like(x)


def _shard_index(axis: str, sizes: Sequence[int]) -> Tensor:
    comm = communicator()
    n, index = comm.size(axis), comm.index(axis)
    sections = unflatten_sections(sizes, n)
    return take_shard(torch.arange(sum(map(sum, sections)), device=comm.device), 0, sections, index).clone()


def _cuts(
    xs: Sequence[Tensor], dims: Sequence[int], counts: Sequence[int], sizes: Sequence[int], n: int, whole: bool
) -> list[Sections]:
    """The sections of each tensor of a bucket; `counts[k]` ints of `sizes` are tensor k's."""
    found, start = [], 0
    for x, dim, count in zip(xs, dims, counts, strict=True):
        own = sizes[start : start + count]
        start += count
        length = x.shape[dim]
        found.append(resolve_sections(own, n, whole=length) if whole else resolve_sections(own, n, local=length))
    return found


def _all_gather_bucket(
    xs: list[Tensor], axis: str, dims: Sequence[int], counts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """One all-gather for several shards: each padded to its longest, flattened, in a row."""
    comm = communicator()
    cuts = _cuts(xs, dims, counts, sizes, comm.size(axis), whole=False)
    padded = [pad_to(x, dim, max(_lengths(cut))) for x, dim, cut in zip(xs, dims, cuts, strict=True)]
    rows = comm.all_gather(torch.cat([p.reshape(-1) for p in padded]), axis)
    wholes, start = [], 0
    for p, dim, cut in zip(padded, dims, cuts, strict=True):
        parts = rows.narrow(1, start, p.numel()).unflatten(1, p.shape)
        start += p.numel()
        lengths = _lengths(cut)
        if dim == 0 and len(cut) == 1 and len(set(lengths)) == 1:
            wholes.append(parts.reshape(-1, *p.shape[1:]))
        else:
            wholes.append(join_shards([part.narrow(dim, 0, m) for part, m in zip(parts, lengths, strict=True)], dim, cut))
    return wholes


def _reduce_scatter_bucket(
    xs: list[Tensor], axis: str, dims: Sequence[int], counts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """One reduce-scatter for several wholes; the inverse packing of `_all_gather_bucket`."""
    comm = communicator()
    n, index = comm.size(axis), comm.index(axis)
    cuts = _cuts(xs, dims, counts, sizes, n, whole=True)
    rows = torch.stack(
        [
            torch.cat(
                [
                    pad_to(take_shard(x, dim, cut, i), dim, max(_lengths(cut))).reshape(-1)
                    for x, dim, cut in zip(xs, dims, cuts, strict=True)
                ]
            )
            for i in range(n)
        ]
    )
    flat = comm.reduce_scatter(rows, axis)
    shards, start = [], 0
    for x, dim, cut in zip(xs, dims, cuts, strict=True):
        lengths = _lengths(cut)
        shape = list(x.shape)
        shape[dim] = max(lengths)
        size = torch.Size(shape).numel()
        shards.append(flat.narrow(0, start, size).view(shape).narrow(dim, 0, lengths[index]).clone())
        start += size
    return shards


_OPS = {
    # Several V -> R at once: parameters of one block. `counts[k]` of `sizes` belong to tensor k.
    "all_gather_bucket(Tensor[] xs, str axis, int[] dims, int[] counts, int[] sizes) -> Tensor[]": _all_gather_bucket,
    # Several P -> V at once: gradients of one block.
    "reduce_scatter_bucket(Tensor[] xs, str axis, int[] dims, int[] counts, int[] sizes) -> Tensor[]": _reduce_scatter_bucket,
    # P -> I / P -> R, and the backward of I -> R.
    "all_reduce(Tensor x, str axis, str op='sum') -> Tensor": _all_reduce,
    # A sum in two halves, with computation between them. What the first gives only the second may read.
    "start_all_reduce(Tensor x, str axis) -> Tensor": _start_all_reduce,
    "wait(Tensor started) -> Tensor": _wait,
    # V -> I / V -> R.
    "all_gather(Tensor x, str axis, int dim, int[] sizes) -> Tensor": _all_gather,
    # P -> V.
    "reduce_scatter(Tensor x, str axis, int dim, int[] sizes) -> Tensor": _reduce_scatter,
    # V -> V': whole again on gather_dim, sharded on split_dim.
    "all_to_all(Tensor x, str axis, int gather_dim, int[] gather_sizes, int split_dim, int[] split_sizes) -> Tensor": _all_to_all,
    # I -> V / R -> V: this rank's shard of a whole value. No traffic.
    "shard(Tensor x, str axis, int dim, int[] sizes) -> Tensor": _shard,
    # The backward of R -> V: the shard in its place among zeros. No traffic.
    "unshard(Tensor x, str axis, int dim, int[] sizes) -> Tensor": _unshard,
    # R -> P: the value on index 0, zeros elsewhere. No traffic.
    "keep_first(Tensor x, str axis) -> Tensor": _keep_first,
    # The global positions, int64 [local length], that this rank holds of a sharded dim.
    "shard_index(str axis, int[] sizes) -> Tensor": _shard_index,
}

Kernel = Callable[..., Any]

KERNELS: dict[str, Kernel] = {}
"""What computes each op of the project, on every device, by the op's name."""


def define_kernel(schema: str, kernel: Kernel) -> None:
    """Define the op of `schema`; the kernel's parameters have its names and defaults."""
    name = schema.split("(")[0]
    library.define(schema)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    KERNELS[name] = kernel


for _schema, _function in _OPS.items():
    define_kernel(_schema, _function)

ops = getattr(torch.ops, NAMESPACE)

COMMUNICATION = frozenset(
    {
        ops.all_reduce.default,
        ops.start_all_reduce.default,
        ops.all_gather.default,
        ops.reduce_scatter.default,
        ops.all_to_all.default,
        ops.all_gather_bucket.default,
        ops.reduce_scatter_bucket.default,
    }
)
"""The ops whose every rank of an axis must take part."""


def _fake_whole(x: Tensor, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    shape = list(x.shape)
    shape[dim] = sum(sizes) if len(sizes) else shape[dim] * communicator().size(axis)
    return x.new_empty(shape)


def _fake_shard(x: Tensor, axis: str, dim: int, sizes: Sequence[int]) -> Tensor:
    comm = communicator()
    sections = resolve_sections(sizes, comm.size(axis), whole=x.shape[dim])
    shape = list(x.shape)
    shape[dim] = _lengths(sections)[comm.index(axis)]
    return x.new_empty(shape)


def _fake_all_to_all(
    x: Tensor, axis: str, gather_dim: int, gather_sizes: Sequence[int], split_dim: int, split_sizes: Sequence[int]
) -> Tensor:
    return _fake_shard(_fake_whole(x, axis, gather_dim, gather_sizes), axis, split_dim, split_sizes)


def _fake_shard_index(axis: str, sizes: Sequence[int]) -> Tensor:
    comm = communicator()
    length = _lengths(unflatten_sections(sizes, comm.size(axis)))[comm.index(axis)]
    return torch.empty(length, dtype=torch.int64, device=comm.device)


def _fake_bucket(fake: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def run(xs: list[Tensor], axis: str, dims: Sequence[int], counts: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
        starts = [sum(counts[:k]) for k in range(len(counts))]
        return [fake(x, axis, d, sizes[s : s + c]) for x, d, s, c in zip(xs, dims, starts, counts, strict=True)]

    return run


_FAKES = {
    "all_gather_bucket": _fake_bucket(_fake_whole),
    "reduce_scatter_bucket": _fake_bucket(_fake_shard),
    "all_reduce": lambda x, axis, op="sum": x.new_empty(x.shape),
    "start_all_reduce": lambda x, axis: x.new_empty(x.shape),
    "wait": lambda started: started.new_empty(started.shape),
    "all_gather": _fake_whole,
    "reduce_scatter": _fake_shard,
    "all_to_all": _fake_all_to_all,
    "shard": _fake_shard,
    "unshard": _fake_whole,
    "keep_first": lambda x, axis: x.new_empty(x.shape),
    "shard_index": _fake_shard_index,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=library)
