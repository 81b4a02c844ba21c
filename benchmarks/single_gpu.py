"""The program of one rank on one GPU against the eager and the compiled model, bfloat16, interleaved.

    python -m benchmarks.single_gpu --json single.json

Says so and exits 0 where there is no CUDA.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ._models import Sizes, hf_llama
from ._report import MIB, print_table, write_json

DEFAULT = Sizes(width=1024, layers=12, heads=16, kv_heads=8, vocabulary=32000, length=1024, batch=8)
TOLERANCE = 0.05  # between losses, in nats

Batch = dict[str, Tensor]
Wrap = Callable[[nn.Module, Batch], nn.Module]


def eager(model: nn.Module, batch: Batch) -> nn.Module:
    return model


def compiled(model: nn.Module, batch: Batch) -> nn.Module:
    model.compile()
    return model


def shardwright(model: nn.Module, batch: Batch) -> nn.Module:
    from shardwright import auto_parallelize

    return auto_parallelize(model, example_inputs=batch)


CONTENDERS: dict[str, Wrap] = {
    "eager": eager,
    "torch.compile": compiled,
    "shardwright": shardwright,
}


def stepper(make: Wrap, sizes: Sizes, batch: Batch) -> Callable[[], Tensor]:
    """A function that trains one step and returns the loss."""
    model = make(hf_llama(sizes).to("cuda", torch.bfloat16), batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def timed(step: Callable[[], Tensor]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(make: Wrap, sizes: Sizes, batch: Batch) -> int:
    """Bytes: peak of the steps after the first, with nothing else on the GPU."""
    step = stepper(make, sizes, batch)
    step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    found = torch.cuda.max_memory_allocated()
    del step
    torch.cuda.empty_cache()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=getattr(DEFAULT, field.name))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("single_gpu: there is no CUDA device here; nothing was measured")
        return 0
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    torch.manual_seed(0)
    tokens = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.length), device="cuda")
    batch = {"input_ids": tokens, "labels": tokens.clone()}

    peaks = {name: peak(make, sizes, batch) for name, make in CONTENDERS.items()}
    steps = {name: stepper(make, sizes, batch) for name, make in CONTENDERS.items()}
    losses = {name: float(step()) for name, step in steps.items()}
    for _ in range(options.warmup - 1):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step))

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        [
            name,
            f"{1e3 * medians[name]:.2f} ms",
            f"{peaks[name] / MIB:.0f} MiB",
            f"{medians['shardwright'] / medians[name]:.3f}",
            f"{peaks['shardwright'] / peaks[name]:.3f}",
        ]
        for name in steps
    ]
    columns = ["contender", "median step", "peak memory", "time ratio", "memory ratio"]
    print_table(f"{torch.cuda.get_device_name()}, {sizes}, bfloat16; ratios: shardwright's to the contender's", columns, rows)
    write_json(options.json, {"sizes": asdict(sizes), "losses": losses, "seconds": seconds, "peak_bytes": peaks})
    if max(losses.values()) - min(losses.values()) > TOLERANCE:
        print(f"the contenders do not compute the same loss: {losses}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
