"""Time this machine: products, copies, and collectives where torch.distributed is initialized."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .topology import Device, Level, Topology

_PRODUCT_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
_LARGE_ENOUGH = 512
_MESSAGES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 25)


def measure(device: torch.device | str | None = None, seconds: float = 2.0) -> Topology:
    """A topology fitted to this machine in about `seconds`; collective over all ranks, and equal on them, where there are several.

    Ranks measure at the same time, so that what they share (cores, links) is counted at the share each gets.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world > 1:
        dist.barrier()
    found = _measure_device(where, seconds * (0.5 if world > 1 else 1.0), world)
    if world == 1:
        return Topology(found, (Level("one device", 1, found.bandwidth, 0.0),), sources={"all": "measured"})
    levels = _measure_levels(where, seconds * 0.5, world)
    topologies: list[Topology | None] = [Topology(found, levels, sources={"all": "measured"})]
    dist.broadcast_object_list(topologies, src=0)
    assert topologies[0] is not None
    return topologies[0]


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """(seconds at size 0, seconds per unit), neither negative, least squares of the relative error."""
    x, t = np.asarray(sizes, dtype=float), np.asarray(times, dtype=float)
    (start, slope), *_ = np.linalg.lstsq(np.stack([1 / t, x / t], 1), np.ones_like(t), rcond=None)
    if slope <= 0:
        return float(t.min()), float(t[-1] / x[-1])
    if start < 0:
        return 0.0, float((x / t).sum() / ((x / t) ** 2).sum())
    return float(start), float(slope)


def _time(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Seconds of one call: at least five calls, about `budget` seconds in all. The median, but on a CPU the mean: ranks that share
    cores take turns of some milliseconds, of which the median call of some microseconds knows nothing."""
    found = []
    alone = device.type == "cuda"
    work()
    deadline = time.perf_counter() + budget
    while len(found) < 5 or (time.perf_counter() < deadline and not (alone and len(found) >= 50)):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return float(np.median(found) if alone else np.mean(found))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_device(device: torch.device, seconds: float, world: int) -> Device:
    flops: dict[str, float] = {}
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    share = seconds / (len(dtypes) + 2)
    for dtype in dtypes:
        work, times = [], []
        for n in _PRODUCT_SIZES:
            a = torch.ones(n, n, dtype=dtype, device=device)
            times.append(_time(lambda a=a: a @ a, device, share / 12))
            work.append(2.0 * n**3)
            if n >= _LARGE_ENOUGH and times[-1] > share / 12:
                break
        flops[str(dtype).removeprefix("torch.")] = 1 / fit_line(work, times)[1]
    one = torch.ones(1, device=device)
    x = torch.ones(1 << (28 if device.type == "cuda" else 24), dtype=torch.uint8, device=device)
    copy = _time(lambda: x.clone(), device, share / 4)
    q = torch.ones(1, 8, 512, 64, dtype=dtypes[-1], device=device)
    attention = _time(lambda: F.scaled_dot_product_attention(q, q, q), device, share / 4)
    peak = flops[str(dtypes[-1]).removeprefix("torch.")]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, float(properties.total_memory)
    else:
        name, memory = (
            "cpu",
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        )
    return Device(
        name,
        flops,
        memory,
        bandwidth=2 * x.numel() / copy,
        attention_efficiency=min(1.0, 4 * q.numel() * q.shape[2] / attention / peak),
        launch=_time(lambda: one + one, device, share / 4),
    )


def _measure_levels(device: torch.device, seconds: float, world: int) -> tuple[Level, ...]:
    """One level for a node, and one for all nodes where there are several."""
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if not 1 < inside < world or world % inside:
        return (_level("node" if inside == world else "network", world, None, device, seconds),)
    groups = [dist.new_group(list(range(start, start + inside))) for start in range(0, world, inside)]
    mine = groups[dist.get_rank() // inside]
    node = _level("node", inside, mine if isinstance(mine, dist.ProcessGroup) else None, device, seconds / 2)
    across = _level("network", world, None, device, seconds / 2)
    # A ring over all ranks leaves a node once for all of its members: see topology.collective_seconds.
    outer = Level("network", world, min(across.bandwidth / inside, node.bandwidth), max(across.latency, node.latency))
    return (node, outer)


def _level(name: str, n: int, group: dist.ProcessGroup | None, device: torch.device, seconds: float) -> Level:
    """Fit latency and bandwidth of one hop to all-reduces, by the formula of topology.collective_seconds."""
    times = []
    for size in _MESSAGES:
        x = torch.zeros(size // 4, device=device)

        def work(x: torch.Tensor = x) -> None:
            dist.all_reduce(x, group=group)

        repeats = 5
        work()
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        times.append((time.perf_counter() - start) / repeats)
        longest = torch.tensor([times[-1]], device=device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        times[-1] = float(longest)
        if times[-1] * repeats > seconds / 2:
            break
    start, slope = fit_line(_MESSAGES[: len(times)], times)
    hops = min(n - 1, int(np.ceil(np.log2(n))))
    return Level(name, n, 2 * (n - 1) / n / slope, start / (2 * hops))
