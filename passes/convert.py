"""Conversions between types along an axis: the nodes of a typed graph, and the collectives they stand for.

`convert(x, axis, src, dst)` is what the sharding pass inserts and the checker reads. `FORWARD` and `BACKWARD` say what it
is made of; together they are the one table of conjugate collectives (see docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .ops.collectives import ops
from .types import I, Invariant, Partial, R, Replicate, Type, Varying, flatten_sections


def convert(x: torch.Tensor, axis: str, src: Type, dst: Type) -> torch.Tensor:
    """Run a conversion's forward. (Graphs are emitted with the raw ops instead; this is for interpreting typed graphs.)"""
    for op, args in forward_ops(axis, src, dst):
        x = op(x, *args)
    return x


Step = tuple[Callable[..., Any], tuple[Any, ...]]


def _dim(t: Varying, n: int | None = None) -> tuple[int, list[int]]:
    """(dim, sizes) of the collective ops; the plain even cut is written `[]`."""
    plain = t.is_plain and t.is_even
    return t.dim, [] if plain else flatten_sections(t.sections)


def is_free(src: Type, dst: Type, grad: bool) -> bool:
    """True when values of type src serve as dst as they are, with no node: no gradient tells R from I."""
    return src == dst or (not grad and {src, dst} <= {I, R})


def exists(src: Type, dst: Type, grad: bool) -> bool:
    """True when there is a conversion. R -> I is refused (its gradient would have to be P and I at once), and so is I -> P."""
    match src, dst:
        case (Replicate(), Invariant()):
            return not grad
        case (Partial(op), Partial(other)):
            return op == other
        case (Partial(op), _) if op != "sum":
            return isinstance(dst, Invariant | Replicate) and not grad
        case (_, Partial(op)) if op != "sum":
            return False
        case (Invariant(), Partial()):
            return not grad
        case (Varying(), Partial()):
            return False
        case _:
            return True


def makes_whole(src: Type, dst: Type) -> bool:
    """True when a conversion makes shards whole."""
    return isinstance(src, Varying) and not isinstance(dst, Varying)


def forward_ops(axis: str, src: Type, dst: Type) -> list[Step]:
    """The raw ops of a conversion, applied one after the other. Empty: identity."""
    if src == dst:
        return []
    match src, dst:
        case (Invariant() | Replicate(), Invariant() | Replicate()):
            return []
        case (Invariant() | Replicate(), Varying()):
            return [(ops.shard.default, (axis, *_dim(dst)))]
        case (Invariant() | Replicate(), Partial("sum")):
            return [(ops.keep_first.default, (axis,))]
        case (Varying(), Invariant() | Replicate()):
            return [(ops.all_gather.default, (axis, *_dim(src)))]
        case (Varying(), Varying()) if src.dim != dst.dim:
            return [(ops.all_to_all.default, (axis, *_dim(src), *_dim(dst)))]
        case (Varying(), Varying()):
            return [(ops.all_gather.default, (axis, *_dim(src))), (ops.shard.default, (axis, *_dim(dst)))]
        case (Partial(op), Invariant() | Replicate()):
            return [(ops.all_reduce.default, (axis, op))] if op != "sum" else [(ops.all_reduce.default, (axis,))]
        case (Partial("sum"), Varying()):
            return [(ops.reduce_scatter.default, (axis, *_dim(dst)))]
    raise ValueError(f"there is no conversion {src} -> {dst} over axis {axis!r}")


def backward_ops(axis: str, src: Type, dst: Type) -> list[Step]:
    """The raw ops that take the cotangent of dst's value to the cotangent of src's."""
    if src == dst:
        return []
    match src, dst:
        case (Invariant(), Replicate()):
            return [(ops.all_reduce.default, (axis,))]
        case (Invariant(), Varying()):
            return [(ops.all_gather.default, (axis, *_dim(dst)))]
        case (Varying(), Invariant()):
            return [(ops.shard.default, (axis, *_dim(src)))]
        case (Varying(), Replicate()):
            return [(ops.reduce_scatter.default, (axis, *_dim(src)))]
        case (Varying(), Varying()):
            return forward_ops(axis, dst, src)
        case (Partial("sum"), Invariant()):
            return []
        case (Partial("sum"), Replicate()):
            return [(ops.all_reduce.default, (axis,))]
        case (Partial("sum"), Varying()):
            return [(ops.all_gather.default, (axis, *_dim(dst)))]
        case (Replicate(), Varying()):
            return [(ops.unshard.default, (axis, *_dim(dst)))]
        case (Replicate(), Partial("sum")):
            return [(ops.keep_first.default, (axis,))]
    raise ValueError(f"the conversion {src} -> {dst} over axis {axis!r} carries no gradient")


@dataclass(frozen=True)
class Traffic:
    """Collectives of a conversion by name, for costs and golden tests."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


def traffic(src: Type, dst: Type, grad: bool) -> Traffic:
    def names(steps: list[Step]) -> tuple[str, ...]:
        return tuple(op.name().split("::")[1] for op, _ in steps)  # type: ignore[attr-defined]

    back = () if not grad or src == dst or is_free(src, dst, grad) else names(backward_ops("", src, dst))
    return Traffic(names(forward_ops("", src, dst)) if src != dst else (), back)
