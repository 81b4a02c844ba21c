"""The blocks whose parameters are the most bytes: where they gather them over a tensor axis, the peak is there.

What a placement gathers counts at the peak once, for the block that gathers the most: no sum, and so without a price. What one of
the blocks gathers is one, and never more.
"""

from __future__ import annotations

from collections import Counter

from ..passes.graph_tools import is_parameter
from .offers import Offers, Uses, Value
from .prices import size_of
from .sized import Heavy

COUNT = 2
"""Of how many blocks it has a price: in a model of equal blocks one is what is outside of them."""


def block_of(offered: Offers, uses: Uses) -> object:
    """Where a value is used first: a block, or None outside of blocks."""
    reader, _ = uses[0]
    return offered.order[reader].node.meta.get("block") if reader < len(offered.order) else None


def heaviest(offered: Offers) -> dict[tuple[Value, Uses], Heavy]:
    """The parameters of these blocks, as `Offers.uses` has them."""
    blocks = {(v, uses): block_of(offered, uses) for v, uses in offered.uses if is_parameter(offered.decisions[v[0]].node)}
    sizes = Counter[object]()
    for (value, _), block in blocks.items():
        sizes[block] += size_of(offered.meta[value])
    stands = {block: offered.stand_ins.get(block, (block, 1.0)) for block in sizes}
    runs = Counter[object]()
    for block, (run, _) in stands.items():
        runs[run] = max(runs[run], sizes[block])
    order = {run: k for k, (run, _) in enumerate(runs.most_common(COUNT))}
    heavy = {block: Heavy(order[run], block, share) for block, (run, share) in stands.items() if run in order}
    return {key: heavy[block] for key, block in blocks.items() if block in heavy}
