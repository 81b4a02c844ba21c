"""Cut a model into pipeline stages of equal time: a sequence of segments, and the parameters of a graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import median

import numpy as np
from torch import fx

from ..passes.graph_tools import is_getitem, metas, op_call
from .cost import op_flops
from .stream import Stream, stream_bytes


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


Sizes = tuple[float, float, float]
"""Bytes of a parameter: all; if it has a gradient; if the backward reads it."""

FINEST = 512
"""Places at most that are looked at where a model is not cut at the narrow ones."""


@dataclass(frozen=True)
class StageShare:
    """What a stage has, of all that a model has: of the work, of the bytes of parameters, of those with gradients and of those that
    the backward reads, and of the bytes that the forward keeps. What two stages use counts in both."""

    work: float
    held: float
    trained: float
    again: float
    kept: float


@dataclass(frozen=True)
class Stages:
    """shares    of each stage
    widths    what crosses each border, against what goes from block to block: more where a late stage reads what an early one made
    """

    shares: Sequence[StageShare]
    widths: Sequence[float]

    @cached_property
    def heaviest(self) -> StageShare:
        """The stage with the most parameters."""
        return max(self.shares, key=lambda stage: stage.held)

    @cached_property
    def slowest(self) -> StageShare:
        return max(self.shares, key=lambda stage: stage.work)

    @cached_property
    def widest(self) -> float:
        return max(self.widths, default=1.0)

    @cached_property
    def _known(self) -> dict[tuple[int, ...], list[tuple[StageShare, float]]]:
        return {}

    def fullest(self, micro_batches: tuple[int, ...]) -> list[tuple[StageShare, float]]:
        """The stages that may need the most bytes, for no other has more of everything, where each holds the activations of so many
        micro-batches; and how many that is, against one of the whole model."""
        if micro_batches not in self._known:
            found: dict[tuple[float, ...], StageShare] = {}
            for stage, count in zip(self.shares, micro_batches, strict=True):
                has = stage.held, stage.trained, stage.kept, stage.kept * count
                found.setdefault(tuple(round(share, 12) for share in has), stage)
            self._known[micro_batches] = [
                (stage, has[-1])
                for has, stage in found.items()
                if not any(other != has and all(a >= b for a, b in zip(other, has, strict=True)) for other in found)
            ]
        return self._known[micro_batches]


class StageCuts:
    """Where a graph is cut into stages, into any number of them: where few bytes cross, and such that work is balanced."""

    def __init__(self, gm: fx.GraphModule, found: Stream) -> None:
        self.gm, self.stream = gm, found
        self.position = {n: i for i, n in enumerate(found.nodes)}
        self.costs = [work(n) for n in found.nodes]
        self._stage_at: dict[int, list[int]] = {}

    def parameters(self, stages: int) -> dict[str, int]:
        """The stage of each parameter: the first that uses it."""
        return {key: min(found) if found else 0 for key, found in self._users(stages).items()}

    def stages(self, stages: int, sizes: Mapping[str, Sizes], kept: Sequence[tuple[float, Sequence[fx.Node]]]) -> Stages:
        """What each has. sizes: of parameters, by name. kept: bytes that the forward keeps, and the nodes that need them."""
        stage_at = self.stage_at(stages)
        work_of, kept_of = np.zeros(stages), np.zeros(stages)
        parameters = np.zeros((stages, 3))
        for i in range(len(self.costs)):
            work_of[stage_at[i]] += self.costs[i]
        for size, nodes in kept:
            for stage in {stage_at[self.position[node]] for node in nodes}:
                kept_of[stage] += size
        for key, users in self._users(stages).items():
            for stage in users or {0}:
                parameters[stage] += sizes[key]
        whole = np.array([sizes[key] for key in sizes]).sum(0) if sizes else np.zeros(3)
        columns = (
            work_of / (work_of.sum() or 1.0),
            parameters / np.where(whole > 0, whole, 1.0),
            kept_of / (sum(size for size, _ in kept) or 1.0),
        )
        shares = [StageShare(float(w), float(h), float(t), float(a), float(k)) for w, (h, t, a), k in zip(*columns, strict=True)]
        mean = stream_bytes(self.stream) or 1.0
        borders = [i for i in range(1, len(stage_at)) if stage_at[i] != stage_at[i - 1]]
        return Stages(shares, [self.stream.crossing[i] / mean for i in borders])

    def stage_at(self, stages: int) -> list[int]:
        """The stage of each position."""
        if stages not in self._stage_at:
            starts = set(self._starts(stages))
            self._stage_at[stages] = list(accumulate(int(i in starts) for i in range(len(self.costs))))
        return self._stage_at[stages]

    def _users(self, stages: int) -> dict[str, set[int]]:
        stage_at = self.stage_at(stages)
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        parameters = {n.meta["key"].removeprefix("param."): n for n in placeholders if n.meta["key"].startswith("param.")}
        return {key: {stage_at[self.position[u]] for u in n.users if u in self.position} for key, n in parameters.items()}

    def _starts(self, stages: int) -> list[int]:
        if stages == 1:
            return []
        crossing, inner = self.stream.crossing, range(1, len(self.costs))
        borders, cuts = _cut(self.costs, crossing, self.stream.narrow, stages)
        if not _balanced(self.costs, borders, cuts):
            borders, cuts = _cut(self.costs, crossing, self._finely([i for i in inner if crossing[i] > 0]), stages)
        return [borders[c] for c in cuts]

    def _finely(self, places: list[int]) -> list[int]:
        """Of many places those where the least crosses, one in each of FINEST equal parts of the work."""
        if len(places) <= FINEST:
            return places
        before = list(accumulate(self.costs, initial=0.0))
        best: dict[int, int] = {}
        for i in places:
            part = int(before[i] / (before[-1] or 1.0) * FINEST)
            if part not in best or self.stream.crossing[i] < self.stream.crossing[best[part]]:
                best[part] = i
        return sorted(best.values())


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
