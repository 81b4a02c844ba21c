"""shardwright against DDP, FSDP2, DTensor tensor parallelism and torch.distributed.pipelining, side by side.

    python -m benchmarks.peers --json peers.json
    python -m benchmarks.peers --peers ddp,tp --rounds 40 --width 512

Each peer runs on the same model, mesh and batch as shardwright, in the same processes, in turn: peer, shardwright, peer,
shardwright, ... A step is forward, backward and optimizer step, between two barriers. Peak memory is measured in jobs of its
own, one for each contender: on the CPU, the growth of a process's resident memory over what it was before there was a model,
the largest of any rank; on CUDA, the largest `max_memory_allocated`, over the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ._contenders import PAIRINGS, Contender, Job, pairing
from ._models import Sizes
from ._report import MIB, peak_bytes, print_table, reset_peak, write_json

TOLERANCE = 1e-3  # between the losses of contenders, in nats; 0.05 in bfloat16
MEMORY_STEPS = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PAIRINGS))
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one job")
    parser.add_argument("--json", type=Path, help="write the results here too")
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the pairing, or pairing/contender for its memory
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def sizes_of(options: argparse.Namespace) -> Sizes:
    return Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})


# --- in each process of a torchrun job ---


def work(options: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    sizes = sizes_of(options)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.length), generator=generator).to(device)
    job = Job(sizes, tokens, device, getattr(torch, options.dtype))
    name, _, only = options.worker.partition("/")
    classes = pairing(name, dist.get_world_size(), sizes.microbatches)
    found = measure_memory(classes[only], job) if only else measure_time(classes, job, options.warmup, options.rounds)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # Gloo's teardown after DTensor's collectives aborts now and then ("terminate called without an active exception")


def measure_time(classes: Mapping[str, type[Contender]], job: Job, warmup: int, rounds: int) -> dict[str, Any]:
    """{"losses": contender -> loss of the first step, "seconds": contender -> seconds of each measured step}."""
    contenders: dict[str, Contender] = {}
    setup: dict[str, float] = {}
    for name, cls in classes.items():
        start = time.perf_counter()
        contenders[name] = cls(job)
        setup[name] = time.perf_counter() - start
    losses = {name: global_loss(contender, job) for name, contender in contenders.items()}
    for _ in range(warmup - 1):
        for contender in contenders.values():
            contender.step()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            meet(job)
            start = time.perf_counter()
            contender.step()
            meet(job)
            seconds[name].append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds, "setup": setup}


def measure_memory(cls: type[Contender], job: Job) -> float:
    """Bytes: the largest peak of any rank over the steps, less what the process held before there was a model."""
    base = 0 if job.device.type == "cuda" else resident()
    contender = cls(job)
    contender.step()  # the optimizer makes its state, caches fill
    reset_peak(job.device)
    for _ in range(MEMORY_STEPS):
        contender.step()
    peak = torch.tensor(float(peak_bytes(job.device) - base), device=job.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak.item()


def resident() -> int:
    """Bytes that this process holds now."""
    reset_peak(torch.device("cpu"))
    return peak_bytes(torch.device("cpu"))


def meet(job: Job) -> None:
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)
    dist.barrier()


def global_loss(contender: Contender, job: Job) -> float:
    """One step; its loss over the global batch, on every rank."""
    loss = contender.step()
    value = torch.zeros((), device=job.device) if loss is None else loss.float().clone()
    if contender.loss_place == "mean":
        dist.all_reduce(value)
        value /= dist.get_world_size()
    elif contender.loss_place == "last":
        dist.broadcast(value, dist.get_world_size() - 1)
    return value.item()


# --- in the process that starts them ---


def launch(options: argparse.Namespace, worker: str) -> Any:
    """Run a torchrun job of this file; what its rank 0 found. Raises RuntimeError with the end of its output if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
        command += ["-m", "benchmarks.peers", *sys.argv[1:], "--worker", worker, "--out", str(out)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.timeout)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{worker} took over {options.timeout:.0f} s") from error
        if done.returncode or not out.exists():
            raise RuntimeError(f"{worker} failed:\n{done.stderr[-6000:]}")
        return json.loads(out.read_text())


def compare(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Time and memory of one pairing: contender -> its figures."""
    classes = pairing(name, options.processes, options.microbatches)
    print(f"{name}: timing {', '.join(classes)}", flush=True)
    timed = launch(options, name)
    peaks = {}
    for contender in classes:
        print(f"{name}: memory of {contender}", flush=True)
        peaks[contender] = launch(options, f"{name}/{contender}")
    return {
        contender: {
            "median_seconds": statistics.median(timed["seconds"][contender]),
            "seconds": timed["seconds"][contender],
            "setup_seconds": timed["setup"][contender],
            "peak_bytes": peaks[contender],
            "first_loss": timed["losses"][contender],
        }
        for contender in classes
    }


def summarize(name: str, found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table: each contender, with shardwright's ratio to it."""
    ours = found["shardwright"]
    rows = []
    for contender, figures in found.items():
        quartiles = statistics.quantiles(figures["seconds"], n=4)
        ratios = [ours[key] / figures[key] if figures[key] > 0 else float("nan") for key in ("median_seconds", "peak_bytes")]
        shown = ["", ""] if contender == "shardwright" else [f"{ratio:.2f}" for ratio in ratios]
        median = f"{1e3 * figures['median_seconds']:.0f} ms"
        spread = f"{1e3 * quartiles[0]:.0f} to {1e3 * quartiles[-1]:.0f}"
        rows.append([f"{name}: {contender}", median, spread, f"{figures['peak_bytes'] / MIB:.0f} MiB", *shown])
    return rows


def main() -> int:
    options = parse()
    if options.worker:
        work(options)
        return 0
    results: dict[str, Any] = {}
    failed = []
    for name in options.peers.split(","):
        try:
            results[name] = compare(options, name)
        except RuntimeError as error:
            failed.append(name)
            print(error, file=sys.stderr)
    rows = [row for name, found in results.items() for row in summarize(name, found)]
    sizes = sizes_of(options)
    title = f"{options.processes} processes, {sizes}, {options.dtype}; ratios: shardwright's to the contender's"
    columns = ["contender", "median step", "quartiles", "peak memory", "time ratio", "memory ratio"]
    print_table(title, columns, rows)
    tolerance = TOLERANCE if options.dtype == "float32" else 0.05
    for name, found in results.items():
        losses = {contender: figures["first_loss"] for contender, figures in found.items()}
        if max(losses.values()) - min(losses.values()) > tolerance:
            failed.append(name)
            print(f"{name}: the contenders do not compute the same loss: {losses}", file=sys.stderr)
    settings = {"processes": options.processes, "dtype": options.dtype, "rounds": options.rounds, "sizes": asdict(sizes)}
    write_json(options.json, {"settings": settings, "pairings": results})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
