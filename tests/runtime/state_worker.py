"""One of four processes that `test_state` starts: state dicts as DTensors, checkpoints, agreement, and last words.

    python state_worker.py RANK FOLDER

Rank 2 ends with an exception of the user's, while the others wait for it.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from state_cases import MESHES, Tied, make, moved
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from shardwright.runtime.communicator import ProcessGroupCommunicator
from shardwright.runtime.errors import MismatchError
from shardwright.runtime.faults import Agreements, CallFacts, Flags, GlooControl, install_abort_hook
from shardwright.runtime.state import load_state_dict, state_dict


def check_state(name: str, rank: int, folder: str) -> None:
    communicator = ProcessGroupCommunicator(MESHES[name], rank, "cpu", timeout=60)
    expected = moved(Tied()).state_dict()
    source, target = make(name, communicator, moved(Tied())), make(name, communicator)
    sharded = state_dict(source, Tied(), full=False, rank0_only=True, cpu_offload=False)
    for key, value in sharded.items():
        assert isinstance(value, DTensor) and torch.equal(value.full_tensor(), expected[key]), key
    save(sharded, checkpoint_id=f"{folder}/{name}")
    empty = state_dict(target, Tied(), full=False, rank0_only=True, cpu_offload=False)
    load(empty, checkpoint_id=f"{folder}/{name}")
    load_state_dict(target, Tied(), empty, strict=True)
    found = state_dict(target, Tied(), full=True, rank0_only=False, cpu_offload=True)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    print(f"{name} is right", flush=True)


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    install_abort_hook(store, rank)
    for name in MESHES:
        check_state(name, rank, folder)

    control = GlooControl(60, store)
    agreements = Agreements(control)
    facts = CallFacts.of("f(x)", {"input.x": torch.zeros(2 + rank, 3)}, with_content=False)
    agreed = agreements.agree(facts, Flags(True, True, stale=rank == 1, seed=rank + 5), [(0,), (1,)])
    assert [shapes["input.x"][0][0] for shapes in agreed.shapes] == [2, 3, 4, 5] and agreed.stale and agreed.seed == 5
    try:
        agreements.agree(CallFacts("f(x, y)" if rank == 3 else "f(x)", {}), Flags(True, True), [])
    except MismatchError as error:
        assert "ranks 0, 1, 2: f(x)" in str(error) and "rank 3: f(x, y)" in str(error)
        print("ranks that differ are named", flush=True)

    if rank == 2:
        raise ValueError("the user's code\nfailed")
    agreements.agree(CallFacts("f(x)", {}), Flags(True, True), [])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
