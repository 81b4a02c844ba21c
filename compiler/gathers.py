"""What ZeRO-3 gathers together, and which parameters a plan keeps whole over a step because memory is left.

ZeRO-3 gathers a block's parameters before its forward and before its backward, of every micro-batch, and scatters its gradients
as often. A parameter that is kept whole is gathered once a step and its gradient is scattered once, as under ZeRO-2. Every one so
kept saves time and costs memory, in proportion to its bytes; so they are taken in turn, block by block, until the memory is full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ..passes.graph_tools import Calls, metas, op_calls
from .cost import size_of
from .needs import read_again


@dataclass(frozen=True)
class Part:
    """A parameter, and its shares, of all of the model's: of the bytes, of those with gradients, of those that the backward reads.

    alone    whether no other group uses it
    """

    name: str
    held: float
    trained: float
    again: float
    alone: bool


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together first: those of a block, or of a stretch between blocks (passes/buckets.py). Shares as
    a part has them.

    together    the share of bytes gathered at once, with the parameters that count with an earlier group
    alone       the same without the parameters that other groups use too
    """

    parts: tuple[Part, ...]
    together: float
    alone: float

    @cached_property
    def held(self) -> float:
        return sum(part.held for part in self.parts)

    @cached_property
    def again(self) -> float:
        return sum(part.again for part in self.parts)


@dataclass(frozen=True)
class Whole:
    """Parameters kept whole, the first so many in an order, and their shares as `Part` has them. left: groups of which something is
    still gathered; largest, alone: the largest of the shares `together` and `alone` of what is left of these."""

    order: tuple[str, ...] = ()
    count: int = 0
    held: float = 0.0
    trained: float = 0.0
    again: float = 0.0
    left: int = 0
    largest: float = 0.0
    alone: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return self.order[: self.count]


def _turns(groups: Sequence[Group], stages: int) -> list[float]:
    """Of each group, when it is taken: so that in stages of about as many bytes, those taken are spread evenly at any time."""
    before, counts, found = 0.0, Counter[int](), []
    for group in groups:
        stage = min(stages - 1, int((before + group.held / 2) * stages))
        before += group.held
        found.append(_reversed(counts[stage]))
        counts[stage] += 1
    return found


def _reversed(n: int) -> float:
    """The binary digits of a number after the point, the last first (van der Corput 1935)."""
    return sum(2.0 ** -(k + 1) for k in range(n.bit_length()) if n >> k & 1)


Place = tuple[object, object]
"""A block, or a stretch outside of blocks by the block before it."""


def _uses(gm: fx.GraphModule) -> dict[fx.Node, dict[Place, None]]:
    """Of every parameter that is used: where, in the order of the forward."""
    found: dict[fx.Node, dict[Place, None]] = {}
    before: object = None
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        block = node.meta.get("block")
        before = before if block is None else block
        for source in node.all_input_nodes:
            if source.op == "placeholder" and source.meta["key"].startswith("param."):
                found.setdefault(source, {})[block, before] = None
    return found


def gather_groups(gm: fx.GraphModule, calls: Calls | None = None) -> list[Group]:
    """In the order of the forward. A parameter that several blocks use counts with the first. `calls`: `op_calls(gm)`."""
    uses, calls = _uses(gm), calls or op_calls(gm)
    groups: dict[Place, list[fx.Node]] = {}
    used: dict[Place, list[fx.Node]] = {}
    for parameter, places in uses.items():
        groups.setdefault(next(iter(places)), []).append(parameter)
        for place in places:
            used.setdefault(place, []).append(parameter)
    sizes = {n: float(size_of(metas(n)[0])) for n in uses}
    held = _shares(sizes)
    trained = _shares({n: size for n, size in sizes.items() if metas(n)[0].grad})
    again = _shares({n: size for n, size in sizes.items() if read_again(n, calls)})
    parts = {
        n: Part(n.meta["key"].removeprefix("param."), held[n], trained.get(n, 0.0), again.get(n, 0.0), len(places) == 1)
        for n, places in uses.items()
    }
    return [
        Group(
            parts=tuple(parts[n] for n in nodes),
            together=sum(parts[n].held for n in used[place]),
            alone=sum(parts[n].held for n in used[place] if parts[n].alone),
        )
        for place, nodes in groups.items()
    ]


def _shares(sizes: dict[fx.Node, float]) -> dict[fx.Node, float]:
    """Of all of them together."""
    whole = sum(sizes.values()) or 1.0
    return {n: size / whole for n, size in sizes.items()}


def shared(gm: fx.GraphModule) -> float:
    """The share, of all bytes with gradients, of the largest parameter that several groups use: a tied embedding. The gradient of
    one use waits whole for that of the other."""
    uses = {n: places for n, places in _uses(gm).items() if metas(n)[0].grad}
    sizes = {n: float(size_of(metas(n)[0])) for n in uses}
    return max((sizes[n] for n, places in uses.items() if len(places) > 1), default=0.0) / (sum(sizes.values()) or 1.0)


def kept_whole(groups: Sequence[Group], stages: int = 1) -> list[Whole]:
    """No parameter kept whole, one, two, ...

    Group by group: those first that the backward would gather again, then the small ones, and of these such as are spread evenly
    over every stage, whose gradients come one after the other and are scattered beside the rest of the backward. Of a group the
    parameters that the backward would gather again come first, and of them the large ones.
    """
    turns = _turns(groups, stages)
    order = sorted(range(len(groups)), key=lambda i: (not groups[i].again > 0.5 * groups[i].held, groups[i].held, turns[i], -i))
    ordered = [(i, sorted(groups[i].parts, key=lambda part: (not part.again, -part.held))) for i in order]
    names = tuple(part.name for _, parts in ordered for part in parts)
    # Of the groups after each in this order, the largest shares.
    after = [(0.0, 0.0)]
    for i in reversed(order):
        after.append((max(after[-1][0], groups[i].together), max(after[-1][1], groups[i].alone)))
    after.reverse()
    found = [Whole(names, left=len(order), largest=after[0][0], alone=after[0][1])]
    for k, (i, parts) in enumerate(ordered):
        together, alone = groups[i].together, groups[i].alone
        for j, part in enumerate(parts, 1):
            together, alone = together - part.held, alone - part.held * part.alone
            before, partly = found[-1], j < len(parts)
            found.append(
                Whole(
                    order=names,
                    count=before.count + 1,
                    held=before.held + part.held,
                    trained=before.trained + part.trained,
                    again=before.again + part.again,
                    left=len(order) - k - (not partly),
                    largest=max(after[k + 1][0], together if partly else 0.0),
                    alone=max(after[k + 1][1], alone if partly else 0.0),
                )
            )
    return found
