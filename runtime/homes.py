"""Where gradients are made: a product is written where it is to lie, into the bucket that is reduced, or onto what it is added to.

A pass over memory saved for each gradient, and with several micro-batches for each of them.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, dtype
from torch.fx import GraphModule, Node

from .reuse import makes_memory, result_nodes

if TYPE_CHECKING:
    from .steps import Step, Write

Fact = tuple[tuple[int, ...], dtype]

LARGE = 1 << 23
"""Bytes from which a tensor is reduced where it lies: copying it into a bucket would take longer than another collective. (Of 26
MB, 4 MB by itself cost 1 ms of 44 more with Gloo, two of them 5 ms; a copy of 4 MB takes 1 to 2.)"""


@dataclass(frozen=True)
class Home:
    """Elements [start, start + size of `shape`) of the bucket that stands in slot `bucket`, which has `length`."""

    bucket: int
    start: int
    shape: tuple[int, ...]
    dtype: dtype
    length: int

    def view(self, bucket: Tensor) -> Tensor:
        return bucket[self.start : self.start + math.prod(self.shape)].view(self.shape)


def is_large(size: int) -> bool:
    return size >= LARGE


Place = tuple[Tensor, bool] | None
"""The memory for a product, and whether it is added to what is there. None: new memory."""


def product_into(a: Tensor, b: Tensor, place: Place) -> Tensor:
    """The product of two matrices, where `place` says. It is what compiled graphs call."""
    if place is None:
        return torch.mm(a, b)
    target, add = place
    if add:
        torch.addmm(target, a, b, out=target)
    else:
        torch.mm(a, b, out=target)
    return target


@dataclass(frozen=True)
class Outputs:
    """What is known of a graph's outputs.

    facts       shape and dtype of each, None where the graph does not say
    fresh       positions of those whose memory is new and theirs alone: results of ops that are no views, used nowhere else
    products    of these, the matrix products
    """

    facts: tuple[Fact | None, ...]
    fresh: frozenset[int]
    products: frozenset[int]


def read_outputs(gm: GraphModule) -> Outputs:
    """Of a saved program, which has its graphs as functions, nothing is known."""
    nodes = result_nodes(gm)
    given = Counter(nodes)
    fresh = frozenset(i for i, n in enumerate(nodes) if n is not None and given[n] == 1 and _is_fresh(n))
    products = frozenset(i for i in fresh if getattr(nodes[i], "target", None) is torch.ops.aten.mm.default)
    return Outputs(tuple(_fact(n) for n in nodes), fresh, products)


def _fact(node: Node | None) -> Fact | None:
    value = node.meta.get("val") if node is not None else None
    return (tuple(map(int, value.shape)), value.dtype) if isinstance(value, Tensor) else None


def _is_fresh(node: Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and makes_memory(source) and all(user.op == "output" for user in node.users)


def with_homes(steps: Sequence[Step], facts: Mapping[int, Fact], slots: int) -> tuple[list[Step], int]:
    """The steps with a home for every gradient that a reduction would copy into its bucket, and the number of slots with theirs.

    facts    of slots that graphs write. Only buckets all of whose tensors are known are made before they are packed
    """
    homes: dict[int, Home] = {}
    made = list(steps)
    for i, step in enumerate(steps):
        if step.instruction.kind != "all_reduce" or not step.deferrable:
            continue
        known = {slot: facts[slot] for slot in step.reads if slot in facts}
        small = [slot for slot in step.reads if slot not in known or not is_large(_bytes(known[slot]))]
        if len(known) < len(set(step.reads)) or len(small) < 2 or len({known[slot][1] for slot in small}) > 1:
            continue
        length = sum(math.prod(known[slot][0]) for slot in small)
        start = 0
        for slot in small:
            homes[slot] = Home(slots, start, *known[slot], length)
            start += math.prod(known[slot][0])
        made[i] = replace(step, bucket=slots)
        slots += 1
    for i, step in enumerate(made):
        if step.instruction.kind == "run":
            made[i] = replace(step, writes=tuple(_at_home(write, homes) for write in step.writes))
    return made, slots


def _at_home(write: Write | None, homes: Mapping[int, Home]) -> Write | None:
    home = homes.get(write.slot) if write is not None else None
    return write if write is None or home is None else replace(write, home=home, first_sum=False)


def _bytes(fact: Fact) -> int:
    return math.prod(fact[0]) * fact[1].itemsize
