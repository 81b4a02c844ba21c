"""What to say where no plan fits in memory: by how much the smallest misses, where its bytes lie, and what would fit."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..passes.rules.base import Axis
from ..passes.types import I
from .candidates import Candidate, Search
from .cost import size_of
from .gradient_sums import GradientSums
from .keeping import kept_values
from .plan import Plan
from .prices import held
from .step_cost import frozen_bytes
from .step_sums import Part, level_of
from .strategy import Strategy
from .topology import Topology
from .units import bytes_text

SCALED = 0.98
"""Of the limit, what a plan for other rows or devices may take: its costs are scaled from another capture."""

GROWN = 8
"""At most so many times the least number of devices that could fit is looked at."""

MOST = 1024
"""More than so many times the devices are no proposal."""

ROUNDS = 3
"""So often a plan smaller than the smallest known is searched for."""

SMALLER = 0.99
"""So much smaller it must be."""

LOOKED_AT = 32
"""Of the smallest plans, those that are priced with fewer rows."""


@dataclass(frozen=True)
class Change:
    """What would fit: arguments of `plan` to change, and the plan that was found with them.

    times         the seconds per sample, or the devices, of the smallest plan
    strategy, rows, devices, memory_limit     the new ones, None for what stays
    """

    text: str
    times: float
    plan: Plan
    strategy: Strategy | None = None
    rows: int | None = None
    devices: int | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Misfit:
    """Why nothing fits, and the changes that would, the cheapest first: each was planned."""

    text: str
    changes: tuple[Change, ...]


def why_nothing_fits(search: Search, candidates: Sequence[Candidate], limit: float) -> Misfit:
    """By how much the smallest plan misses, where its bytes lie, and the changes that would fit."""
    least = _smallest(search, min(candidates, key=_peak))
    peak, parts = _peak(least), least.predicted.parts
    state, kept, gathered = (parts[f"{what} bytes"] for what in ("state", "activation", "gathered"))
    freed = _freed(search, least)
    grown = None if freed else _more_devices(search, least)
    found = [freed, _fewer_rows(search, candidates), grown, _more_memory(least)]
    changes = tuple(sorted((c for c in found if c), key=lambda c: c.times))
    besides = f", {bytes_text(gathered)} of parameters and gradients that are whole for a while" if gathered else ""
    places = "".join(f"\n  {line}" for line in _largest(search, least))
    text = (
        f"no plan fits {bytes_text(limit)} per rank: the smallest found, {least.plan.name}, needs {bytes_text(peak)} "
        f"({bytes_text(state)} of parameters, gradients and optimizer state, {bytes_text(kept)} of activations{besides}), "
        f"{bytes_text(peak - limit)} too much. Most of it:{places}\n"
        f"What would fit, the cheapest first: {'; '.join(c.text for c in changes)}"
    )
    return Misfit(text, changes)


def _peak(candidate: Candidate) -> float:
    return candidate.predicted.peak_bytes


def _smallest(search: Search, least: Candidate) -> Candidate:
    """It, or a smaller one that is found at once."""
    for _ in range(ROUNDS):
        found = search.of(limit=SMALLER * _peak(least)).first()
        if found is None:
            break
        least = found
    return least


def _freed(search: Search, least: Candidate) -> Change | None:
    """The fastest plan that fits without the user's pins."""
    freed = search.without_pins()
    fitting = [c for c in freed.candidates() if freed.fits(c)] if freed is not None else []
    if not fitting:
        return None
    best = min(fitting, key=lambda c: c.per_sample)
    text = f"{best.plan.name}, which your strategy rules out ({bytes_text(_peak(best))})"
    return Change(text, best.per_sample / least.per_sample, best.plan, strategy=Strategy())


def _fewer_rows(search: Search, candidates: Sequence[Candidate]) -> Change | None:
    """The most samples with which one of the smallest plans fits, where the search then finds one too."""
    plans = [c.plan for c in sorted(candidates, key=_peak)[:LOOKED_AT]]

    def fitting(rows: int) -> bool:
        other = search.of(rows=rows, limit=SCALED * search.limit)
        return any(_can_run(other, plan) and other.fits(other.price(plan)) for plan in plans)

    most = bisect_right(range(1, search.batch.rows), 0, key=lambda rows: int(not fitting(rows)))
    found = search.of(rows=most, limit=SCALED * search.limit).first() if most else None
    if found is None:
        return None
    return Change(f"a batch of {most} instead of {search.batch.rows} samples", 1.0, found.plan, rows=most)


def _can_run(search: Search, plan: Plan) -> bool:
    """Whether there are samples for its data ranks and micro-batches."""
    few = search.batch.mode == "global" and plan.data_size > search.batch.rows
    return not plan.whole and not few and plan.microbatches <= search.batch.local_rows(plan.mesh)


def _more_devices(search: Search, least: Candidate) -> Change | None:
    """The first of twice, four times, ... the devices that fits, from the least that could."""
    if search.limit <= 0:
        return None
    world = search.request.world_size
    start = max(1, math.floor(math.log2(_peak(least) / search.limit)))
    for times in (2**k for k in range(start, min(start + GROWN.bit_length(), MOST.bit_length()))):
        request = replace(search.request, world_size=times * world)
        grown = search.of(request=request, topology=_grown(search.topology, times * world), limit=SCALED * search.limit)
        found = grown.first()
        if found is not None:
            return Change(f"{times} x the devices ({times * world})", float(times), found.plan, devices=times * world)
    return None


def _grown(topology: Topology, devices: int) -> Topology:
    """Where there are fewer: more units of the innermost level, which stays as large, for how large it could be is not known."""
    *inner, last = topology.levels
    if devices <= last.size:
        return topology
    unit = inner[-1].size if inner else last.size
    whole = -(-devices // unit) * unit
    if inner:
        return topology.resized(devices=whole)
    return replace(topology, levels=(last, replace(last, size=whole)))


def _more_memory(least: Candidate) -> Change:
    size = math.ceil(_peak(least))
    return Change(f"memory_limit={size:d} where the devices have it", math.inf, least.plan, memory_limit=size)


def _largest(search: Search, candidate: Candidate, count: int = 3) -> Iterator[str]:
    """Where the most bytes of a plan lie: lines of the model with the activations that are kept of them, and parameters."""
    plan, parts = candidate.plan, candidate.predicted.parts
    n = plan.mesh.size("tp")
    placement = search.placement(plan)
    axis = Axis("tp", n)
    lines: dict[str, list[float]] = {}
    for node, size in kept_values(search.calls, search.kept, placement, axis):
        if size:
            lines.setdefault(str(node.meta.get("source") or node.name), []).append(size)
    whole = sum(map(sum, lines.values())) or 1.0
    found = [
        (sum(sizes) / whole * parts["activation bytes"], f"activations, {len(sizes)} x {line}") for line, sizes in lines.items()
    ]
    for key, meta in search.parameters.items():
        size, name = size_of(meta) * held(placement.placeholders[key] if placement else I, axis), key.removeprefix("param.")
        if meta.grad:
            own = Part(GradientSums(plan.mesh, level_of(plan.zero_of(name)), search.topology), size, 0.0)
            found.append((own.state(1.0), f"{name}, its gradient and its optimizer state"))
        else:
            found.append((frozen_bytes(plan.zero, plan.mesh.size("dp_shard"), size), f"{name}, frozen"))
    for size, what in sorted(found, reverse=True)[:count]:
        yield f"{bytes_text(size)}  {' '.join(what.split())}"
