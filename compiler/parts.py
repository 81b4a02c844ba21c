"""Which of the nodes at the same places of repeated blocks a fact of a graph is about, and whether it joins each within its block.

Where like blocks lie alike, this is nothing but a count. Where each is placed by itself (compiler/assign_apart.py) it says whose
types the fact depends on: of all of them, or of the last block's alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import fx

from .groups import block_of

Key = TypeVar("Key", bound=Hashable)

Readers = Mapping[tuple[int, int], list[fx.Node | None]]
"""By use, a decision and which of its operands: the nodes that read a value there; None is an output of the graph."""


@dataclass(frozen=True)
class Part:
    """makers      nodes that make such a value
    readers     by use: nodes that take one of these values; where those of some makers are more than of others, one for each maker
    together    whether what is taken is made in the same block, if there is more than one maker
    """

    makers: int
    readers: tuple[int, ...] = ()
    together: bool = True


def parts(found: Iterable[tuple[Key, fx.Node, Readers]]) -> dict[Key, Part]:
    """Of values that are one by their keys: each with its maker and its readers. Their uses are those of the key, in one order."""
    values: dict[Key, list[tuple[fx.Node, Readers]]] = {}
    for key, maker, readers in found:
        values.setdefault(key, []).append((maker, readers))
    return {key: _part(each) for key, each in values.items()}


def _part(values: list[tuple[fx.Node, Readers]]) -> Part:
    readers = []
    for use in values[0][1]:
        counts = [len(found[use]) for _, found in values]
        readers.append(sum(counts) if len({*counts}) == 1 else len(counts))
    return Part(len(values), tuple(readers), len(values) == 1 or _are_together(values))


def _are_together(values: list[tuple[fx.Node, Readers]]) -> bool:
    homes = [block_of(maker) for maker, _ in values]
    if None in homes or len({*homes}) < len(homes):
        return False
    return all(
        len(nodes) == 1 and nodes[0] is not None and block_of(nodes[0]) == home
        for (_, found), home in zip(values, homes, strict=True)
        for nodes in found.values()
    )
