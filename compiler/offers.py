"""What an axis offers each node of a graph, found from the rules once: placements at other prices choose from the same.

Nodes at the same position of identical blocks (meta["twins"] of the graph) are one decision; where blocks are in groups, of those
of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import fx

from ..passes.graph_tools import Calls, is_getitem, metas, result_of
from ..passes.rules.base import Axis, OpCall, Strategy, TensorMeta, find_rule, strategies
from ..passes.splits import Cuts, Site, Value, spread
from ..passes.types import I, R, Type, Varying, even_sections
from .groups import Groups, group_of, regrouped, stand_ins
from .parts import Part, parts

Role = Literal["data", "time", "tensor"]

Uses = tuple[tuple[int, int], ...]
"""Those who read a value: indices of decisions (or, after these, of outputs), and which of their operands it is."""


@dataclass
class Decision:
    """One node, standing for all nodes at the same place of identical blocks.

    index       its place among all decisions
    operands    its own
    places      how many of the nodes take which operands: later ones have others where one block hands values to the next
    offered     the ways in which it may run
    group       of the blocks that it is in
    """

    name: str
    index: int
    node: fx.Node
    values: tuple[Value, ...] = ()
    operands: tuple[Value, ...] = ()
    places: Counter[tuple[Value, ...]] = field(default_factory=Counter)
    call: OpCall | None = None
    site: Site | None = None
    offered: Sequence[Strategy] = ()
    group: int = 0


@dataclass(frozen=True)
class Offers:
    """decisions    by the name of their node, in the graph's order
    meta         of each value that a decision makes
    exits        the value that each output of the graph is
    uses         which nodes at a value's place give it to the same uses, and how many: a block's last repetition may serve others
                 than the first ones do, and pays for the conversions that these need alone
    stand_ins    `groups.stand_ins`
    """

    axis: Axis
    decisions: Mapping[str, Decision]
    meta: Mapping[Value, TensorMeta]
    exits: Sequence[Value]
    uses: Mapping[tuple[Value, Uses], Part]
    twins: Mapping[str, str]
    cuts: Cuts
    stand_ins: Mapping[object, tuple[int, float]]

    def first(self, node: fx.Node) -> str:
        """The name of the decision that a node is part of."""
        return self.twins.get(node.name, node.name)

    @cached_property
    def order(self) -> list[Decision]:
        return list(self.decisions.values())

    def own(self, strategy: Strategy, node: fx.Node, call: OpCall) -> Strategy:
        """What a strategy of the first node at its place is for `node`, which makes `call`: the same, but where it says what to run
        and the calls differ, as those of random ops do by their site."""
        decision = self.decisions[self.first(node)]
        if strategy.target is None or decision.site is None or call == decision.call:
            return strategy
        types = strategy.ins, strategy.outs
        return next(s for s in options(replace(decision.site, call=call), self.axis, self.cuts) if (s.ins, s.outs) == types)


def offers(
    gm: fx.GraphModule,
    axis: Axis,
    calls: Calls,
    role: Role,
    pinned: Mapping[str, Type] | None = None,
    slices: Mapping[str, Type] | None = None,
    groups: Groups | None = None,
) -> Offers:
    """What `axis` offers in a role; `role`, `pinned` and `slices` are those of `place.Policy`.

    groups    of blocks that are placed each by themselves
    """
    pinned, slices, groups = pinned or {}, slices or {}, groups or {}
    twins = regrouped(gm, groups, pinned)
    decisions: dict[str, Decision] = {}
    meta: dict[Value, TensorMeta] = {}
    cut: dict[Value, Varying] = {}
    sites: list[Site] = []

    def value_of(node: fx.Node) -> Value:
        source, k = result_of(node)
        return twins.get(source.name, source.name), k

    for node in gm.graph.nodes:
        name = twins.get(node.name, node.name)
        if node.op == "output" or is_getitem(node):
            continue
        operands = tuple(map(value_of, calls[node][1])) if node.op != "placeholder" else ()
        if name in decisions:
            decisions[name].places[operands] += 1
            continue
        results = {(name, k): m for k, m in enumerate(metas(node))}
        meta.update(results)
        own, group = tuple(results), group_of(node, groups)
        decision = decisions[name] = Decision(name, len(decisions), node, own, operands, Counter([operands]), group=group)
        if node.op == "placeholder":
            type_ = pinned.get(node.meta["key"]) or slices.get(node.meta["key"])
            if isinstance(type_, Varying):
                cut[name, 0] = type_
            continue
        decision.call = calls[node][0]
        decision.site = Site(decision.call, find_rule(decision.call, axis), operands, decision.values)
        sites.append(decision.site)
    again = [replace(s, operands=o) for s in sites for o in decisions[s.results[0][0]].places if o != s.operands]
    cuts = spread((*sites, *again), axis, Cuts(cut))
    for decision in decisions.values():
        if decision.site is not None:
            decision.offered = options(decision.site, axis, cuts)
        else:
            types = _placeholder_types(decision, axis, role, pinned, cuts)
            decision.offered = [Strategy(str(t), (), (t,)) for t in types]
    results = list(next(n for n in gm.graph.nodes if n.op == "output").args[0])  # type: ignore[arg-type]
    uses = _uses(calls, results, decisions, twins)
    return Offers(axis, decisions, meta, [*map(value_of, results)], uses, twins, cuts, stand_ins(gm, groups))


def options(site: Site, axis: Axis, cuts: Cuts) -> list[Strategy]:
    """The strategies of a call that differ in their types."""
    assert site.call is not None
    seen: dict[Any, Strategy] = {}
    for s in strategies(site.call, axis, cuts.of(site), site.rule):
        ins = tuple(canonical(t, m.grad) for t, m in zip(s.ins, site.call.operands, strict=True))
        outs = tuple(canonical(t, m.grad) for t, m in zip(s.outs, site.call.results, strict=True))
        seen.setdefault((ins, outs), s)
    return list(seen.values())


def canonical(type_: Type, grad: bool) -> Type:
    """Of the types that are one where there are no gradients, one."""
    return I if type_ == R and not grad else type_


def _placeholder_types(decision: Decision, axis: Axis, role: Role, pinned: Mapping[str, Type], cuts: Cuts) -> list[Type]:
    key, meta = decision.node.meta["key"], metas(decision.node)[0]
    if key in pinned:
        return [pinned[key]]
    if not key.startswith("param."):
        return [I]
    whole: Type = R if meta.grad else I
    if role != "tensor":
        return [whole]
    types: list[Type] = [I] if whole == I else [I, R]
    for dim, size in enumerate(meta.shape):
        if size >= axis.size > 1:
            types.append(Varying(dim, even_sections(size, axis.size)))
        for sections in cuts.known.get(((decision.name, 0), dim), ()):
            if all(sum(column) for column in zip(*sections, strict=True)):
                types.append(Varying(dim, sections))
    return types


def _uses(
    calls: Calls, results: Sequence[fx.Node], decisions: Mapping[str, Decision], twins: Mapping[str, str]
) -> dict[tuple[Value, Uses], Part]:
    uses: dict[tuple[fx.Node, int], dict[tuple[int, int], list[fx.Node | None]]] = {}
    for node, (_, sources) in calls.items():
        reader = decisions[twins.get(node.name, node.name)].index
        for k, source in enumerate(sources):
            uses.setdefault(result_of(source), {}).setdefault((reader, k), []).append(node)
    for reader, result in enumerate(results, len(decisions)):
        uses.setdefault(result_of(result), {}).setdefault((reader, 0), []).append(None)
    found = ((((twins.get(maker.name, maker.name), k), tuple(own)), maker, own) for (maker, k), own in uses.items())
    return parts(found)
