"""The ops whose backward holds the most at once, beside what the forward kept.

At the peak counts the one that holds the most (compiler/backward_memory.py finds it): no sum over ops, and so without a price. What
one of them holds is one, and never more: the gradients of its own operands and results, each in the share that a rank takes of it,
and of what waits beside them the least there can be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from torch import fx

from .backward_memory import Alive, Moment
from .offers import Decision, Offers
from .prices import held, size_of
from .sized import Large

COUNT = 4
"""Of how many ops it has a price: in a language model of those at both ends of the logits, and of two in a block."""


def large_ops(
    gradients: Mapping[fx.Node, Sequence[bool]], moments: Mapping[fx.Node, Moment[fx.Node]], offered: Offers
) -> list[Large]:
    """Those with the most bytes of their own; where like blocks are in groups, each group's.

    gradients, moments    as `Keeping` has them
    """
    nodes: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in gradients:
        nodes[offered.first(node)].append(node)
    places: dict[object, list[tuple[Decision, tuple[float, ...], float]]] = {}
    counts = Counter[object]()
    for name, alike in nodes.items():
        d = offered.decisions[name]
        block = d.node.meta.get("block")
        run, share = offered.stand_ins.get(block, (block, 1.0))
        counts[block] += 1  # like blocks have like ops in one order
        places.setdefault((run, counts[block]), []).append((d, _own(d, [gradients[node] for node in alike]), share))
    most = sorted(places.values(), key=lambda found: -max(sum(sizes) for _, sizes, _ in found))[:COUNT]

    def beside(d: Decision) -> float:
        return min(_least_beside(moments[node], offered) for node in nodes[d.name])

    return [Large(k, d.index, sizes, beside(d), share) for k, found in enumerate(most) for d, sizes, share in found]


def _own(d: Decision, made: Sequence[Sequence[bool]]) -> tuple[float, ...]:
    """Bytes of the gradients of each operand and result that lie in memory of their own, whichever of like ops it is."""
    assert d.call is not None
    values = zip((*d.call.operands, *d.call.results), zip(*made, strict=True), strict=True)
    return tuple(float(size_of(meta)) if all(counted) else 0.0 for meta, counted in values)


def _least_beside(moment: Moment[fx.Node], offered: Offers) -> float:
    def least(place: tuple[fx.Node, int]) -> float:
        node, k = place
        offers = offered.decisions[offered.first(node)].offered
        return min((held((*s.ins, *s.outs)[k], offered.axis) for s in offers), default=0.0)

    def waits(alive: Alive[fx.Node]) -> float:
        if alive.home is None or alive.again:  # the op's own; or kept, where it is taken otherwise than it was made
            return 0.0
        made = least(alive.home)
        return alive.size * (made if alive.until is None else min(made, least(alive.at)))

    return sum(map(waits, moment))


def least_of(large: Large, offered: Offers) -> float:
    """Bytes that it holds at least."""
    offers = offered.order[large.decision].offered
    return min(large.held(lambda place, s=s: held((*s.ins, *s.outs)[place[1]], offered.axis)) for s in offers)
