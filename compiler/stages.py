"""Cut a model into pipeline stages of equal time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
