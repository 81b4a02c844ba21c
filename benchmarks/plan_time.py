"""How long planning takes, from a model on the meta device to the emitted program of one rank, and how much memory.

python -m benchmarks.plan_time --model llama3-8b --devices 64
python -m benchmarks.plan_time --model llama3-405b --devices 16384 --json plan.json
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ._models import PUBLISHED, meta_llama
from ._report import GIB, MIB, peak_rss, print_table, write_json

PHASES = (
    # What is timed within `plan`: the phase, the module that calls it, and the name that it calls there.
    ("capture (torch.export)", "shardwright.compiler.bind", "capture"),
    ("normalize", "shardwright.compiler.bind", "prepare"),
    ("choose the plan", "shardwright.compiler.api", "choose"),
)


class Stopwatch:
    """Seconds spent in functions, in all their calls."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def follow(self, phase: str, module_name: str, name: str) -> None:
        """Time the function that `module_name` knows as `name`."""
        module = import_module(module_name)
        function = getattr(module, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        setattr(module, name, timed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PUBLISHED), default="llama3-8b")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--topology", default="h100")
    parser.add_argument("--batch", type=int, default=1, help="samples of a data rank")
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--strategy", default="auto", help="auto, or pins: tp=8,zero=3")
    parser.add_argument("--memory", type=float, help="GiB that a rank may take; left out, most of the device's")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    begin = time.perf_counter()
    from shardwright import Topology, emit, plan
    from shardwright.cli import parse_strategy
    from shardwright.compiler.memory import program_memory

    watch = Stopwatch()
    for phase in PHASES:
        watch.follow(*phase)
    imported = time.perf_counter()
    model = meta_llama(options.model)
    batch = {k: torch.empty(options.batch, options.seq, dtype=torch.int64, device="meta") for k in ("input_ids", "labels")}
    topology = Topology.preset(options.topology, devices=options.devices)
    start = time.perf_counter()
    limit = None if options.memory is None else options.memory * GIB
    planned = plan(model, topology, example_inputs=batch, strategy=parse_strategy(options.strategy), memory_limit=limit)
    planned_at = time.perf_counter()
    program = emit(planned, options.rank)
    end = time.perf_counter()

    print(planned.explain())
    seconds = {
        "import shardwright (before the clock)": imported - begin,
        "build the meta model (before the clock)": start - imported,
        **{f"plan: {phase}": spent for phase, spent in watch.seconds.items()},
        "plan: all else": planned_at - start - sum(watch.seconds.values()),
        "emit one rank": end - planned_at,
        "total": end - start,
        "processor time of all of it": time.process_time(),
    }
    title = f"{options.model} on {options.devices} {options.topology}, {options.batch} x {options.seq} tokens a data rank"
    print_table(title, ["phase", "seconds"], [[name, f"{value:.2f}"] for name, value in seconds.items()])
    predicted, counted = planned.plan.predicted, program_memory(program)
    if predicted is not None:
        print(f"memory of a rank: {predicted.peak_bytes / GIB:.1f} GiB predicted by the plan; the program takes {counted}")
    nodes = {name: len(spec.graph.graph.nodes) for name, spec in program.graphs.items()}
    print(f"peak resident memory {peak_rss() / MIB:.0f} MiB; graphs of rank {options.rank}: {nodes}")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_json(options.json, {"settings": settings, "seconds": seconds, "peak_rss_bytes": peak_rss(), "nodes": nodes})
    return 0


if __name__ == "__main__":
    sys.exit(main())
