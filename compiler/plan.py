"""A plan: every decision that turns a model into programs. Data, hashable by content, and JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from ..passes.types import I, P, R, Type, Varying
from ..runtime.program import Mesh
from .layouts import Layouts
from .topology import Topology

DATA_AXES = ("dp_replicate", "dp_shard")


def data_size(mesh: Mesh) -> int:
    """Data ranks of a mesh."""
    return math.prod(mesh.size(axis) for axis in DATA_AXES)


def encode_type(type_: Type) -> Any:
    return [type_.dim, type_.sections] if isinstance(type_, Varying) else str(type_)


def decode_type(value: Any) -> Type:
    if isinstance(value, str):
        return {"I": I, "R": R, "P": P}[value]
    dim, sections = value
    return Varying(int(dim), tuple(tuple(int(n) for n in s) for s in sections))


@dataclass(frozen=True)
class Prediction:
    """What a plan is expected to cost: seconds a step, bytes a rank at the peak, bytes received a rank and step by axis.

    gap    by how much at most, relative to its time, a plan that fits could be faster, of those that the search is for: proven. Of
           Megatron's layouts alone, where these are pinned, what is cheaper at their prices with like blocks placed alike
    """

    step_seconds: float
    peak_bytes: float
    traffic: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    gap: float = 0.0


@dataclass(frozen=True)
class Alternative:
    """A plan that lost, and why."""

    name: str
    step_seconds: float
    peak_bytes: float
    reason: str


@dataclass(frozen=True)
class Plan:
    """mesh             axes of more than one rank, major first, of pp, dp_replicate, dp_shard, tp
    zero             0 to 3
    whole            under ZeRO-3: parameters that are gathered once a step and stay whole, as under ZeRO-2
    small_copies     ZeRO leaves a rank the smallest shards of what tp holds copies of, even where their sums take longer for it
    beside           of the first sum of what tp holds copies of, the share that is to run beside the backward: chosen are the
                     sums of which that leaves the least
    layout           parameter -> its type over "tp" before ZeRO; "I" where absent
    stage_of         parameter -> its first pipeline stage
    microbatches     micro-batches of one data rank's batch
    layouts          how values lie over tp: those that are not Megatron's are by time on `topology`
    topology         the machine it was made for: how values change their types depends on it; None where no machine is known
    """

    mesh: Mesh
    zero: int = 0
    whole: tuple[str, ...] = ()
    small_copies: bool = False
    beside: float = 0.0
    layouts: Layouts = Layouts()
    schedule: str = "1f1b"
    microbatches: int = 1
    layout: Mapping[str, Type] = field(default_factory=dict)
    stage_of: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"
    topology: Topology | None = None
    predicted: Prediction | None = None
    alternatives: tuple[Alternative, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def data_axes(self) -> tuple[str, ...]:
        return tuple(a for a in self.mesh.axes if a in DATA_AXES)

    @property
    def data_size(self) -> int:
        return data_size(self.mesh)

    @property
    def stages(self) -> int:
        return self.mesh.size("pp")

    @property
    def name(self) -> str:
        """`dp_shard=4 (zero 3) x tp=2, pp=2 (1f1b, 8 micro-batches)`."""
        parts = []
        for axis, size in zip(self.mesh.axes, self.mesh.sizes, strict=True):
            extra = ""
            if axis == "dp_shard" and self.zero:
                whole = f", {len(self.whole)} parameters whole" if self.whole else ""
                extra = f" (zero {self.zero}{whole}{', small copies' if self.small_copies else ''})"
            if axis == "tp" and self.layouts.any:
                mixed = self.layouts.mixed
                extra = f" (any layouts, {len(mixed.blocks)} blocks in others)" if mixed else " (any layouts)"
            elif axis == "tp" and self.layouts.sequence:
                extra = " (sequence parallel)"
            if axis == "pp":
                extra = f" ({self.schedule}, {self.microbatches} micro-batches)"
            parts.append(f"{axis}={size}{extra}")
        name = " x ".join(parts) or "one device"
        return f"{name}, {self.microbatches} micro-batches" if self.stages == 1 < self.microbatches else name

    def zero_of(self, name: str) -> int:
        """The ZeRO level of a parameter."""
        return 2 if name in self._whole else self.zero

    @cached_property
    def _whole(self) -> frozenset[str]:
        return frozenset(self.whole)

    def data_rank(self, coordinates: Mapping[str, int]) -> int:
        rank = 0
        for axis in self.data_axes:
            rank = rank * self.mesh.size(axis) + coordinates[axis]
        return rank

    def explain(self, name: str | None = None) -> str:
        """What was chosen and why, or where one parameter lives, as text."""
        from .explain import explain

        return explain(self, name)

    def to_json(self) -> str:
        data = asdict(self)
        data["layout"] = {k: encode_type(t) for k, t in sorted(self.layout.items())}
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        data = json.loads(text)
        mesh = Mesh(tuple(data["mesh"]["axes"]), tuple(data["mesh"]["sizes"]))
        predicted, topology = data["predicted"], data.get("topology")
        return cls(
            mesh=mesh,
            zero=data["zero"],
            whole=tuple(data.get("whole", ())),
            small_copies=data.get("small_copies", False),
            beside=data.get("beside", 0.0),
            layouts=Layouts.from_data(data["layouts"]),
            schedule=data["schedule"],
            microbatches=data["microbatches"],
            layout={k: decode_type(t) for k, t in data["layout"].items()},
            stage_of=data["stage_of"],
            device=data["device"],
            topology=Topology.from_json(json.dumps(topology)) if topology else None,
            predicted=Prediction(**predicted) if predicted else None,
            alternatives=tuple(Alternative(**a) for a in data["alternatives"]),
            reasons=tuple(data["reasons"]),
        )

    @property
    def hash(self) -> str:
        """Of the decisions alone: equal plans emit equal programs."""
        data = json.loads(self.to_json())
        for soft in ("predicted", "alternatives", "reasons"):
            del data[soft]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
