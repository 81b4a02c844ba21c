"""The examples run as a user would run them, with fewer steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

from stdlib_text import StdlibText  # noqa: E402  # pyright: ignore[reportMissingImports]


def torchrun(processes: int, *command: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=timeout)


def test_text_is_the_same_every_time() -> None:
    first, second = StdlibText(64, megabytes=0.1), StdlibText(64, megabytes=0.1)
    assert len(first) == len(second) == int(0.1 * 2**20) // 64
    sample = first[7]
    assert torch.equal(sample["input_ids"], second[7]["input_ids"])
    assert torch.equal(sample["input_ids"], sample["labels"])
    assert sample["input_ids"].data_ptr() != sample["labels"].data_ptr()
    assert sample["input_ids"].dtype == torch.int64 and int(sample["input_ids"].max()) < 256


def test_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    text = StdlibText(16, megabytes=0.01)

    def first_batch(rank: int, ranks: int) -> set[tuple[int, ...]]:
        loader = DataLoader(text, batch_size=16 // ranks, sampler=DistributedSampler(text, ranks, rank, seed=0))
        return {tuple(row) for row in next(iter(loader))["input_ids"].tolist()}

    whole = first_batch(0, 1)
    assert len(whole) > 1
    assert whole == set().union(*(first_batch(rank, 4) for rank in range(4)))


def test_demo_trains_and_compares(tmp_path: Path) -> None:
    """With a few steps: the difference must hold; the loss has not fallen enough yet, which its exit status says."""
    done = torchrun(2, str(EXAMPLES / "demo.py"), "--steps", "3", "--output", str(tmp_path))
    assert "largest difference over 3 steps" in done.stdout, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("largest difference"))
    assert float(line.split("steps")[1].split()[0]) < 1e-4
    fall = next(line for line in done.stdout.splitlines() if line.startswith("the loss fell"))
    assert (float(fall.split()[4]) >= 1.5) == (done.returncode == 0)
    assert done.stdout.count("Plan ") == 1  # rank 0 alone prints
    for rank in range(2):
        assert (tmp_path / f"rank_{rank}" / "forward.py").is_file()


def test_train(tmp_path: Path) -> None:
    done = torchrun(2, str(EXAMPLES / "train.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


def test_strategies_plan_or_say_why_not() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / "strategies.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("=== ") == 8
    assert done.stdout.count("refused: ") == 1
    assert "tp=3 does not divide the 8 ranks" in done.stdout
