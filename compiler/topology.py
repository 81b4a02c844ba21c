"""Devices and the network between them: what the cost model knows of a machine, and how long its collectives take.

A topology is a device and levels of network, innermost first: `levels[k].size` devices form one unit of level k (a node, a
cluster). Ranks are numbered so that units are contiguous. Every constant lives in a profile (`compiler/profiles/*.json`) that
names its source, or was measured on the machine itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..runtime.program import Mesh

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]


@dataclass(frozen=True)
class Device:
    """One accelerator, or the share of a CPU that one rank has.

    flops               peak FLOP/s by torch dtype name ("bfloat16"), dense
    memory              bytes                    bandwidth    peak bytes/s of that memory
    matmul_efficiency   share of the peak that large products reach, with everything around them in a real step
    attention_efficiency, memory_efficiency      the same for fused attention, and of the bandwidth for all other ops
    launch              seconds every op takes besides
    """

    name: str
    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    matmul_efficiency: float = 1.0
    attention_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    launch: float = 0.0

    def peak(self, dtype: str) -> float:
        """FLOP/s in `dtype`; that of the next wider one that is known, or the slowest."""
        for name in (dtype, "bfloat16" if dtype == "float16" else dtype, "float32"):
            if name in self.flops:
                return self.flops[name]
        return min(self.flops.values())


@dataclass(frozen=True)
class Level:
    """A layer of the network. `bandwidth`: bytes/s each way that one device achieves; `latency`: seconds of one hop."""

    name: str
    size: int
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Hop:
    """How a group of ranks spreads at one level: `fan_out` units of the level below take part, together."""

    level: Level
    fan_out: int


Span = tuple[Hop, ...]
"""Where a group of ranks lies, innermost level first; levels it does not spread at are left out."""


@dataclass(frozen=True)
class Topology:
    """A device and its network. `sources`: where the constants come from, by name; `overlap`: the share of the communication of
    each role ("data", "tensor", "pipeline") that is hidden behind compute."""

    device: Device
    levels: tuple[Level, ...]
    overlap: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a topology needs at least one level")
        for inner, outer in zip(self.levels, self.levels[1:], strict=False):
            if outer.size % inner.size or outer.size <= inner.size:
                raise ValueError(f"level {outer.name!r} of {outer.size} devices is not made of units of {inner.size}")

    @property
    def world_size(self) -> int:
        return self.levels[-1].size

    @property
    def node_size(self) -> int:
        """Devices of the innermost unit."""
        return self.levels[0].size

    @classmethod
    def preset(cls, name: str, nodes: int = 1, devices: int | None = None) -> Topology:
        """A profile shipped with the package, for `nodes` nodes, or for `devices` devices in all."""
        folder = resources.files(__package__ or __name__.rpartition(".")[0]) / "profiles"
        known = sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))
        if name not in known:
            raise ValueError(f"there is no topology {name!r}; known are {', '.join(known)}")
        return cls.from_json((folder / f"{name}.json").read_text()).resized(nodes, devices)

    def resized(self, nodes: int = 1, devices: int | None = None) -> Topology:
        """The same machine with another number of nodes, or of devices in all."""
        inner = self.levels[0]
        total = devices if devices is not None else nodes * inner.size
        if total <= inner.size:
            return replace(self, levels=(replace(inner, size=total),))
        if len(self.levels) == 1:
            return replace(self, levels=(replace(inner, size=total),))
        if total % inner.size:
            raise ValueError(f"{total} devices are not a whole number of nodes of {inner.size}")
        middle = tuple(level for level in self.levels[1:-1] if level.size < total and total % level.size == 0)
        return replace(self, levels=(inner, *middle, replace(self.levels[-1], size=total)))

    @classmethod
    def from_file(cls, path: str | Path) -> Topology:
        return cls.from_json(Path(path).read_text())

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Topology:
        data = json.loads(text)
        try:
            levels = tuple(Level(**level) for level in data["levels"])
            return cls(Device(**data["device"]), levels, data.get("overlap", {}), data.get("sources", {}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"malformed topology: {error}") from error

    @classmethod
    def measure(cls, device: Any = None, seconds: float = 2.0) -> Topology:
        """This machine, timed for about `seconds`; over the ranks of torch.distributed where it is initialized (a collective)."""
        from .measure import measure

        return measure(device, seconds)

    def span(self, mesh: Mesh, axis: str) -> Span:
        """Where the ranks joined by `axis` (several joined by "+" for a flattened one) lie, `mesh` being numbered row-major."""
        if (mesh, axis) not in self._spans:
            self._spans[mesh, axis] = self._span(mesh, axis)
        return self._spans[mesh, axis]

    @cached_property
    def _spans(self) -> dict[tuple[Mesh, str], Span]:
        return {}

    def collective(self, kind: CollectiveKind, mesh: Mesh, axis: str) -> CollectiveTime:
        """Of a collective over an axis; sizes as of `collective_seconds`."""
        return self.on(mesh).collective(kind, axis)

    def on(self, mesh: Mesh) -> Collectives:
        """What collectives take over the axes of a mesh."""
        if mesh not in self._meshes:
            self._meshes[mesh] = Collectives(self, mesh)
        return self._meshes[mesh]

    @cached_property
    def _meshes(self) -> dict[Mesh, Collectives]:
        return {}

    def _span(self, mesh: Mesh, axis: str) -> Span:
        if mesh.world_size > self.world_size:
            raise ValueError(f"a mesh of {mesh.world_size} ranks does not fit on {self.world_size} devices")
        digits, stride = [], 1
        for name, size in zip(reversed(mesh.axes), reversed(mesh.sizes), strict=True):
            if name in axis.split("+"):
                digits.append((stride, size))
            stride *= size
        return self._hops([_below(level.size, digits) for level in self.levels])

    def span_of(self, ranks: list[int]) -> Span:
        """Where `ranks` lie, judged by the unit of the first of them at every level."""
        return self._hops([sum(rank // level.size == ranks[0] // level.size for rank in ranks) for level in self.levels])

    def _hops(self, together: list[int]) -> Span:
        """`together`: of some ranks, how many one unit of each level holds."""
        hops, inside = [], 1
        for level, count in zip(self.levels, together, strict=True):
            if count > inside:
                hops.append(Hop(level, -(-count // inside)))
                inside = count
        return tuple(hops)


def _below(bound: int, digits: list[tuple[int, int]]) -> int:
    """How many of the numbers sum(stride * i, 0 <= i < size) lie below `bound`; digits (stride, size) from the smallest stride,
    each stride larger than the largest number of those before it."""
    count, all_of = 0, math.prod(size for _, size in digits)
    for stride, size in reversed(digits):
        if bound >= stride * size:
            return count + all_of
        all_of //= size
        count += bound // stride * all_of
        bound %= stride
    return count + (bound > 0)


class CollectiveTime(NamedTuple):
    """Seconds of a collective of no bytes, and of each byte."""

    latency: float
    rate: float

    def of(self, size: float) -> float:
        return self.latency + self.rate * size


@dataclass(frozen=True)
class Collectives:
    """Times of collectives over the axes of one mesh, each found once."""

    topology: Topology
    mesh: Mesh

    def collective(self, kind: CollectiveKind, axis: str) -> CollectiveTime:
        """As `Topology.collective` has it."""
        key = kind, axis
        if key not in self._times:
            self._times[key] = collective_time(kind, self.topology.span(self.mesh, axis))
        return self._times[key]

    @cached_property
    def _times(self) -> dict[tuple[CollectiveKind, str], CollectiveTime]:
        return {}


def collective_seconds(kind: CollectiveKind, size: float, span: Span) -> float:
    """Seconds of a collective.

    size    bytes of the whole value: the result of an all-gather, the operand of a reduce-scatter, an all-reduce or a broadcast,
            all that one rank holds before an all-to-all, the message of a send
    """
    return collective_time(kind, span).of(size)


def collective_time(kind: CollectiveKind, span: Span) -> CollectiveTime:
    """Ring or tree latency, and bytes over bandwidth.

    Ring algorithms (Thakur, Rabenseifner, Gropp 2005, sections 4.1 and 4.4): n - 1 steps, (n - 1)/n of the whole per rank; an
    all-reduce is a reduce-scatter and an all-gather, or, where that has less latency, a tree (NCCL, src/graph/tuning.cc, chooses
    so too). A ring that leaves a unit does so once for all its members there, whose links add up: at each level the bytes pass
    at `bandwidth` x members inside, and the slowest level decides.
    """
    if not span:
        return CollectiveTime(0.0, 0.0)
    n = math.prod(hop.fan_out for hop in span)
    bandwidth, inside = math.inf, 1
    ring = tree = 0.0
    outside = n
    for hop in span:
        bandwidth = min(bandwidth, hop.level.bandwidth * inside)
        inside *= hop.fan_out
        ring += (outside - outside // hop.fan_out) * hop.level.latency
        tree += math.ceil(math.log2(hop.fan_out)) * hop.level.latency
        outside //= hop.fan_out
    share = (n - 1) / n
    match kind:
        case "all_reduce":
            return CollectiveTime(2 * min(ring, tree), 2 * share / bandwidth)
        case "all_gather" | "reduce_scatter":
            return CollectiveTime(ring, share / bandwidth)
        case "all_to_all":
            return CollectiveTime(ring, _all_to_all_rate(span, n))
        case "broadcast":
            return CollectiveTime(tree, 1 / bandwidth)
        case "send":
            outermost = span[-1].level
            return CollectiveTime(outermost.latency, 1 / outermost.bandwidth)
    raise ValueError(f"unknown collective {kind!r}")


def _all_to_all_rate(span: Span, n: int) -> float:
    """Each rank sends 1/n of what it holds to every other: what leaves its unit at a level goes over its own link there."""
    slowest, inside = 0.0, 1
    for hop in span:
        slowest = max(slowest, (n - inside) / n / hop.level.bandwidth)
        inside *= hop.fan_out
    return slowest


def collective_bytes(kind: CollectiveKind, size: float, n: int) -> float:
    """Bytes that each of n ranks receives over the wire, with the algorithms of `collective_seconds`; sizes as there."""
    if n == 1:
        return 0.0
    share = (n - 1) / n
    return {"all_reduce": 2 * share, "broadcast": 1.0, "send": 1.0}.get(kind, share) * size
