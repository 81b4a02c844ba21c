"""Repeated blocks in groups: the blocks of a group are placed alike, those of two groups each by themselves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping

from torch import fx

from ..passes.types import Type

Groups = Mapping[int, int]
"""Of blocks, by meta["block"], the group; 0 of those left out."""


def together(blocks: Collection[int]) -> Groups:
    """These in one group, all others in another."""
    return dict.fromkeys(blocks, 1)


def regrouped(gm: fx.GraphModule, groups: Groups, pinned: Mapping[str, Type] | None = None) -> Mapping[str, str]:
    """As gm.meta["twins"]: by the name of each node in a repeated block, the first at its place; but of those of its group, and of
    placeholders that are pinned to the same type, by key."""
    twins: Mapping[str, str] = gm.meta.get("twins", {})
    if not groups and not pinned:
        return twins
    first: dict[tuple[str, int, Type | None], str] = {}
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        pin = pinned.get(node.meta["key"]) if pinned and node.op == "placeholder" else None
        name = first.setdefault((twins.get(node.name, node.name), group_of(node, groups), pin), node.name)
        if name != node.name:
            found[node.name] = name
    return found


def block_of(node: fx.Node) -> int | None:
    """Of a parameter the block that reads it."""
    reader = next(iter(node.users), node) if node.op == "placeholder" else node
    return reader.meta.get("block")


def group_of(node: fx.Node, groups: Groups) -> int:
    block = block_of(node)
    return 0 if block is None else groups.get(block, 0)


def runs(gm: fx.GraphModule) -> dict[int, int]:
    """Of each block the first one of its run."""
    twins: Mapping[str, str] = gm.meta.get("twins", {})
    blocks = {node.name: node.meta["block"] for node in gm.graph.nodes if node.meta.get("block") is not None}
    found: dict[int, int] = {}
    for name, block in blocks.items():
        found[block] = min(found.get(block, block), blocks.get(twins.get(name, name), block))
    return found


def evenly(run_of: Mapping[int, int], stages: int) -> list[tuple[int, ...]]:
    """All blocks in an order of which the first so many are spread evenly over so many stages: of each its first ones.

    run_of    `runs`
    """
    found: list[tuple[int, ...]] = []
    for run in dict.fromkeys(run_of.values()):
        blocks = sorted(block for block, first in run_of.items() if first == run)
        by_stage: dict[int, list[int]] = {}
        for k, block in enumerate(blocks):
            by_stage.setdefault(k * stages // len(blocks), []).append(block)
        for each in itertools.zip_longest(*by_stage.values()):
            found.append(tuple(block for block in each if block is not None))
    return found


def stand_ins(gm: fx.GraphModule, groups: Groups) -> dict[object, tuple[int, float]]:
    """Of each block that stands for those of its run and group, the first one of its run, and its group's share of the run."""
    run_of = runs(gm)
    sizes, counts = Counter(run_of.values()), Counter((run, groups.get(block, 0)) for block, run in run_of.items())
    found: dict[tuple[int, int], int] = {}
    for block in sorted(run_of):
        found.setdefault((run_of[block], groups.get(block, 0)), block)
    return {block: (key[0], counts[key] / sizes[key[0]]) for key, block in found.items()}
