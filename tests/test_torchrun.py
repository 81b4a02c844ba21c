"""Under real torchrun, four processes and Gloo, started once: training equals the eager model, and a lost peer is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from torchrun_cases import CASES, FEATURES

HERE = Path(__file__).parent

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("torchrun")]  # the first test waits for the one job


@dataclass(frozen=True)
class Job:
    """How a torchrun job ended: its exit status, what it printed, what went wrong in each case, each rank's last words."""

    status: int
    output: str
    results: dict[str, str]
    ends: dict[int, str]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("torchrun")
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    result = subprocess.run(
        [*launcher, str(HERE / "torchrun_worker.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=580
    )
    file = folder / "results.json"
    assert file.exists(), f"torchrun ended with {result.returncode}:\n{result.stderr[-8000:]}"
    ends = {rank: path.read_text() for rank in range(4) if (path := folder / f"end.{rank}").exists()}
    return Job(result.returncode, result.stderr, json.loads(file.read_text()), ends)


@pytest.mark.parametrize("case", [*CASES, *FEATURES])
def test_trains_as_the_eager_model(job: Job, case: str) -> None:
    assert job.results[case] == ""


def test_a_peer_that_dies_in_a_step(job: Job) -> None:
    """The others name the collective and its axis, at once, and the job fails."""
    assert job.status != 0 and set(job.ends) == {0, 1, 3}
    for rank, text in job.ends.items():
        assert text.startswith("PeerLostError"), text
        assert f"rank {rank} (" in text and "lost a peer in " in text and "over axis '" in text
    assert "in all_reduce over axis 'tp' (ranks 2, 3)" in job.ends[3]
