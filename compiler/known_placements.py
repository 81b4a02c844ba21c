"""Placements that ranks of a plan have in common: what is emitted for all of them in one process is placed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..passes.graph_tools import Calls, metas
from ..passes.rules.base import Axis
from .place import Placement, Policy


class KnownPlacements:
    """Of one plan, by what is placed: most ranks lower graphs that are alike in every shape."""

    def __init__(self) -> None:
        self._found: dict[Any, Placement] = {}

    def of(
        self, gm: fx.GraphModule, axis: Axis, policy: Policy, calls: Calls, follows: bool, find: Callable[[], Placement]
    ) -> Placement:
        """What `find` gives, or gave for a graph like this one. follows: it takes after a placement of the plan's leading rank."""
        key = axis, repr(policy), follows, _describe(gm, calls)
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


def _describe(gm: fx.GraphModule, calls: Calls) -> tuple[Any, ...]:
    """All of a graph that a placement depends on."""
    texts: dict[int, str] = {}
    found: list[Any] = [tuple(gm.meta["outputs"]), tuple(gm.meta.get("twins", {}).items())]
    for node in gm.graph.nodes:
        if node in calls:
            call, sources = calls[node]
            if id(call) not in texts:
                texts[id(call)] = repr(call)
            found.append((node.name, texts[id(call)], tuple(n.name for n in sources)))
        elif node.op == "placeholder":
            found.append((node.name, node.meta["key"], metas(node)))
        elif node.op == "output":
            found.append(tuple((n.name, repr(n.meta.get("types"))) for n in node.args[0]))
    return tuple(found)
