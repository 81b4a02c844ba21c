from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_engine import batch, on_ranks

from shardwright.runtime.errors import ABORT_KEY, MismatchError, PeerLostError, ShardwrightError
from shardwright.runtime.faults import (
    Agreement,
    Agreements,
    CallFacts,
    CommunicatorControl,
    Comparison,
    Flags,
    Superseded,
    abort_reason,
    batch_groups,
    checksum,
    from_first,
    gather_texts,
    install_abort_hook,
    together,
)
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.program import Mesh

MESH = Mesh(("dp", "tp"), (2, 2))


def with_control(fn: Callable[[CommunicatorControl, int], Any]) -> list[Any]:
    return run_ranks(4, lambda rank, world: fn(CommunicatorControl(world.communicator(MESH, rank)), rank))


def facts(x: torch.Tensor, structure: str = "f(x)") -> CallFacts:
    return CallFacts.of(structure, {"input.x": x})


def test_texts_of_any_length_travel() -> None:
    def run(rank: int, world: World) -> None:
        communicator = world.communicator(MESH, rank)
        text = "é" * (3 * rank)
        assert CommunicatorControl(communicator).exchange_text(text) == ["é" * (3 * r) for r in range(4)]
        assert gather_texts(communicator, "dp", text) == ["é" * (3 * r) for r in ((0, 2) if rank % 2 == 0 else (1, 3))]
        assert CommunicatorControl(communicator).start_exchange([rank, -(2**62)])() == [[r, -(2**62)] for r in range(4)]

    run_ranks(4, run)


def test_agreement_tells_every_rank_of_the_others() -> None:
    """Data ranks may have batches of different lengths; texts travel once for each new combination of shapes."""

    def run(control: CommunicatorControl, rank: int) -> list[Agreement]:
        texts = []
        original = control.exchange_text
        control.exchange_text = lambda text: texts.append(text) or original(text)  # type: ignore[method-assign]
        agreements = Agreements(control)
        found = []
        for step in range(4):
            x = torch.full((2 + rank // 2 + step % 2, 3), float(step))
            flags = Flags(True, True, stale=rank == 2 and step == 1, seed=10 * rank + step)
            found.append(agreements.agree(facts(x), flags, batch_groups(MESH)))
        assert len(texts) == 2
        return found

    results = with_control(run)
    assert all(found == results[0] for found in results)
    rows = [[shapes["input.x"][0][0] for shapes in agreed.shapes] for agreed in results[0]]
    assert rows == [[2, 2, 3, 3], [3, 3, 4, 4]] * 2
    assert [agreed.stale for agreed in results[0]] == [False, True, False, False]
    assert [agreed.seed for agreed in results[0]] == [0, 1, 2, 3]


def test_ranks_expect_what_was_agreed_on_the_last_time() -> None:
    """And find out where another rank does something else, which it alone knows at first."""

    def run(control: CommunicatorControl, rank: int) -> None:
        agreements = Agreements(control)
        groups = batch_groups(MESH)

        def begin(step: int, length: int = 2, stale: bool = False) -> Comparison:
            flags = Flags(True, True, stale=stale, seed=10 * rank + step)
            return agreements.begin(facts(torch.zeros(length, 3)), flags, groups)

        first = begin(0)
        assert first.expected is None
        agreed = first.confirm()
        unfinished = begin(0)
        assert unfinished.expected is None, "nothing says that there is a program for it"
        unfinished.confirm()
        agreements.went_well(first)
        same = begin(0, stale=True)
        assert same.expected == replace(agreed, stale=True)
        same.hold()
        longer = begin(0, 3 if rank >= 2 else 2)
        assert (longer.expected is None) == (rank >= 2)
        if rank < 2:
            with pytest.raises(Superseded):
                longer.hold()
        assert [shapes["input.x"][0][0] for shapes in longer.confirm().shapes] == [2, 2, 3, 3]
        agreements.went_well(longer)
        seeded = begin(1, 3 if rank >= 2 else 2, stale=rank == 1)
        assert seeded.expected == replace(longer.confirm(), stale=rank == 1, seed=0 if rank else 1)
        with pytest.raises(Superseded):
            seeded.hold()
        assert (seeded.confirm().seed, seeded.confirm().stale) == (1, True)

    with_control(run)


DIFFERENCES: dict[str, tuple[Callable[[int], tuple[CallFacts, Flags]], str]] = {
    "structure": (
        lambda rank: (facts(torch.zeros(2), "f(x, use_cache=True)" if rank == 1 else "f(x)"), Flags(True, True)),
        r"call the model differently.*\n  ranks 0, 2, 3: f\(x\)\n  rank 1: f\(x, use_cache=True\)",
    ),
    "mode": (
        lambda rank: (facts(torch.zeros(2)), Flags(rank != 3, rank != 3)),
        r"modes.*\n  ranks 0, 1, 2: training, with gradients, outside no_sync\(\)\n  rank 3: evaluation, without gradients",
    ),
    "no_sync": (
        lambda rank: (facts(torch.zeros(2)), Flags(True, True, synchronize=rank > 0)),
        r"rank 0: training, with gradients, inside no_sync\(\)",
    ),
    "shape": (
        lambda rank: (facts(torch.zeros(3 if rank == 3 else 2)), Flags(True, True)),
        r"ranks 2 and 3 share one batch.*input\.x is float32 \[2\] on rank 2 and float32 \[3\] on rank 3.*parallel\.data_rank",
    ),
    "missing": (
        lambda rank: (CallFacts("f(x)", {} if rank == 3 else {"input.x": ((2,), "int64")}), Flags(True, True)),
        r"ranks 2 and 3 .*input\.x is int64 \[2\] on rank 2 and missing on rank 3",
    ),
    "content": (
        lambda rank: (facts(torch.tensor([rank // 2, rank % 2])), Flags(True, True)),
        r"ranks 0 and 1 share one batch.*same shapes, other values",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_every_rank_refuses_what_differs(what: str) -> None:
    make, pattern = DIFFERENCES[what]

    def run(control: CommunicatorControl, rank: int) -> None:
        agreements = Agreements(control)
        well = agreements.begin(facts(torch.zeros(2)), Flags(True, True), batch_groups(MESH))
        well.confirm()
        agreements.went_well(well)
        own, flags = make(rank)
        comparison = agreements.begin(own, flags, batch_groups(MESH))
        with pytest.raises(Superseded):
            comparison.hold()
        for _ in range(2):
            with pytest.raises(MismatchError, match=f"(?s){pattern}"):
                comparison.confirm()

    with_control(run)


def test_a_difference_is_refused_again() -> None:
    def run(control: CommunicatorControl, rank: int) -> None:
        agreements = Agreements(control)
        for _ in range(2):
            with pytest.raises(MismatchError, match="different modes"):
                agreements.agree(facts(torch.zeros(2)), Flags(rank > 0, True), ())

    with_control(run)


def test_groups() -> None:
    assert batch_groups(MESH) == ((0, 1), (2, 3))
    assert batch_groups(MESH, shared=True) == ((0, 1, 2, 3),)
    mesh = Mesh(("pp", "dp_replicate", "dp_shard"), (2, 2, 2))
    assert batch_groups(mesh) == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_checksum() -> None:
    base = torch.randn(50, 2000)
    other = base.clone()
    other[0, 0] += 1
    assert checksum([base]) == checksum([base.clone()]) != checksum([other])
    assert checksum([base]) != checksum([base.roll(1, 1)])
    assert checksum([torch.tensor([1, 2])]) != checksum([torch.tensor([2, 1])])
    for x in (torch.tensor([float("nan"), 1.0]), torch.tensor([True]), torch.ones(2, dtype=torch.complex64), torch.zeros(0)):
        assert checksum([x]) == checksum([x.clone()])


def test_a_failure_of_one_is_an_error_of_all() -> None:
    def run(control: CommunicatorControl, rank: int) -> None:
        assert together(control, "nothing", lambda: rank) == rank

        def work() -> None:
            if rank == 2:
                raise KeyError("w")

        with pytest.raises(KeyError if rank == 2 else ShardwrightError) as error:
            together(control, "capturing the model", work)
        if rank != 2:
            assert "capturing the model failed on other ranks:\n  rank 2: KeyError: 'w'" in str(error.value)

    with_control(run)


def test_what_one_rank_does_for_all_may_take_long() -> None:
    def run(control: CommunicatorControl, rank: int) -> None:
        def work() -> str:
            assert rank == 0
            time.sleep(0.1)
            return "found"

        assert from_first(control, "looking", work, beat=0.02) == "found"
        assert control.exchange_text(str(rank)) == [str(r) for r in range(control.world_size)]

        def fail() -> str:
            raise KeyError("w")

        with pytest.raises(ShardwrightError if rank else KeyError) as error:
            from_first(control, "looking", fail)
        if rank:
            assert "looking failed on rank 0: KeyError: 'w'" in str(error.value)

    with_control(run)


def test_a_peer_lost_meanwhile_is_heard_of_at_once() -> None:
    class Lost:
        rank, world_size = 0, 2

        def exchange_text(self, text: str) -> list[str]:
            raise PeerLostError("gone")

        def exchange(self, header: list[int]) -> list[list[int]]:
            raise AssertionError

    start = time.monotonic()
    with pytest.raises(PeerLostError):
        from_first(Lost(), "looking", lambda: (time.sleep(5), "found")[1], beat=0.05)
    assert time.monotonic() - start < 4


def test_modules_refuse_different_batches() -> None:
    """Ranks of a tensor-parallel group share a batch."""

    def run(parallel: ParallelModule, rank: int) -> None:
        with pytest.raises(MismatchError, match="same shapes, other values"):
            parallel(batch("tensor", rank, rank))
        with pytest.raises(MismatchError, match=r"rank 0: \(1, \[\]\)\n  rank 1: \(0, \['x'\]\)"):
            parallel(*[batch("tensor", rank)] * (rank == 0), **{"x": batch("tensor", rank)} if rank else {})
        parallel.train_step(batch("tensor", rank))

    on_ranks("tensor", run)


def test_an_error_on_one_rank_ends_the_others() -> None:
    ended = []

    def run(parallel: ParallelModule, rank: int) -> None:
        if rank == 1:
            raise ValueError("the user's code")
        try:
            parallel.train_step(batch("data", rank))
        except PeerLostError as error:
            ended.append(str(error))
            raise

    with pytest.raises(ValueError, match="the user's code"):
        on_ranks("data", run)
    assert len(ended) == 3 and all("rank 1 stopped: ValueError: the user's code" in text for text in ended)


def test_last_words_are_those_of_the_first_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)  # pyright: ignore[reportPrivateImportUsage]
    seen: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: seen.append(args))
    assert abort_reason(store) == "" == abort_reason(None)
    previous = sys.excepthook
    remove = install_abort_hook(store, 2)
    for message in ("first\nline", "second"):
        try:
            raise ValueError(message)
        except ValueError as error:
            sys.excepthook(ValueError, error, error.__traceback__)
    reason = store.get(ABORT_KEY).decode()
    assert reason.startswith("rank 2: ValueError: first line at ") and "test_faults.py:" in reason
    assert abort_reason(store) == reason and len(seen) == 2
    remove()
    assert sys.excepthook is previous
