"""What ZeRO could do with one parameter: at each level, what its sums and gathers take of a step, and what a rank holds of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..runtime.program import Mesh
from .gradient_sums import GradientSums
from .plan import Plan
from .step_cost import frozen_bytes
from .step_sums import Part, level_of
from .topology import CollectiveKind, Topology


@dataclass(frozen=True)
class Parameter:
    """Its bytes on a rank, whole over the data axes. trained, again: whether it has a gradient, and whether the
    backward reads it; copied: whether tp holds copies whose gradients are summed."""

    size: float
    trained: bool
    again: bool
    copied: bool


@dataclass(frozen=True)
class Level:
    """zero      0, 2 (1 runs as 2 does) or 3
    seconds   of a step, in which its gradient is summed and it is gathered, latencies aside and whatever runs beside them
    held      bytes that a rank holds all the time of it, its gradient and its optimizer state
    """

    zero: int
    seconds: float
    held: float

    @property
    def name(self) -> str:
        return f"ZeRO-{self.zero}" if self.zero else "whole on every data rank"


def levels(plan: Plan, topology: Topology, name: str, parameter: Parameter) -> list[Level]:
    """The plan's own, and after it the others, the fastest first. There are no others without data ranks."""
    mesh, own = plan.mesh, level_of(plan.zero_of(name)) if plan.mesh.size("dp_shard") > 1 else 0
    found = {own: _level(plan, mesh, topology, own, parameter)}
    for zero in (0, 2, 3) if plan.data_size > 1 else ():
        if zero != own:
            found[zero] = _level(plan, mesh if mesh.size("dp_shard") > 1 else _sharded(mesh), topology, zero, parameter)
    return [found.pop(own), *sorted(found.values(), key=lambda level: (level.seconds, level.held))]


def _sharded(mesh: Mesh) -> Mesh:
    """ZeRO over the data ranks of a mesh that shards nothing over them."""
    return replace(mesh, axes=tuple("dp_shard" if axis == "dp_replicate" else axis for axis in mesh.axes))


def _level(plan: Plan, mesh: Mesh, topology: Topology, zero: int, parameter: Parameter) -> Level:
    sums, size = GradientSums(mesh, zero, topology, plan.small_copies, plan.beside), parameter.size
    seconds, held = 0.0, frozen_bytes(zero, mesh.size("dp_shard"), size)
    if parameter.trained:
        part = Part(sums, 0.0 if parameter.copied else size, size if parameter.copied else 0.0)
        seconds, held = part.own * sums.own_rate + part.at_least(), part.state(1.0)
    if zero == 3:
        times: dict[CollectiveKind, int] = {"all_gather": 1 + parameter.again, "reduce_scatter": int(parameter.trained)}
        rates = (n * topology.collective(kind, mesh, "dp_shard").rate for kind, n in times.items())
        seconds += plan.microbatches * sum(rates) * size
    return Level(zero, seconds, held)
