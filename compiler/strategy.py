"""What the user fixes about how a model is split over devices, and the meshes that agree with it.

Roles of mesh axes, major first as ranks are numbered unless the user's mesh has its own order:

    pp              pipeline stages
    dp_replicate    data parallel, parameters replicated
    dp_shard        data parallel, parameters, gradients or optimizer state sharded (ZeRO)
    tp              tensor parallel

`dp` names the product of the two data axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..runtime.program import Mesh

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
RESERVED = ("cp", "ep")
_DEGREES = ("dp", *AXES)
Schedule = Literal["gpipe", "1f1b"]
Layout = Literal["megatron", "any"]


class StrategyError(ValueError):
    """A request that cannot be met. The message names what does not fit and what would."""


@dataclass(frozen=True)
class Strategy:
    """What to fix; None is left to the search.

    dp, dp_replicate, dp_shard, tp, pp    sizes of the axes (dp = dp_replicate x dp_shard)
    zero                what is sharded over dp_shard: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters
    sequence_parallel   shard activations over tp between the tensor-parallel regions too
    layouts             how values lie over tp: "megatron", or "any", whichever take the least time. Left out: Megatron's where tp
                        or sequence_parallel is pinned, else any
    schedule            order of micro-batches in a pipeline
    microbatches        micro-batches per step and data rank
    """

    dp: int | None = None
    dp_replicate: int | None = None
    dp_shard: int | None = None
    tp: int | None = None
    pp: int | None = None
    zero: Literal[0, 1, 2, 3] | None = None
    sequence_parallel: bool | None = None
    layouts: Layout | None = None
    schedule: Schedule | None = None
    microbatches: int | None = None

    def __post_init__(self) -> None:
        for name in (*_DEGREES, "microbatches"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise StrategyError(f"{name} must be a positive whole number, not {size!r}")
        if self.zero not in (None, 0, 1, 2, 3):
            raise StrategyError(f"zero must be 0, 1, 2 or 3, not {self.zero!r}")
        if self.schedule not in (None, "gpipe", "1f1b"):
            raise StrategyError(f"schedule must be 'gpipe' or '1f1b', not {self.schedule!r}")
        if self.sequence_parallel not in (None, True, False):
            raise StrategyError(f"sequence_parallel must be True or False, not {self.sequence_parallel!r}")
        if self.layouts not in (None, "megatron", "any"):
            raise StrategyError(f"layouts must be 'megatron' or 'any', not {self.layouts!r}")
        if self.layouts == "any" and self.sequence_parallel is not None:
            raise StrategyError("sequence_parallel says which of Megatron's layouts, but layouts='any' is pinned: leave out one")
        if self.layouts is not None and self.tp == 1:
            raise StrategyError("layouts says how values lie over tp, which is pinned to 1: leave out one of them")
        if self.zero == 0 and (self.dp_shard or 1) > 1:
            raise StrategyError(
                f"dp_shard={self.dp_shard} shards over the data axis, but zero=0 shards nothing: leave out one of them"
            )
        if (self.zero or 0) > 0 and self.dp_shard == 1 and max(self.dp or 1, self.dp_replicate or 1) > 1:
            raise StrategyError(f"zero={self.zero} shards over dp_shard, which is pinned to 1: leave out one of them")
        if self.sequence_parallel and self.tp == 1:
            raise StrategyError("sequence_parallel shards over tp, which is pinned to 1: leave out one of them")
        object.__setattr__(self, "dp", self._product("dp", self.dp_replicate, self.dp_shard))

    def _product(self, name: str, *factors: int | None) -> int | None:
        """The value of `name`, which is the product of `factors`, from whatever is known."""
        given = getattr(self, name)
        known = math.prod(f for f in factors if f is not None)
        if None not in factors:
            if given not in (None, known):
                raise StrategyError(f"dp={given}, but dp_replicate x dp_shard = {self.dp_replicate} x {self.dp_shard} = {known}")
            return known
        if given is not None and given % known:
            pinned = ", ".join(f"{n}={getattr(self, n)}" for n in ("dp_replicate", "dp_shard") if getattr(self, n) is not None)
            raise StrategyError(f"{pinned} does not divide dp={given}: sizes that do are {_listed(divisors(given))}")
        return given

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if shown.get("dp") is not None and {"dp_replicate", "dp_shard"} <= shown.keys():
            del shown["dp"]
        return ", ".join(f"{k}={v}" for k, v in shown.items()) or "auto"


@dataclass(frozen=True)
class Limits:
    """What a model and its devices allow, for pruning meshes; None allows everything.

    tensor          largest tp, usually the devices of one node
    stages          largest pp, usually the number of places where the model can be cut
    batch           samples of the global batch: data ranks never outnumber them
    hybrid          whether to search meshes with both data axes larger than 1 when neither is pinned
    """

    tensor: int | None = None
    stages: int | None = None
    batch: int | None = None
    hybrid: bool = True


@dataclass(frozen=True)
class Request:
    """The user's mesh and strategy made one: pins, number of ranks, and the order in which axes number the ranks."""

    world_size: int
    strategy: Strategy
    order: tuple[str, ...] = AXES

    def meshes(self, limits: Limits | None = None) -> list[Mesh]:
        return factorizations(self.world_size, self.strategy, limits or Limits(), self.order)


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))


def resolve(mesh: Any, strategy: Strategy | Literal["auto"] | None, world_size: int | None = None) -> Request:
    """Join the user's `mesh` and `strategy` into a Request.

    mesh            None or "auto": all `world_size` ranks, free; an int or a tuple of sizes: that many ranks, free;
                    a runtime Mesh or torch DeviceMesh: its axes pin roles if they are named after roles, and are free if none is
    Raises StrategyError where they contradict each other or the number of ranks.
    """
    pins = Strategy() if strategy in (None, "auto") else strategy
    if not isinstance(pins, Strategy):
        raise StrategyError(f"strategy must be 'auto' or a Strategy, not {strategy!r}")
    names, sizes = _axes_of(mesh)
    if sizes is None:
        if world_size is None:
            raise StrategyError("mesh='auto' needs a torchrun job to take its ranks from; give a mesh, such as (2, 4)")
        return Request(world_size, pins)
    total = math.prod(sizes)
    if world_size is not None and total != world_size:
        raise StrategyError(
            f"the mesh {' x '.join(map(str, sizes))} has {total} ranks, but this job has {world_size}: "
            f"its sizes must multiply to {world_size}, whose divisors are {_listed(divisors(world_size))}"
        )
    if names is None or not set(names) & {*_DEGREES, *RESERVED}:
        return Request(total, pins)
    return _with_roles(names, sizes, pins)


def _axes_of(mesh: Any) -> tuple[Sequence[str] | None, tuple[int, ...] | None]:
    """(axis names or None, sizes or None) of whatever the user gave."""
    if mesh is None or (isinstance(mesh, str) and mesh == "auto"):
        return None, None
    sizes = (mesh,) if isinstance(mesh, int) else mesh
    if isinstance(sizes, (tuple, list)):
        if not sizes or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
            raise StrategyError(f"a mesh of sizes must hold positive whole numbers, not {mesh!r}")
        return None, tuple(sizes)
    if isinstance(mesh, Mesh):
        return mesh.axes, mesh.sizes
    ranks = getattr(mesh, "mesh", None)
    names = getattr(mesh, "mesh_dim_names", ())
    if ranks is None or names == ():
        raise StrategyError(f"mesh must be 'auto', a tuple of sizes, or a DeviceMesh, not {mesh!r}")
    if ranks.flatten().tolist() != list(range(ranks.numel())):
        raise StrategyError(f"the mesh must hold the ranks 0 to {ranks.numel() - 1} in order, not {ranks.tolist()}")
    return names, tuple(ranks.shape)


def _with_roles(names: Sequence[str], sizes: Sequence[int], pins: Strategy) -> Request:
    reserved = [n for n in names if n in RESERVED]
    if reserved:
        raise StrategyError(f"mesh axis {reserved[0]!r} is reserved and not available yet; the roles are {', '.join(_DEGREES)}")
    unknown = [n for n in names if n not in _DEGREES]
    if unknown:
        raise StrategyError(f"mesh axis {unknown[0]!r} has no role; name every axis after one of {', '.join(_DEGREES)}, or none")
    if "dp" in names and {"dp_replicate", "dp_shard"} & set(names):
        raise StrategyError("a mesh names either dp, or dp_replicate and dp_shard, not both")
    given = dict(zip(names, sizes, strict=True))
    if "dp" not in given:
        given = {"dp_replicate": 1, "dp_shard": 1} | given
    given = {"pp": 1, "tp": 1} | given
    for name, size in given.items():
        pinned = getattr(pins, name)
        if pinned is not None and pinned != size:
            raise StrategyError(f"the mesh has {name}={size}, but the strategy pins {name}={pinned}")
    order = tuple(itertools.chain.from_iterable(("dp_replicate", "dp_shard") if n == "dp" else (n,) for n in names))
    missing = tuple(a for a in AXES if a not in order)
    return Request(math.prod(sizes), replace(pins, **given), missing + order)


def factorizations(world_size: int, strategy: Strategy, limits: Limits | None = None, order: Sequence[str] = AXES) -> list[Mesh]:
    """Every mesh of `world_size` ranks that agrees with the pins and within the limits, with its axes of more than one rank.

    With zero left open, dp_shard = 1 stands for plain data parallelism. Raises StrategyError where there is none.
    """
    limits = limits or Limits()
    _check_pins(world_size, strategy)
    found = []
    for tp, pp in itertools.product(divisors(world_size), repeat=2):
        if world_size % (tp * pp) or not _pinned(strategy, tp=tp, pp=pp) or (strategy.sequence_parallel and tp == 1):
            continue
        if _over(tp, limits.tensor, strategy.tp) or _over(pp, limits.stages, strategy.pp):
            continue
        data = world_size // (tp * pp)
        if not _pinned(strategy, dp=data) or _over(data, limits.batch, strategy.dp):
            continue
        for shard in divisors(data):
            sizes = {"pp": pp, "dp_replicate": data // shard, "dp_shard": shard, "tp": tp}
            if _pinned(strategy, **sizes) and _allowed(strategy, limits, sizes):
                axes = tuple(a for a in order if sizes[a] > 1)
                found.append(Mesh(axes, tuple(sizes[a] for a in axes)))
    if not found:
        raise StrategyError(_why_none(world_size, strategy, limits))
    return found


def _pinned(strategy: Strategy, **sizes: int) -> bool:
    return all(getattr(strategy, name) in (None, size) for name, size in sizes.items())


def _over(size: int, limit: int | None, pinned: int | None) -> bool:
    """Limits prune the search; what is pinned is the user's to decide."""
    return limit is not None and pinned is None and size > limit


def _allowed(strategy: Strategy, limits: Limits, sizes: dict[str, int]) -> bool:
    replicate, shard = sizes["dp_replicate"], sizes["dp_shard"]
    if strategy.zero == 0:
        return shard == 1
    free = strategy.dp_replicate is None and strategy.dp_shard is None
    if strategy.zero is not None and free and shard == 1 and replicate > 1:
        return False
    return limits.hybrid or not free or replicate == 1 or shard == 1


def _check_pins(world_size: int, strategy: Strategy) -> None:
    for name in _DEGREES:
        size = getattr(strategy, name)
        if size is not None and world_size % size:
            raise StrategyError(
                f"{name}={size} does not divide the {world_size} ranks: sizes that do are {_listed(divisors(world_size))}"
            )
    pinned = {n: getattr(strategy, n) for n in _DEGREES if getattr(strategy, n) is not None}
    if strategy.dp is not None:
        pinned = {n: s for n, s in pinned.items() if n not in ("dp_replicate", "dp_shard")}
    product = math.prod(pinned.values())
    if world_size % product:
        text = " x ".join(f"{n}={s}" for n, s in pinned.items())
        raise StrategyError(f"{text} = {product} does not divide the {world_size} ranks")
    if {"dp", "tp", "pp"} <= pinned.keys() and product != world_size:
        text = " x ".join(f"{n}={s}" for n, s in pinned.items())
        fits = world_size // (product // pinned["dp"]) if world_size % (product // pinned["dp"]) == 0 else None
        hint = f"dp={fits} would use them all, or leave one of the three out" if fits else "leave one of the three out"
        raise StrategyError(f"{text} = {product}, but there are {world_size} ranks: {hint}")


def _why_none(world_size: int, strategy: Strategy, limits: Limits) -> str:
    allowed = {k: v for k, v in {"tp": limits.tensor, "pp": limits.stages, "data ranks": limits.batch}.items() if v is not None}
    text = f"no mesh of {world_size} ranks agrees with ({strategy})"
    if allowed:
        text += " and with at most " + ", ".join(f"{v} for {k}" for k, v in allowed.items())
    return text + "; pin less, use fewer ranks, or a larger batch"
