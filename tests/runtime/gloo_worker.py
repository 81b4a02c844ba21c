"""One of four processes that `test_communicator` starts: all that needs real processes, in a single start.

    python gloo_worker.py RANK STORE_FILE

Rank 3 kills itself in the middle of the last collective; the others are to end with PeerLostError.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from communicator_checks import check_all
from test_executor import check_zero, zero_body

from shardwright.runtime.communicator import ProcessGroupCommunicator
from shardwright.runtime.errors import ABORT_KEY, PeerLostError
from shardwright.runtime.program import Mesh


def main(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(path, 4)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    communicator = ProcessGroupCommunicator(Mesh(("dp", "tp"), (2, 2)), rank, "cpu", timeout=60, store=store if rank else None)
    check_all(communicator)
    print("collectives are right", flush=True)

    result = zero_body(rank, ProcessGroupCommunicator(Mesh(("dp_replicate", "dp_shard"), (2, 2)), rank, "cpu", timeout=60))
    results: list = [None] * 4
    dist.all_gather_object(results, result)
    check_zero(results)
    print("the program is right", flush=True)

    communicator.position = "run stage0.backward [2]"
    x = torch.zeros(1_000_000)
    for step in range(1000):
        if rank == 3 and step == 3:
            store.set(ABORT_KEY, "rank 3: the test pulled the plug")
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            communicator.all_reduce(x, "dp+tp")
        except PeerLostError:
            print(f"reported after {time.monotonic() - start:.1f} seconds", flush=True)
            try:
                communicator.all_gather(x, "tp")
            except PeerLostError:
                print("and again at once", flush=True)
            raise


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
