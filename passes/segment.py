"""Cut a backward graph into parts that run one after the other, so that gradients are reduced while later ones are computed.

Requires  a backward graph (passes/partition.py), its parameter gradients in any order.
Ensures   the same nodes, each in one part, in the graph's order; the parts' outputs together are the graph's. What a part gives
          a later one stands under `saved.NAME`. One part where all gradients together are too few to be worth cutting.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from .graph_tools import extract, is_getitem, named_results

PARTS = 8
"""The most parts of a graph: each costs a call, and compute hides the rest well enough."""


def parts_of(size: float, least: int) -> int:
    """How many parts a backward is cut into that gives gradients of `size` bytes of parameters, one large parameter aside."""
    return max(1, int(size // max(least, size / PARTS)))


def largest_part(size: float, least: int) -> float:
    """How many of these bytes the largest part has: what is left is cut off only where it is enough for a part."""
    return size if parts_of(size, least) == 1 else min(size, max(least, size / PARTS) + least)


def segment(backward: fx.GraphModule, least: int, sizes_of: Mapping[str, int]) -> list[fx.GraphModule]:
    """Parts that are the same on every rank that runs the same ops, however unevenly parameters are sharded.

    least       bytes of parameters whose gradients a part gives, but for the last
    sizes_of    parameter key -> its bytes, on all ranks the same: of one that is sharded the average
    """
    position = {n: i for i, n in enumerate(backward.graph.nodes)}
    results = sorted(named_results(backward), key=lambda item: position[item[1]])
    sizes = [sizes_of.get(key.removeprefix("grad."), 0) for key, _ in results]
    target = max(least, sum(sizes) // PARTS)
    ends: list[int] = []
    held = 0
    left = sum(sizes)
    for (_, node), size in zip(results, sizes, strict=True):
        held, left = held + size, left - size
        if held >= target and left >= least:
            ends.append(position[node])
            held = 0
    if not ends:
        return [backward]
    ends.append(len(position))
    part_of: dict[fx.Node, int] = {}
    for n, i in position.items():  # a node of several results and what takes them apart stay together
        part_of[n] = part_of[n.all_input_nodes[0]] if is_getitem(n) else next(k for k, end in enumerate(ends) if i <= end)
    return [_part(backward, k, results, part_of) for k in range(len(ends))]


def _part(backward: fx.GraphModule, k: int, results: list[tuple[str, fx.Node]], part_of: dict[fx.Node, int]) -> fx.GraphModule:
    computed = [n for n in backward.graph.nodes if n.op == "call_function"]
    given = {n: f"saved.{n.name}" for n in computed if part_of[n] < k}
    handed = [n for n in computed if part_of[n] == k and any(u.op != "output" and part_of[u] > k for u in n.users)]
    own = [(key, n) for key, n in results if part_of[n] == k]
    return extract(backward, [*own, *((f"saved.{n.name}", n) for n in handed)], given)
