"""A plan as text: what was chosen, what it costs, why, and what lost."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..passes.types import Type, Varying
from .plan import Plan
from .units import bytes_text, seconds_text


def explain(plan: Plan, name: str | None = None, width: int = 110) -> str:
    """The plan, or the placement of one parameter, as plain text."""
    if name is not None:
        return _parameter(plan, name)
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(f"Plan {plan.hash}: {plan.name}")
    if plan.predicted is not None:
        step, peak = seconds_text(plan.predicted.step_seconds), bytes_text(plan.predicted.peak_bytes)
        console.print(f"Predicted: {step} a step, {peak} a rank at the peak")
        gap = plan.predicted.gap
        if plan.mesh.size("tp") > 1 and not plan.layouts.any:
            proven = "proven optimal" if gap == 0 else f"within {max(gap, 1e-4):.2%} of the cheapest possible"
            console.print(f"Placement over tp={plan.mesh.size('tp')}: {proven}")
        elif plan.mesh.size("tp") > 1 or gap:
            console.print(f"Proven: no plan that fits takes over {max(gap, 1e-4):.2%} less time for a sample")
    if plan.layouts.mixed is not None:
        console.print(f"In other layouts than the rest: blocks {_ranges(plan.layouts.mixed.blocks)}")
    for reason in plan.reasons:
        console.print(reason)
    if plan.layout:
        table = Table(title=f"Parameters over tp={plan.mesh.size('tp')}", title_justify="left")
        table.add_column("placement")
        table.add_column("parameters", justify="right")
        table.add_column("for example")
        placements: dict[str, list[str]] = {}
        for parameter, type_ in plan.layout.items():
            placements.setdefault(describe(type_), []).append(parameter)
        for text, names in sorted(placements.items(), key=lambda i: -len(i[1])):
            table.add_row(text, str(len(names)), names[0])
        console.print(table)
    if plan.stages > 1:
        counts = Counter(plan.stage_of.values())
        console.print("Parameters by pipeline stage: " + ", ".join(f"{k}: {counts.get(k, 0)}" for k in range(plan.stages)))
    if plan.alternatives:
        table = Table(title="Runners-up", title_justify="left")
        for column in ("plan", "step", "memory", "why it lost"):
            table.add_column(column, justify="right" if column in ("step", "memory") else "left")
        for other in plan.alternatives:
            table.add_row(other.name, seconds_text(other.step_seconds), bytes_text(other.peak_bytes), other.reason)
        console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 8`, of numbers that ascend."""
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), key=lambda found: found[1] - found[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _parameter(plan: Plan, name: str) -> str:
    placed = {*plan.layout, *plan.stage_of}
    if placed and name not in placed:
        raise KeyError(f"the plan places no parameter {name!r}; it places {', '.join(sorted(placed)[:8])}, ...")
    parts = []
    if name in plan.stage_of:
        parts.append(f"pipeline stage {plan.stage_of[name]}")
    if name in plan.layout:
        parts.append(f"over tp: {describe(plan.layout[name])}")
    if plan.zero and plan.mesh.size("dp_shard") > 1:
        what = {1: "optimizer state", 2: "optimizer state and gradient", 3: "all of it"}[plan.zero_of(name)]
        parts.append(f"over dp_shard: {what} sharded (ZeRO-{plan.zero_of(name)})")
    unnamed = "" if placed or name in plan.whole else " (as all parameters: the plan names none)"
    return f"{name}: {'; '.join(parts) or 'whole on every rank'}{unnamed}"


def describe(type_: Type) -> str:
    """A placement in DTensor's words."""
    if isinstance(type_, Varying):
        even = "" if type_.is_even else ", uneven"
        return (
            f"Shard({type_.dim}{even})" if type_.is_plain else f"Shard({type_.dim}), {len(type_.sections)} sections each cut{even}"
        )
    return "Replicate, gradient summed once a step" if str(type_) == "R" else "Replicate"
