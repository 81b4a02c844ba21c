"""Cut a model into pipeline stages of equal time: a sequence of segments, and the parameters of a graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median

import numpy as np
from torch import fx

from ..passes.graph_tools import is_getitem, metas, op_call, op_calls
from .cost import op_flops, size_of
from .stream import stream_bytes


def cut_stages(costs: Sequence[float], crossing_bytes: Sequence[float], n: int, seconds_per_byte: float = 0.0) -> tuple[int, ...]:
    """Cut a sequence of segments into n contiguous, non-empty stages so that the slowest stage is as fast as can be.

    costs             seconds of each segment for one micro-batch
    crossing_bytes    bytes that pass from segment i to segment i + 1; one fewer than costs
    seconds_per_byte  of a transfer, counted for both stages it joins

    Returns the n - 1 indices where the stages after the first begin. Exact, by dynamic programming over (stages, end); among
    cuts with the same slowest stage the one whose stages are most alike, then the one with the least traffic.
    Raises ValueError where there are fewer segments than stages.
    """
    size = len(costs)
    if len(crossing_bytes) != max(0, size - 1):
        raise ValueError(f"{size} segments have {size - 1} borders between them, but {len(crossing_bytes)} were given")
    if not 1 <= n <= size:
        raise ValueError(f"{size} segments cannot be cut into {n} stages: use at most {size}")
    before = np.concatenate([[0.0], np.cumsum(costs)])
    border = np.concatenate([[0.0], np.asarray(crossing_bytes, dtype=float), [0.0]])  # border[i]: in front of segment i
    transfer = border * seconds_per_byte
    # stage[i, j]: seconds of a stage of the segments [i, j)
    stage = before[None, :] - before[:, None] + transfer[:, None] + transfer[None, :]
    stage[np.tril_indices(size + 1)] = np.inf
    slowest = _slowest(stage, n)
    return _best_below(stage, border, n, slowest * (1 + 1e-12))


def _slowest(stage: np.ndarray, n: int) -> float:
    """The least possible time of the slowest of n stages."""
    worst = stage[0]
    for _ in range(n - 1):
        worst = np.maximum(worst[:, None], stage).min(0)
    return float(worst[-1])


def _best_below(stage: np.ndarray, border: np.ndarray, n: int, limit: float) -> tuple[int, ...]:
    """Among the cuts with no stage above `limit`, the one with the least sum of squared times, then the least traffic."""
    longest = max(float(stage[np.isfinite(stage)].max()), 1e-300)
    squares = (np.where(stage <= limit, stage, np.inf) / longest) ** 2
    step = squares + (border * 1e-9 / max(float(border.max()), 1.0))[:, None]
    total, choices = step[0], []
    for _ in range(n - 1):
        sums = total[:, None] + step
        choices.append(sums.argmin(0))
        total = sums.min(0)
    cuts, end = [], len(total) - 1
    for choice in reversed(choices):
        end = int(choice[end])
        cuts.append(end)
    return tuple(reversed(cuts))


def stages_of_parameters(gm: fx.GraphModule, stages: int) -> dict[str, int]:
    """The stage of each parameter: cuts where few bytes cross, work balanced."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    position = {n: i for i, n in enumerate(nodes)}
    crossing = [0.0] * (len(nodes) + 1)
    for node in nodes:
        if not node.meta.get("grad"):
            continue
        last = max((position[u] for u in node.users if u in position), default=position[node])
        size = float(sum(map(size_of, metas(node))))
        for at in range(position[node] + 1, last + 1):
            crossing[at] += size
    costs = [work(n) for n in nodes]
    stream = 1.01 * stream_bytes(op_calls(gm))
    narrow = [i for i in range(1, len(nodes)) if 0 < crossing[i] <= stream]
    borders, cuts = _cut(costs, crossing, narrow, stages)
    if not _balanced(costs, borders, cuts):
        borders, cuts = _cut(costs, crossing, [i for i in range(1, len(nodes)) if crossing[i] > 0], stages)
    starts = [borders[c] for c in cuts]
    stage_at = [sum(i >= s for s in starts) for i in range(len(nodes))]
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta["key"].startswith("param."):
            uses = [position[u] for u in node.users if u in position]
            found[node.meta["key"].removeprefix("param.")] = stage_at[min(uses)] if uses else 0
    return found


FLOPS_PER_BYTE = 100.0
"""What a byte that crosses a border weighs against work: between a CPU's network and an accelerator's."""
BORDER = 0.05
"""The most that an ordinary border weighs, of a stage's mean work: whoever asks for stages wants the work divided."""


def _cut(costs: list[float], crossing: list[float], inner: list[int], stages: int) -> tuple[list[int], tuple[int, ...]]:
    """(borders of segments, indices of the segments that stages begin with), cutting only at `inner` positions."""
    borders = [0, *inner, len(costs)]
    if len(borders) - 1 < stages:
        return borders, ()
    segments = [sum(costs[a:b]) for a, b in itertools.pairwise(borders)]
    sizes = [crossing[b] for b in inner]
    return borders, cut_stages(segments, sizes, stages, min(FLOPS_PER_BYTE, BORDER * sum(costs) / stages / median(sizes)))


def _balanced(costs: list[float], borders: list[int], cuts: tuple[int, ...]) -> bool:
    """Whether the heaviest stage does at most half as much again as the mean."""
    edges = [0, *(borders[c] for c in cuts), len(costs)]
    return bool(cuts) and max(sum(costs[a:b]) for a, b in itertools.pairwise(edges)) <= 1.5 * sum(costs) / (len(edges) - 1)


def work(node: fx.Node) -> float:
    """A node's share of a step, up to a constant: FLOPs of products, elements of everything else."""
    if is_getitem(node):
        return 0.0
    call, _ = op_call(node)
    return float(op_flops(call)) + float(sum(math.prod(m.shape) for m in metas(node)))
