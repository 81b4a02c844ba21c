"""The type of a value along one mesh axis, in the words of spmd_types.

A value on a mesh has one type per axis. Graphs are lowered one axis at a time, so everything here is about a single
axis of `n` ranks:

    I  Invariant   equal on the ranks; its gradient is I
    R  Replicate   equal on the ranks; its gradient is P
    V  Varying     each rank holds a shard of one dim; its gradient is V, the same
    P  Partial     the ranks' values are still to be reduced; its gradient is R

A shard of a dim is described by `sections`: the dim is cut into consecutive sections, and each section is cut among
the ranks. `((4, 4),)` is the ordinary even shard of a dim of 8 over 2 ranks; `((4, 3),)` an uneven one of 7; and
`((2, 2), (2, 2), (2, 2))` shards a fused projection of 12 rows by the inner factor of (3, 4): rank 0 holds rows 0-1,
4-5 and 8-9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

Sections = tuple[tuple[int, ...], ...]
ReduceOp = Literal["sum", "max", "min"]


@dataclass(frozen=True)
class Invariant:
    def __str__(self) -> str:
        return "I"


@dataclass(frozen=True)
class Replicate:
    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Partial:
    """To be reduced over the axis. Only "sum" may carry a gradient."""

    op: ReduceOp = "sum"

    def __str__(self) -> str:
        return "P" if self.op == "sum" else f"P({self.op})"


@dataclass(frozen=True)
class Varying:
    """Sharded on `dim` (never negative); `sections[s][i]` is the length that rank `i` holds of section `s`."""

    dim: int
    sections: Sections

    def __post_init__(self) -> None:
        if self.dim < 0 or not self.sections or len({len(s) for s in self.sections}) != 1:
            raise ValueError(f"malformed shard: dim {self.dim}, sections {self.sections}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dim, self.sections))

    @cached_property
    def global_size(self) -> int:
        return sum(map(sum, self.sections))

    @cached_property
    def largest_size(self) -> int:
        """The most that a rank holds."""
        return max(map(sum, zip(*self.sections, strict=True)))

    def local_size(self, index: int) -> int:
        return sum(section[index] for section in self.sections)

    @cached_property
    def is_even(self) -> bool:
        return all(len(set(section)) == 1 for section in self.sections)

    @property
    def is_plain(self) -> bool:
        """True for one section: each rank holds a contiguous piece."""
        return len(self.sections) == 1

    def __str__(self) -> str:
        if self.is_plain:
            return f"V({self.dim})" if self.is_even else f"V({self.dim}, {list(self.sections[0])})"
        return f"V({self.dim}, split=({len(self.sections)}, {sum(self.sections[0])}))"


Type = Invariant | Replicate | Varying | Partial

I = Invariant()
R = Replicate()
P = Partial()


def chunk_sizes(size: int, n: int) -> tuple[int, ...]:
    """Lengths of the n pieces as torch.chunk and DTensor cut a dim: 10 over 4 is 3, 3, 3, 1. For exchange with DTensor."""
    step = -(-size // n) if size else 0
    return tuple(max(0, min(step, size - i * step)) for i in range(n))


def balanced_sizes(size: int, n: int) -> tuple[int, ...]:
    """Lengths of the n most equal pieces of a dim of `size`, longer ones first: 10 over 4 is 3, 3, 2, 2."""
    return tuple(size // n + (i < size % n) for i in range(n))


@cache
def even_sections(size: int, n: int, unit: int = 1) -> Sections:
    """One section of `size`, cut among n ranks as equally as multiples of `unit` (which must divide `size`) allow."""
    return (tuple(c * unit for c in balanced_sizes(size // unit, n)),)


def shard(dim: int, size: int, n: int) -> Varying:
    """The ordinary shard of a dim of `size` over n ranks."""
    return Varying(dim, even_sections(size, n))


def local_shape(shape: Sequence[int], type_: Type, index: int) -> tuple[int, ...]:
    """The shape rank `index` of the axis holds of a value whose shape before this axis is `shape`."""
    if not isinstance(type_, Varying):
        return tuple(shape)
    if shape[type_.dim] != type_.global_size:
        raise ValueError(f"{type_} does not cut a dim of {shape[type_.dim]} (shape {tuple(shape)}, dim {type_.dim})")
    return (*shape[: type_.dim], type_.local_size(index), *shape[type_.dim + 1 :])


def gradient_type(type_: Type) -> Type:
    """The type of the cotangent of a value of `type_`."""
    match type_:
        case Invariant():
            return I
        case Replicate():
            return P
        case Partial():
            return R
        case Varying():
            return type_


def flatten_sections(sections: Sections) -> list[int]:
    """Sections as the flat list that collective ops take: section-major, `[s0r0, s0r1, ..., s1r0, ...]`."""
    return [length for section in sections for length in section]


def unflatten_sections(sizes: Sequence[int], n: int) -> Sections:
    return tuple(tuple(sizes[k : k + n]) for k in range(0, len(sizes), n))
