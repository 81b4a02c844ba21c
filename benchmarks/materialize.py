"""The most memory that a rank holds while a model on the meta device becomes its shards, as a share of the whole model.

    python -m benchmarks.materialize --json materialize.json

Each strategy and source in a torchrun job of its own: a Llama of about 300 M parameters, four processes. Counted is the anonymous
memory of each process (mapped files are the page cache's), from before `auto_parallelize` to its return: capture, planning and
emission included. The goal is below 60 % on every rank of 4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwright import Strategy, auto_parallelize

from ._models import Sizes, hf_llama
from ._report import MIB, print_table, write_json

GOAL = 0.6
STRATEGIES = {
    "zero=3": Strategy(dp=4, zero=3),
    "tp=4": Strategy(tp=4),
    "pp=4": Strategy(pp=4),
    "dp=2, tp=2, zero=3": Strategy(dp=2, tp=2, zero=3),
}
SOURCES = ("initialization", "safetensors")
SIZES = Sizes(width=1024, layers=20, heads=8, kv_heads=8, vocabulary=16384, length=32, batch=4)


class AnonymousPeak:
    """The most anonymous memory of this process while the `with` block ran, beyond what it had before. Linux."""

    def __enter__(self) -> AnonymousPeak:
        self.before = self.peak = self._now()
        self._going = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._going = False
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.before

    def _watch(self) -> None:
        while self._going:
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def work(options: argparse.Namespace) -> None:
    """In each process of a job."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = hf_llama(SIZES)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    name, source = options.worker.split("/")
    tokens = torch.zeros(SIZES.batch, SIZES.length, dtype=torch.int64)
    example = {"input_ids": tokens, "labels": tokens.clone()}
    with AnonymousPeak() as measured:
        parallel = auto_parallelize(
            model,
            example_inputs=example,
            strategy=STRATEGIES[name],
            batch="global",
            state=options.weights if source == "safetensors" else None,
        )
    held = sum(p.numel() * p.element_size() for p in (getattr(x, "to_local", lambda x=x: x)() for x in parallel.parameters()))
    found = torch.tensor([measured.growth, held])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps({"whole": whole, "peak": found[0].item(), "shards": found[1].item()}))
    dist.barrier()


def write_weights(folder: Path) -> Path:
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in hf_llama(SIZES).state_dict().items()}, path)
    return path


def launch(worker: str, weights: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        command += ["-m", "benchmarks.materialize", "--worker", worker, "--weights", str(weights), "--out", str(out)]
        done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True, timeout=900)
        if done.returncode or not out.exists():
            raise RuntimeError(f"{worker} failed:\n{done.stderr[-6000:]}")
        return json.loads(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = write_weights(Path(folder))
        for name in STRATEGIES:
            for source in SOURCES:
                print(f"{name}, from {source}", flush=True)
                results[f"{name}/{source}"] = launch(f"{name}/{source}", weights)
    rows = []
    for key, found in results.items():
        name, source = key.split("/")
        shares = [f"{found[part] / found['whole']:.0%}" for part in ("shards", "peak")]
        rows.append([f"{name}, from {source}", f"{found['whole'] / MIB:.0f} MiB", *shares])
    print_table("of the largest rank of 4", ["strategy and source", "whole model", "its shards", "its peak"], rows)
    write_json(options.json, {"materialize": results})
    return int(any(found["peak"] > GOAL * found["whole"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
