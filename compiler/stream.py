"""Where a model is narrow: what crosses there goes from block to block, and over the borders of stages.

A residual stream is as large as most values are, and at the narrow places it is all that goes on. What crosses a border of stages
is taken to be the mean over these, for where a stage ends is not known before it is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import fx

from ..passes.graph_tools import Calls, metas, result_of
from .offers import Offers
from .parts import Part
from .prices import size_of
from .sized import KeptAt, Place


@dataclass(frozen=True)
class Stream:
    """nodes      the calls of a graph, in order
    crossing   by position: bytes of the values with gradients that are made before that node and used by it or after it
    narrow     positions where something crosses, but no more than a value of the size that is the most common
    places     those of them where such a value crosses, and not a smaller one, as between the terms of a loss
    makers     nodes whose values cross there, and at how many of these
    """

    nodes: list[fx.Node]
    crossing: list[float]
    narrow: list[int]
    places: list[int]
    makers: Mapping[fx.Node, int]


def stream(calls: Calls) -> Stream:
    nodes = [n for n in next(iter(calls)).graph.nodes if n.op == "call_function"] if calls else []
    position = {n: i for i, n in enumerate(nodes)}
    lasts = {n: max((position[u] for u in n.users if u in position), default=i) for i, n in enumerate(nodes) if n.meta.get("grad")}
    change = [0.0] * (len(nodes) + 2)
    for node, last in lasts.items():
        size = float(sum(map(size_of, metas(node))))
        change[position[node] + 1] += size
        change[last + 1] -= size
    crossing = list(accumulate(change))[: len(nodes) + 1]
    sizes = Counter(size_of(call.results[0]) for call, _ in calls.values() if len(call.results) == 1 and call.results[0].grad)
    common = sizes.most_common(1)[0][0] if sizes else 0
    narrow = [i for i in range(1, len(nodes)) if 0 < crossing[i] <= 1.01 * common]
    places = [i for i in narrow if crossing[i] >= 0.99 * common] or narrow
    there = set(places)
    before = list(accumulate(int(i in there) for i in range(len(nodes) + 1)))
    makers = {n: before[last] - before[position[n]] for n, last in lasts.items() if isinstance(n.meta["val"], torch.Tensor)}
    return Stream(nodes, crossing, narrow, places, {n: count for n, count in makers.items() if count})


def stream_bytes(found: Stream) -> float:
    """Of what crosses at such a place, the mean."""
    return sum(found.crossing[i] for i in found.places) / max(1, len(found.places))


def stream_at(found: Stream, offered: Offers) -> list[KeptAt]:
    """The same by where an axis decides in which types the values are made, each with its part in the mean."""
    counts: Counter[tuple[Place, float]] = Counter()
    for node, count in found.makers.items():
        maker, k = result_of(node)
        d = offered.decisions[offered.first(maker)]
        counts[(d.index, len(d.operands) + k), size_of(metas(node)[0]) * count] += 1
    return [KeptAt(size * n / len(found.places), place, Part(n)) for (place, size), n in counts.items()]
