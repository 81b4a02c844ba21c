"""Where gradients are made: a product is written where it is to lie, into the bucket that is reduced, or onto what it is added to.

A pass over memory saved for each gradient, and with several micro-batches for each of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, dtype
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from .steps import Step

Fact = tuple[tuple[int, ...], dtype]

LARGE = 1 << 20
"""Bytes from which a tensor is reduced where it lies: copying it into a bucket would take longer than another collective."""


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


def product_outputs(gm: GraphModule) -> frozenset[int]:
    """Positions of the outputs that are matrix products used for nothing else."""
    fresh = fresh_outputs(gm)
    results = _results(gm)
    return frozenset(i for i in fresh if getattr(results[i], "target", None) is torch.ops.aten.mm.default)


def fresh_outputs(gm: GraphModule) -> frozenset[int]:
    """Positions of the outputs whose memory is new and theirs alone: results of ops that are no views, used nowhere else. None of
    a saved program, which has its graphs as functions."""
    results = _results(gm)
    return frozenset(i for i, n in enumerate(results) if isinstance(n, Node) and results.count(n) == 1 and _is_fresh(n))


def _results(gm: GraphModule) -> tuple[object, ...]:
    return tuple(next((n.args[0] for n in gm.graph.nodes if n.op == "output"), ()))  # type: ignore[arg-type]


_SILENT_VIEWS = ("aten::_unsafe_view", "aten::_reshape_alias")
"""Views whose schemas do not say so."""


def _is_fresh(node: Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, Node) or any(user.op != "output" for user in node.users):
        return False
    schema = getattr(source.target, "_schema", None)
    return schema is not None and schema.name not in _SILENT_VIEWS and all(r.alias_info is None for r in schema.returns)


def output_facts(gm: GraphModule) -> tuple[Fact | None, ...]:
    """(shape, dtype) of each output, None where the graph does not say."""
    values = [n.meta.get("val") if isinstance(n, Node) else None for n in _results(gm)]
    return tuple((tuple(map(int, v.shape)), v.dtype) if isinstance(v, Tensor) else None for v in values)


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
        if step.instruction.kind == "run" and any(write is not None and write.slot in homes for write in step.writes):
            made[i] = replace(
                step,
                writes=tuple(
                    replace(w, home=homes[w.slot], first_sum=False) if w is not None and w.slot in homes else w for w in step.writes
                ),
            )
    return made, slots


def _bytes(fact: Fact) -> int:
    return math.prod(fact[0]) * fact[1].itemsize
