"""The residual stream of a model: the values that blocks hand on to blocks, and that cross the borders of stages.

Of which size they are is told by how common it is: of all values with gradients most are as large. What crosses a border is taken
to be their mean, for where a stage ends is not known before it is cut.
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from ..passes.graph_tools import Calls
from .offers import Offers
from .place import KeptAt
from .prices import size_of


def _stream(calls: Calls) -> tuple[float, list[fx.Node]]:
    """Bytes of one of the values, and the nodes that make them."""
    sizes = {n: size_of(call.results[0]) for n, (call, _) in calls.items() if len(call.results) == 1 and call.results[0].grad}
    if not sizes:
        return 0.0, []
    ((size, _),) = Counter(sizes.values()).most_common(1)
    return float(size), [n for n, found in sizes.items() if found == size]


def stream_bytes(calls: Calls) -> float:
    """Of a value of the stream."""
    return _stream(calls)[0]


def stream_at(calls: Calls, offered: Offers) -> list[KeptAt]:
    """The same by where an axis decides in which types the values are made, each with its part in the mean."""
    size, nodes = _stream(calls)
    counts = Counter(offered.first(n) for n in nodes)
    makers = ((offered.decisions[name], count) for name, count in counts.items())
    return [KeptAt(size * count / len(nodes), (d.index, len(d.call.operands) if d.call else 0)) for d, count in makers]
