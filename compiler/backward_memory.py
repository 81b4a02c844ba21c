"""What a backward holds at once, beside what the forward kept for it: before anything is emitted.

While the backward of an op runs, there are the gradients of its results and of its operands, as far as these lie in memory of their
own; the gradients of other values, which wait until the backward comes to what made them (that of the residual stream, while a
block's are computed); and values that were not kept and are computed again, for this op and for those whose turn is still to come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import fx

from ..passes.graph_tools import Calls
from ..passes.rules.base import OpCall, Strategy
from .cost import size_of
from .needs import held_by, passes_on
from .offers import Offers
from .prices import held

Use = tuple[fx.Node, int]
"""An operand of a call, by position; or, after these, a result."""

Value = tuple[fx.Node, int]
"""A result, by its number."""

At = TypeVar("At", fx.Node, int)
"""A node, or the number of the decision that it is part of."""


@dataclass(frozen=True)
class Alive(Generic[At]):
    """A value or a gradient, of so many bytes in whole.

    at       the operand or the result as which it is there
    until    the use that comes next: up to there it stays as it is, where that one takes as large a share
    home     the result that it is, or is the gradient of: without such a use it is there in that one's share
    again    a value that is computed again, where it is taken as it was made, and else is kept
    """

    size: float
    at: tuple[At, int]
    until: tuple[At, int] | None = None
    home: tuple[At, int] | None = None
    again: bool = False

    def held(self, share: Callable[[tuple[At, int]], float]) -> float:
        """Bytes. share: of a value that a rank holds, by where it is made or taken."""
        here = share(self.at)
        if self.home is None or (self.until is not None and share(self.until) == here):
            return self.size * here
        made = share(self.home)
        if self.again:
            return self.size * here if made == here else 0.0
        return self.size * made


Moment = Sequence[Alive[At]]
"""What is there at once."""


def largest(moments: Iterable[Moment[At]], share: Callable[[tuple[At, int]], float]) -> float:
    """Bytes of the moment with the most."""
    return max((sum(alive.held(share) for alive in moment) for moment in moments), default=0.0)


def moments_at(moments: Iterable[Moment[fx.Node]], offered: Offers) -> list[Moment[int]]:
    """The same by where an axis decides: those that are alike once."""
    moments = list(moments)
    each = {id(alive): alive for moment in moments for alive in moment}  # many moments hold the same
    kinds: dict[Alive[int], int] = {}
    number = {key: kinds.setdefault(_decided(alive, offered), len(kinds)) for key, alive in each.items()}
    found = dict.fromkeys(tuple(sorted([number[id(alive)] for alive in moment])) for moment in moments)
    alike = list(kinds)
    return [[replace(alike[k], size=alike[k].size * count) for k, count in Counter(moment).items()] for moment in found]


def _decided(alive: Alive[fx.Node], offered: Offers) -> Alive[int]:
    def at(use: Use | None) -> tuple[int, int] | None:
        return (offered.decisions[offered.first(use[0])].index, use[1]) if use is not None else None

    here = at(alive.at)
    assert here is not None
    return Alive(alive.size, here, at(alive.until), at(alive.home), alive.again)


def least_bytes(gradients: Mapping[fx.Node, Sequence[bool]], offered: Offers) -> float:
    """What the backward of the largest op holds at least, whatever is taken of what an axis offers.

    gradients   of which operands and results of each op with a backward this holds gradients in memory of their own
    """

    def own(call: OpCall, strategy: Strategy, made: Sequence[bool]) -> float:
        values = zip((*call.operands, *call.results), (*strategy.ins, *strategy.outs), made, strict=True)
        return sum(size_of(meta) * held(type_, offered.axis) for meta, type_, counted in values if counted)

    found = [
        min(own(d.call, strategy, gradients[d.node]) for strategy in d.offered)
        for d in offered.decisions.values()
        if d.call is not None and d.node in gradients
    ]
    return max(found, default=0.0)


def moments(
    calls: Calls,
    uses: Mapping[Value, Sequence[Use]],
    again: Collection[Value],
    gradients: Mapping[fx.Node, Sequence[bool]],
) -> dict[fx.Node, Moment[fx.Node]]:
    """What there is while each op's backward runs.

    uses        of values that some backward needs
    again       those that are computed again where they are taken as they were made
    gradients   as `least_bytes` takes them
    """
    waiting, computed = _Waiting(calls, gradients), _Computed(calls, uses, again)
    found = {}
    for node in reversed(list(calls)):
        others = computed.at(node)
        if node in gradients:
            found[node] = [*waiting.beside(node), *_own(calls[node][0], node, gradients[node]), *others]
            waiting.after(node)
    return found


def _own(call: OpCall, node: fx.Node, made: Sequence[bool]) -> Iterator[Alive[fx.Node]]:
    for i, (meta, counted) in enumerate(zip((*call.operands, *call.results), made, strict=True)):
        if counted:
            yield Alive(float(size_of(meta)), (node, i))


class _Waiting:
    """Gradients of values, from the first that flows into one to the backward of what made it."""

    def __init__(self, calls: Calls, gradients: Mapping[fx.Node, Sequence[bool]]) -> None:
        self.calls, self.gradients = calls, gradients
        self.before: dict[Use, Use] = {}  # of each use of a value with a gradient the one before, in the order of the forward
        last: dict[Value, Use] = {}
        for node in gradients:
            for i, value in self._flows(node):
                if value in last:
                    self.before[node, i] = last[value]
                last[value] = node, i
        self.there: dict[Value, Alive[fx.Node]] = {}

    def _flows(self, node: fx.Node) -> Iterator[tuple[int, Value]]:
        """The operands into which a gradient flows, and the values that they show."""
        call, sources = self.calls[node]
        for i, (meta, source) in enumerate(zip(call.operands, sources, strict=True)):
            if meta.grad and (value := held_by(source))[0] in self.calls:
                yield i, value

    def beside(self, node: fx.Node) -> Iterator[Alive[fx.Node]]:
        """Those that wait while a node's backward runs, and are not the op's own. A sum's is that of what it sums: one memory."""
        made, first = self.gradients[node], len(self.calls[node][0].operands)
        own = {id(alive) for (maker, k), alive in self.there.items() if maker is node and made[first + k]}
        others = {id(alive): alive for (maker, _), alive in self.there.items() if maker is not node}
        yield from (alive for key, alive in others.items() if key not in own)

    def after(self, node: fx.Node) -> None:
        """What waits once it has run."""
        call, made = self.calls[node][0], self.gradients[node]
        own = [self.there.pop((node, k), None) for k in range(len(call.results))]
        for i, value in self._flows(node):
            if made[i]:
                home = value[0], len(self.calls[value[0]][0].operands) + value[1]
                self.there[value] = Alive(float(size_of(call.operands[i])), (node, i), self.before.get((node, i)), home)
            elif value not in self.there and own[0] is not None and passes_on(call, call.operands[i]):
                self.there[value] = own[0]


class _Computed:
    """Values that are computed again, from their last use in the forward to the first."""

    def __init__(self, calls: Calls, uses: Mapping[Value, Sequence[Use]], again: Collection[Value]) -> None:
        order = {node: i for i, node in enumerate(calls)}
        self.starts: dict[fx.Node, list[Alive[fx.Node]]] = {}
        self.ends: dict[fx.Node, list[Alive[fx.Node]]] = {}
        self.there: dict[Alive[fx.Node], None] = {}
        since: dict[Value, Use] = {}
        for value in sorted(again, key=lambda v: order[v[0]], reverse=True):
            node, k = value
            call, sources = calls[node]
            asked = [*uses[value]] + ([since[value]] if value in since else [])
            if not asked:
                continue
            first, last = (of(asked, key=lambda use: order[use[0]]) for of in (min, max))
            alive = Alive(float(size_of(call.results[k])), last, None, (node, len(call.operands) + k), True)
            self.starts.setdefault(last[0], []).append(alive)
            self.ends.setdefault(first[0], []).append(alive)
            for source in sources:  # they are needed to compute it
                below = held_by(source)
                if below in again and (below not in since or order[since[below][0]] < order[last[0]]):
                    since[below] = last

    def at(self, node: fx.Node) -> list[Alive[fx.Node]]:
        """Those that are there while a node's backward runs. Nodes are asked for in the order of the backward."""
        for alive in self.starts.get(node, ()):
            self.there[alive] = None
        found = list(self.there)
        for alive in self.ends.get(node, ()):
            self.there.pop(alive, None)
        return found
