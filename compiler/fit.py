"""What to say where no plan fits in memory: by how much the smallest misses, where its bytes lie, and what would fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..passes.rules.base import Axis
from ..passes.types import I
from .candidates import Candidate, Search
from .cost import size_of
from .gradient_sums import GradientSums
from .keeping import kept_values
from .prices import held
from .step_cost import frozen_bytes
from .step_sums import Part, level_of
from .units import bytes_text


def why_nothing_fits(search: Search, candidates: Sequence[Candidate], limit: float) -> str:
    """By how much the smallest plan misses, where its bytes lie, and the changes that would fit, the cheapest first."""
    least = min(candidates, key=lambda c: c.predicted.peak_bytes)
    peak, parts = least.predicted.peak_bytes, least.predicted.parts
    state, kept, gathered = (parts[f"{what} bytes"] for what in ("state", "activation", "gathered"))
    freed = search.without_pins()
    fitting = [c for c in freed.candidates() if c.predicted.peak_bytes <= limit] if freed is not None else []
    ways: list[tuple[float, str]] = []
    """(how many times the seconds per sample, or the devices, of the smallest plan; what)"""
    if fitting:
        best = min(fitting, key=lambda c: c.per_sample)
        what = f"{best.plan.name}, which your strategy rules out ({bytes_text(best.predicted.peak_bytes)})"
        ways.append((best.per_sample / least.per_sample, what))
    rows = int(search.batch.rows * (limit - state - gathered) / kept) if kept else 0
    if 1 <= rows < search.batch.rows:
        ways.append((1.0, f"a batch of {rows} instead of {search.batch.rows} samples"))
    if not fitting and limit > 0:
        ways.append((peak / limit, f"about {math.ceil(peak / limit)} x the devices"))
    ways.append((math.inf, f"memory_limit={math.ceil(peak):d} where the devices have it"))
    besides = f", {bytes_text(gathered)} of parameters and gradients that are whole for a while" if gathered else ""
    places = "".join(f"\n  {line}" for line in _largest(search, least))
    return (
        f"no plan fits {bytes_text(limit)} per rank: the smallest, {least.plan.name}, needs {bytes_text(peak)} "
        f"({bytes_text(state)} of parameters, gradients and optimizer state, {bytes_text(kept)} of activations{besides}), "
        f"{bytes_text(peak - limit)} too much. Most of it:{places}\n"
        f"What would fit, the cheapest first: {'; '.join(what for _, what in sorted(ways))}"
    )


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
            found.append((frozen_bytes(plan, size), f"{name}, frozen"))
    for size, what in sorted(found, reverse=True)[:count]:
        yield f"{bytes_text(size)}  {' '.join(what.split())}"
