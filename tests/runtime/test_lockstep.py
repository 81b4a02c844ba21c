"""Ranks in lockstep: right results, and what cannot complete reported at once with every rank's position."""

from __future__ import annotations

import time

import pytest
import torch
from hand_built import tensor_parallel, weights

from shardwright.passes.ops.collectives import communicator, use_communicator
from shardwright.runtime.errors import DeadlockError, MismatchError, PeerLostError, ShardwrightError
from shardwright.runtime.executor import Executor
from shardwright.runtime.lockstep import LockstepCommunicator, World, run_ranks
from shardwright.runtime.program import Mesh

MESH = Mesh(("dp", "tp"), (2, 2))


def on_mesh(fn):
    """`fn(communicator)` on every rank of MESH."""
    return run_ranks(4, lambda rank, world: fn(world.communicator(MESH, rank)))


def test_collectives() -> None:
    from communicator_checks import check_all

    run_ranks(4, lambda rank, world: check_all(world.communicator(MESH, rank)))


def test_reductions_are_made_in_float64() -> None:
    def body(c: LockstepCommunicator) -> torch.Tensor:
        return c.all_reduce(torch.tensor([1.0, 1e8, -1e8, 1.0][c.rank]), "dp+tp")

    assert [float(x) for x in on_mesh(body)] == [2.0] * 4


def test_a_missing_collective_is_reported_at_once_with_every_position() -> None:
    def body(c: LockstepCommunicator) -> None:
        c.position = f"step of rank {c.rank}"
        if c.rank != 3:
            c.all_reduce(torch.zeros(2, 3), "tp")
        if c.rank == 0:
            c.receive((4,), torch.float32, 1)

    start = time.monotonic()
    with pytest.raises(DeadlockError) as caught:
        on_mesh(body)
    assert time.monotonic() - start < 5
    text = str(caught.value)
    assert "rank 0 (dp 0, tp 0) waits in receive from rank 1: float32 [4], at step of rank 0" in text
    assert "rank 1 (dp 0, tp 1) has ended" in text
    assert "rank 2 (dp 1, tp 0) waits in all_reduce (sum) of float32 [2, 3] over axis 'tp', at step of rank 2" in text
    assert "rank 3 (dp 1, tp 1) has ended" in text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda c: c.all_reduce(torch.zeros(2), "tp"), lambda c: c.all_gather(torch.zeros(2), "tp")),
        (lambda c: c.all_reduce(torch.zeros(2), "tp"), lambda c: c.all_reduce(torch.zeros(3), "tp")),
        (lambda c: c.all_reduce(torch.zeros(2), "tp"), lambda c: c.all_reduce(torch.zeros(2).double(), "tp")),
        (lambda c: c.all_reduce(torch.zeros(2), "tp", "max"), lambda c: c.all_reduce(torch.zeros(2), "tp", "sum")),
        (lambda c: c.send(torch.zeros(2), c.rank + 1), lambda c: c.receive((3,), torch.float32, c.rank - 1)),
    ],
)
def test_ranks_that_do_not_match(first, second) -> None:
    with pytest.raises(MismatchError):
        on_mesh(lambda c: first(c) if c.index("tp") == 0 else second(c))


def test_groups_joined_in_different_orders() -> None:
    def body(c: LockstepCommunicator) -> None:
        for axis in ("dp", "tp") if c.rank in (0, 3) else ("tp", "dp"):
            c.all_reduce(torch.zeros(1), axis)

    with pytest.raises(DeadlockError):
        on_mesh(body)


def test_an_exception_stops_the_others_and_is_raised_with_its_rank() -> None:
    seen = {}

    def body(rank: int, world: World) -> None:
        c = world.communicator(MESH, rank)
        if rank == 2:
            raise KeyError("mine")
        try:
            c.barrier()
        except PeerLostError as error:
            seen[rank] = str(error)
            raise

    with pytest.raises(KeyError, match="mine") as caught:
        run_ranks(4, body)
    assert caught.value.__notes__ == ["raised on rank 2 of 4"]
    assert set(seen) == {0, 1, 3} and all("rank 2 stopped: KeyError: 'mine'" in text for text in seen.values())


def test_messages_arrive_in_order_and_must_be_received() -> None:
    def body(c: LockstepCommunicator, take: int) -> list[float]:
        if c.rank == 0:
            for value in (1.0, 2.0):
                x = torch.tensor(value)
                c.send(x, 3)
                x.zero_()  # the message is a copy
            return []
        return [float(c.receive((), torch.float32, 0)) for _ in range(take)] if c.rank == 3 else []

    assert on_mesh(lambda c: body(c, 2))[3] == [1.0, 2.0]
    with pytest.raises(MismatchError, match="1 from rank 0 to rank 3"):
        on_mesh(lambda c: body(c, 1))

    def flushing(c: LockstepCommunicator) -> None:
        body(c, 1)
        c.flush()

    with pytest.raises(DeadlockError, match="waits in flush: what it sent to rank 3 has not been received"):
        on_mesh(flushing)


def test_a_rank_that_does_not_come_to_an_end() -> None:
    def body(rank: int, world: World) -> None:
        c = world.communicator(MESH, rank)
        if rank == 1:
            time.sleep(3)
        c.barrier()

    with pytest.raises(DeadlockError, match="after 0.5 seconds(.|\n)*rank 1 .* is running"):
        run_ranks(4, body, timeout=0.5)


def test_ranks_have_their_own_context_and_grad_mode() -> None:
    def body(c: LockstepCommunicator) -> tuple[int, bool]:
        with use_communicator(c), torch.set_grad_enabled(c.rank % 2 == 0):
            c.barrier()
            return communicator().index("tp"), torch.is_grad_enabled()

    assert on_mesh(body) == [(0, True), (1, False), (0, True), (1, False)]


def test_a_deadlock_names_the_node_of_the_graph() -> None:
    w1, w2, x = weights()

    def body(rank: int, world: World) -> None:
        program = tensor_parallel(rank)
        working = {"param.w1": w1.chunk(2, 1)[rank], "param.w2": w2.chunk(2, 0)[rank]}
        executor = Executor(program, world.communicator(program.mesh, rank), "cpu")
        if rank == 0:
            executor.run(working, {"input.x": x}, 0)

    with pytest.raises(
        DeadlockError, match=r"rank 0 .*at run forward \[0\], graph forward: all_reduce_default = shardwright.all_reduce"
    ):
        run_ranks(2, body)


def test_axes() -> None:
    def body(c: LockstepCommunicator) -> None:
        assert (c.size("dp"), c.size("tp"), c.size("dp+tp"), c.index("dp+tp")) == (2, 2, 4, c.rank)
        assert (c.size("mb"), c.index("mb")) == (1, 0)
        c.microbatch = (2, 5)
        assert (c.size("mb"), c.index("mb")) == (5, 2)
        for wrong in ("cp", "tp+dp", "dp+dp"):
            with pytest.raises(ShardwrightError, match="is no axis of the mesh"):
                c.size(wrong)

    on_mesh(body)
