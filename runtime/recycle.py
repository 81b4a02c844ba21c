"""Which results are written into memory of a value that has died: a graph that asks for less memory than its values take.

A matter of CPUs. glibc cannot put an aligned block where one of the same size was freed, unless a neighbour is free too
(`heap.py`): of activations that come and go, all of a few sizes, it keeps holes. CUDA's allocator keeps blocks by their size, which
comes to the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, dtype
from torch.fx import Node

from .program import value_bytes
from .reuse import IN_PLACE, InPlace, held_bytes, last_reads, lent, makes_memory, memories

aten = torch.ops.aten

SMALLEST = 1 << 16
"""Bytes from which memory is kept for a later result. The heap has room for what is smaller."""

INTO: Mapping[object, InPlace] = {
    **IN_PLACE,
    aten.bmm.default: InPlace("torch.bmm", ()),
    aten.cat.default: InPlace("torch.cat", ()),
    aten.mm.default: InPlace("torch.mm", ()),
    aten.silu.default: InPlace("torch.ops.aten.silu.out", ()),
    aten.sum.dim_IntList: InPlace("torch.sum", ()),
}
"""Ops that are given memory for their result, of an operand or another's."""


def recycled(
    nodes: Iterable[Node], over: Mapping[Node, int], given: Collection[Node] = (), apart: Collection[Node] = ()
) -> dict[Node, Node]:
    """By node, the dead value in whose memory its result may be written.

    It is the last to have died of those of that size and dtype; none where keeping it until then would make the most that the
    graph holds at once any more.

    over    the nodes that write over an operand (`reuse.reused`), with the placeholders in `given` theirs to write on
    apart   nodes whose results lie in memory from elsewhere, or are a user's, who should find them in memory of their own
    """
    nodes = list(nodes)
    memory = memories(nodes, over)
    last = last_reads(nodes, memory)
    owned = {node for node in nodes if memory[node] is node and (node in given or makes_memory(node))}
    whole = {memory[node]: node for node in nodes if node in over or memory[node] is node}
    held = held_bytes(nodes, last, owned)
    most = max(held, default=0)
    free_to_write = owned - {memory[x] for x in lent(nodes)}
    free: dict[tuple[dtype, int], list[tuple[int, Node]]] = defaultdict(list)
    found: dict[Node, Node] = {}
    for i, node in enumerate(nodes):
        key = _block(node) if node.target in INTO and not node.kwargs and node not in over and node not in apart else None
        if key is not None and free[key]:
            since, dead = free[key].pop()
            size = key[1] * key[0].itemsize
            between = range(since + 1, i)
            if all(held[k] + size <= most for k in between):
                found[node] = dead
                for k in between:
                    held[k] += size
            else:
                free[key].clear()  # of those that died before it the same is true, and will be
        for root in dict.fromkeys(memory[x] for x in node.all_input_nodes):
            named = whole[root].users  # what nothing reads has no name
            if last[root] == i and root in free_to_write and named and (block := _block(whole[root])):
                free[block].append((i, whole[root]))
    return found


def _block(node: Node) -> tuple[dtype, int] | None:
    """The dtype and length of a value that fills its memory in order and is large enough to keep."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_conj() or value.is_neg() or not value.is_contiguous():
        return None
    return (value.dtype, value.numel()) if value_bytes(value) >= SMALLEST else None
