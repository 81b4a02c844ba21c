"""What every communicator must do, run on each rank of the mesh (dp 2, tp 2): in lockstep and over processes."""

from __future__ import annotations

import torch

from shardwright.runtime.communicator import MeshCommunicator

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def value(rank: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Small integers, different on every rank: sums of them are exact in every dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 8, shape, generator=generator).to(dtype)


def total(xs: list[torch.Tensor]) -> torch.Tensor:
    if xs[0].dtype == torch.bool:
        return torch.stack(xs).any(0)
    return torch.stack(xs).sum(0, dtype=xs[0].dtype)


def check_all(c: MeshCommunicator) -> None:
    for axis in ("dp", "tp", "dp+tp"):
        for dtype in DTYPES:
            # A scalar, nothing at all, an odd size below the exchange's threshold, and one above it.
            for shape in ((), (0, 3), (5, 3), (301, 131)):
                check_collectives(c, axis, dtype, shape)
        for dtype in (torch.float32, torch.bfloat16):
            check_collectives(c, axis, dtype, (1201, 997))  # large enough for the backend's own reduction
    check_transfers(c)
    c.barrier()


def check_collectives(c: MeshCommunicator, axis: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    group = c.group(axis)
    n, i = len(group.ranks), group.index
    assert group.ranks[i] == c.rank
    xs = [value(r, dtype, *shape) for r in group.ranks]
    own = xs[i].clone()
    assert torch.equal(c.all_reduce(own, axis, "sum"), total(xs))
    if not dtype.is_complex:
        assert torch.equal(c.all_reduce(own, axis, "max"), torch.stack(xs).amax(0))
        assert torch.equal(c.all_reduce(own, axis, "min"), torch.stack(xs).amin(0))
    assert torch.equal(c.all_gather(own, axis), torch.stack(xs))
    assert torch.equal(c.broadcast(own, axis, n - 1), xs[-1])
    rows = [value(r, dtype, n, *shape) for r in group.ranks]
    assert torch.equal(c.reduce_scatter(rows[i], axis), total([row[i] for row in rows]))
    assert torch.equal(c.all_to_all(rows[i], axis), torch.stack([row[i] for row in rows]))
    assert torch.equal(own, xs[i]) and torch.equal(rows[i], value(c.rank, dtype, n, *shape)), "an operand was changed"
    assert torch.equal(c.reduce_(own.clone(), axis), total(xs))


def check_transfers(c: MeshCommunicator) -> None:
    """Every rank sends to every other before it receives, large ones too; then in the other order."""
    peers = [r for r in range(4) if r != c.rank]
    for dtype in DTYPES:
        for shape in ((), (3, 2), (400, 501)):
            for peer in peers:
                c.send(value(c.rank, dtype, *shape), peer)
                c.send(value(c.rank + 10, dtype, *shape).t() if len(shape) == 2 else value(c.rank + 10, dtype), peer)
            for peer in reversed(peers):
                assert torch.equal(c.receive(shape, dtype, peer), value(peer, dtype, *shape))
                second = value(peer + 10, dtype, *shape)
                second = second.t() if len(shape) == 2 else second
                assert torch.equal(c.receive(second.shape, dtype, peer), second)
            c.flush()
