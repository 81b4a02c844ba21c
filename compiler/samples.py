"""Which ways to run an op cut the samples of a batch: none that a tensor axis may take where a micro-batch has fewer than ranks.

A graph is captured with all samples of a step. The micro-batch that a rank of a mesh runs may have so few that its axes cannot cut
them; what else they cut is there for any number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import fx

from ..passes.graph_tools import Calls
from ..passes.rules.base import Axis, Strategy
from ..passes.types import Type, Varying, balanced_sizes
from .offers import Offers
from .place import Policy, place
from .prices import Volume

Samples = Mapping[str, Strategy]
"""Of each call, by its node's name, in which types it runs where an axis cuts the samples."""


def samples(gm: fx.GraphModule, rows: int, inputs: Collection[str], loss: str | None, calls: Calls) -> Samples:
    """Where an axis of two data ranks cuts `rows` samples, of which dim 0 of these inputs is. Nothing for a single sample."""
    if rows < 2:
        return {}
    cut: dict[str, Type] = {key: Varying(0, (balanced_sizes(rows, 2),)) for key in inputs}
    return place(gm, Axis("samples", 2), Policy("data", cut, loss), Volume(), calls).choice


def without_cuts(offered: Offers, of: Samples) -> Offers:
    """What is offered that cuts no samples, of each node; all of it where nothing else is."""
    decisions = {}
    for name, d in offered.decisions.items():
        cut = of.get(d.node.name)
        left = [s for s in d.offered if cut is None or not _cuts(s, cut)]
        decisions[name] = replace(d, offered=left or d.offered)
    return replace(offered, decisions=decisions)


def _cuts(strategy: Strategy, samples_: Strategy) -> bool:
    types = zip((*strategy.ins, *strategy.outs), (*samples_.ins, *samples_.outs), strict=True)
    return any(isinstance(a, Varying) and isinstance(b, Varying) and _parts(a) == _parts(b) for a, b in types)


def _parts(type_: Varying) -> tuple[int, list[int]]:
    """The dim, and the lengths that are cut of it: of samples as long, however many ranks share them."""
    return type_.dim, [sum(section) for section in type_.sections]
