"""Train an unmodified Hugging Face Llama on all ranks of a torchrun job, and check it against one process.

    make demo
    torchrun --standalone --nproc-per-node 4 examples/demo.py --steps 100

Exits 1 if the loss fell by less than 1.5 nats, or differed at any step by more than 1e-3 from that of one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from stdlib_text import StdlibText
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright import auto_parallelize

LENGTH = 64  # bytes of a sample
BATCH = 16  # samples of a step, on all ranks together
LARGEST_DIFFERENCE = 1e-3  # nats
SMALLEST_FALL = 1.5  # nats

Loader = DataLoader[dict[str, Tensor]]


def build_model() -> nn.Module:
    """About 10 M parameters; its vocabulary is the 256 bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def make_loader(text: StdlibText, batch: int, rank: int = 0, world_size: int = 1) -> Loader:
    """`batch` samples a step for each of `world_size` ranks: together the same samples, however many the ranks."""
    sampler = DistributedSampler(text, world_size, rank, seed=0)
    return DataLoader(text, batch_size=batch, sampler=sampler, drop_last=True)


def train(model: nn.Module, loader: Loader, device: torch.device, steps: int, clip: Callable[[float], Tensor]) -> Iterator[float]:
    """An ordinary training loop: the parallel model and the plain one run the same. Yields the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for batch in islice(loader, steps):
        loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
        loss.backward()
        clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def follow(losses: Iterator[float], steps: int, samples: int, predicted: float | None, console: Console) -> list[float]:
    """Show a progress bar while the training goes on. predicted: seconds a step."""
    facts = "loss {task.fields[loss]:.3f}, {task.fields[rate]:,.0f} tokens/s, {task.fields[seconds]:.3f} s a step"
    if predicted is not None:
        facts += f" (predicted {predicted:.3f})"
    columns = (BarColumn(12), MofNCompleteColumn(), TextColumn(facts))
    found: list[float] = []
    times: list[float] = []
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"), rate=0.0, seconds=0.0)
        start = time.perf_counter()
        for loss in losses:
            found.append(loss)
            times.append(time.perf_counter() - start)
            start += times[-1]
            seconds = statistics.median(times[-20:])
            progress.update(task, advance=1, loss=loss, rate=samples * LENGTH / seconds, seconds=seconds)
            if len(found) % 20 == 0 and not console.is_terminal:
                console.print(f"step {len(found):4}: " + facts.format(task=progress.tasks[0]), highlight=False)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a Llama in parallel and compare it with one process.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the emitted programs go")
    steps, output = (options := parser.parse_args()).steps, options.output
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    console = Console(quiet=rank != 0)

    text = StdlibText(LENGTH)
    example = next(iter(make_loader(text, max(1, BATCH // ranks))))
    start = time.perf_counter()
    parallel = auto_parallelize(build_model(), example_inputs=example)
    console.print(parallel.plan.explain(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"planned and emitted in {time.perf_counter() - start:.1f} s")

    parallel.program.save(output)
    console.print(f"what will run: {output}/rank_*/*.py; on its own: torchrun --nproc-per-node {ranks} {output}/run.py\n")

    share = max(1, BATCH // parallel.data_world_size)
    samples = share * parallel.data_world_size
    loader = make_loader(text, share, parallel.data_rank, parallel.data_world_size)
    predicted = parallel.plan.predicted
    losses = train(parallel, loader, parallel.device, steps, parallel.clip_grad_norm_)
    ours = follow(losses, steps, samples, predicted.step_seconds if predicted else None, console)
    device = parallel.device
    del parallel, losses
    dist.destroy_process_group()
    if rank != 0:
        return 0

    console.print("\nthe same steps in one process, without shardwright")
    torch.set_num_threads(os.cpu_count() or 1)
    model = build_model().to(device)
    clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()))
    losses = train(model, make_loader(text, samples), device, steps, clip)
    plain = follow(losses, steps, samples, None, console)
    return report(ours, plain, ranks, console)


def report(ours: list[float], plain: list[float], ranks: int, console: Console) -> int:
    """Print both losses; the exit status."""
    difference = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    fall = ours[0] - ours[-1]
    console.print(f"\nfinal loss   {ours[-1]:.6f} on {ranks} ranks, {plain[-1]:.6f} in one process")
    console.print(f"largest difference over {len(ours)} steps   {difference:.2e} (at most {LARGEST_DIFFERENCE:.0e})")
    console.print(f"the loss fell by {fall:.2f} nats (at least {SMALLEST_FALL})")
    return 0 if difference <= LARGEST_DIFFERENCE and fall >= SMALLEST_FALL else 1


if __name__ == "__main__":
    sys.exit(main())
