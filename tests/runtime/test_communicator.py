"""The communicator over real processes: four of them, with Gloo, started once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardwright.runtime.buckets import ScatterLayout, pack, unpack
from shardwright.runtime.communicator import axis_group
from shardwright.runtime.errors import ShardwrightError
from shardwright.runtime.program import Cut, Mesh
from shardwright.runtime.transports import reduce_rows

HERE = Path(__file__).parent

over_processes = pytest.mark.xdist_group("communicator over processes")  # all in one, which starts them


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of the four processes of `gloo_worker`."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "gloo_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(store)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    try:
        texts = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


@over_processes
def test_collectives_and_transfers(ranks: list[tuple[int, str, str]]) -> None:
    for _, out, err in ranks:
        assert "collectives are right" in out, err


@over_processes
def test_a_program_over_processes(ranks: list[tuple[int, str, str]]) -> None:
    for _, out, err in ranks:
        assert "the program is right" in out, err


@over_processes
def test_a_lost_peer(ranks: list[tuple[int, str, str]]) -> None:
    """The others name the collective, the axis, themselves and the reason, at once, and exit with an error."""
    assert ranks[3][0] == -signal.SIGKILL
    for rank, (status, out, err) in enumerate(ranks[:3]):
        assert status == 1, err
        plain = re.sub(r"^\[rank\d\]: ?", "", err, flags=re.MULTILINE)
        message = re.search(r"PeerLostError: (.*(?:\n  at .*)*)", plain)
        assert message is not None, err
        assert (
            f"rank {rank} (dp {rank // 2}, tp {rank % 2}) lost a peer in all_reduce over axis 'dp+tp' (ranks 0, 1, 2, 3)"
            in message[1]
        )
        assert ("rank 3: the test pulled the plug" in message[1]) == (rank > 0), "only these were given the store"
        assert "at run stage0.backward [2]" in message[1]
        seconds = re.search(r"reported after ([\d.]+) seconds", out)
        assert seconds is not None and float(seconds[1]) < 20
        assert "and again at once" in out


def test_axis_groups() -> None:
    mesh = Mesh(("pp", "dp", "tp"), (2, 2, 3))
    assert axis_group(mesh, 7, "tp").ranks == (6, 7, 8)
    assert axis_group(mesh, 7, "dp").ranks == (7, 10)
    assert axis_group(mesh, 7, "pp+tp").ranks == (0, 1, 2, 6, 7, 8)
    assert axis_group(mesh, 7, "pp+tp").index == 4
    assert axis_group(mesh, 7, "tp:0,1").ranks == (6, 7)
    with pytest.raises(ShardwrightError, match="is none of the indices that 'tp:0,2' joins"):
        axis_group(mesh, 7, "tp:0,2")
    with pytest.raises(ShardwrightError, match="'ep' is no axis of the mesh"):
        axis_group(mesh, 0, "ep")


def test_reduce_rows() -> None:
    rows = torch.tensor([[1, 5], [4, 2]])
    assert reduce_rows(rows, "sum").tolist() == [5, 7]
    assert reduce_rows(rows, "max").tolist() == [4, 5]
    assert reduce_rows(rows, "min").tolist() == [1, 2]
    assert reduce_rows(rows > 4, "sum").tolist() == [False, True]
    with pytest.raises(ValueError, match="unknown reduction 'avg'"):
        reduce_rows(rows, "avg")


def test_buckets() -> None:
    tensors = [torch.randn(3, 4).t(), torch.randn(()), torch.randn(0, 2)]
    again = unpack(pack(list(tensors)), [x.shape for x in tensors])
    assert all(torch.equal(a, b) for a, b in zip(again, tensors, strict=True))


@pytest.mark.parametrize("even", [True, False])
def test_scatter_buckets(even: bool) -> None:
    """Row i of the bucket holds index i's shards, whatever dims and sections they are cut by."""
    first = Cut("dp", 1, ((2, 2),)) if even else Cut("dp", 1, ((1, 0), (1, 2)))
    second = Cut("dp", 0, ((3, 3),)) if even else Cut("dp", 0, ((2, 4),))
    x, y = torch.arange(12.0).view(3, 4), torch.arange(12.0).view(6, 2) + 100
    layouts = [ScatterLayout((first, second), ((3, 4), (6, 2)), i, 2) for i in range(2)]
    bucket = layouts[0].pack([x, y])
    columns = [[0, 1], [2, 3]]  # uneven: 1 of the first section, then 1 of the second
    rows = [[0, 1, 2], [3, 4, 5]] if even else [[0, 1], [2, 3, 4, 5]]
    for i, layout in enumerate(layouts):
        a, b = layout.unpack(bucket[i])
        assert torch.equal(a, x[:, columns[i]]) and torch.equal(b, y[rows[i]])
