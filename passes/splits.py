"""Which uneven or sectioned cuts of a dim are worth offering: those that some op of the graph needs.

The even cut of a dim is always offered (`base.own_cuts`). A head count of 3 over 2 ranks, or a fused projection, which is split,
asks for another cut of the dims it touches; this pass carries such wishes from dim to dim through the factors of each op's rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .rules.base import Axis, Factor, OpCall, Rule, Splits, own_cuts, own_extra
from .types import Sections, Varying

LIMIT = 6
"""Cuts kept for one dim: a graph rarely has more than two that matter."""

Value = tuple[str, int]
"""A value: the name of the node that makes it, and which of its results."""


@dataclass(frozen=True)
class Site:
    """An op call with its rule and the values at its operands and results."""

    call: OpCall
    rule: Rule | None
    operands: tuple[Value, ...]
    results: tuple[Value, ...]


class Cuts:
    """Cuts known for each dim of each value, beyond the axis's own."""

    def __init__(self, given: Mapping[Value, Varying] | None = None) -> None:
        self.known: dict[tuple[Value, int], list[Sections]] = {}
        for value, shard in (given or {}).items():
            self.known[value, shard.dim] = [shard.sections]

    def add(self, value: Value, dim: int, size: int, sections: Sections, axis: Axis) -> bool:
        if sections in own_cuts(size, axis):
            return False
        have = self.known.setdefault((value, dim), [])
        if sections in have or len(have) >= LIMIT:
            return False
        have.append(sections)
        return True

    def of(self, site: Site) -> Splits:
        found: dict[tuple[str, int, int], list[Sections]] = {}
        for side, values, metas in (("in", site.operands, site.call.operands), ("out", site.results, site.call.results)):
            for i, (value, meta) in enumerate(zip(values, metas, strict=True)):
                for dim in range(len(meta.shape)):
                    if (value, dim) in self.known:
                        found[side, i, dim] = self.known[value, dim]
        return found


def spread(sites: Sequence[Site], axis: Axis, cuts: Cuts) -> Cuts:
    """Carry cuts through the graph until nothing is new. Forward and backward sweeps: few are needed."""
    changed = True
    while changed:
        changed = False
        for site in (*sites, *reversed(sites)):
            if site.rule is not None:
                changed |= _visit(site, site.rule, axis, cuts)
    return cuts


def _visit(site: Site, rule: Rule, axis: Axis, cuts: Cuts) -> bool:
    changed = False
    for factor in rule.factors:
        wishes = own_cuts(factor.size, axis)
        wishes += _wishes(site, factor, cuts)
        for side, slots in (("in", factor.operands), ("out", factor.results)):
            values = site.operands if side == "in" else site.results
            metas = site.call.operands if side == "in" else site.call.results
            for i, slot in enumerate(slots):
                if slot is None:
                    continue
                for cut in wishes:
                    held = slot.place(cut)
                    changed |= cuts.add(values[i], slot.dim, metas[i].shape[slot.dim], held.sections, axis)
    for strategy in own_extra(rule, axis):
        for values, metas, types in (
            (site.operands, site.call.operands, strategy.ins),
            (site.results, site.call.results, strategy.outs),
        ):
            for value, meta, type_ in zip(values, metas, types, strict=True):
                if isinstance(type_, Varying):
                    changed |= cuts.add(value, type_.dim, meta.shape[type_.dim], type_.sections, axis)
    return changed


def _wishes(site: Site, factor: Factor, cuts: Cuts) -> list[Sections]:
    found: list[Sections] = []
    for values, slots in ((site.operands, factor.operands), (site.results, factor.results)):
        for value, slot in zip(values, slots, strict=True):
            if slot is None:
                continue
            for sections in cuts.known.get((value, slot.dim), ()):
                cut = slot.factor_sections(sections)
                if cut is not None and cut not in found and sum(map(sum, cut)) == factor.size:
                    found.append(cut)
    return found
