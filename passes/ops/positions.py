"""Global and local positions along a sharded dim.

What a rank holds of a dim is a list of *ranges* `(start, length)` of global positions, in local order: one range per
section of the shard (see `passes.types`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Sections
from .collectives import communicator, resolve_sections

Ranges = list[tuple[int, int]]


def held_ranges(sections: Sections, index: int) -> Ranges:
    """What rank `index` holds of a dim cut into `sections`. Pieces of length zero are left out."""
    ranges, start = [], 0
    for section in sections:
        if section[index]:
            ranges.append((start + sum(section[:index]), section[index]))
        start += sum(section)
    return ranges


def compose_ranges(outer: Ranges, inner: Ranges) -> Ranges:
    """`inner` are ranges of the positions left by `outer`: the same ranges in the terms that `outer` is in."""
    found: Ranges = []
    for start, length in inner:
        end, passed = start + length, 0
        for outer_start, outer_length in outer:
            low, high = max(start, passed), min(end, passed + outer_length)
            if low < high:
                found.append((outer_start + low - passed, high - low))
            passed += outer_length
    return found


def whole_ranges(shape: Sequence[int]) -> list[Ranges]:
    """For each dim of a tensor of `shape`, the range of all of it."""
    return [[(0, size)] if size else [] for size in shape]


def cut_ranges(
    shape: Sequence[int], axes: Sequence[str], dims: Sequence[int], counts: Sequence[int], sizes: Sequence[int]
) -> list[Ranges]:
    """For each dim of a tensor of global `shape`, what this rank holds after a list of cuts, each of what the one before left.

    Cut c is over mesh axis `axes[c]` on `dims[c]`; its sections are the next `counts[c]` ints of `sizes` (none: an even cut).
    """
    if not len(axes) == len(dims) == len(counts) or sum(counts) != len(sizes):
        raise ValueError(f"malformed cuts: axes {list(axes)}, dims {list(dims)}, counts {list(counts)}, {len(sizes)} sizes")
    comm = communicator()
    held = whole_ranges(shape)
    taken = 0
    for axis, dim, count in zip(axes, dims, counts, strict=True):
        left = sum(length for _, length in held[dim])
        sections = resolve_sections(sizes[taken : taken + count], comm.size(axis), whole=left)
        if sum(map(sum, sections)) != left:
            raise ValueError(
                f"the cut over axis {axis!r} of dim {dim} is of {sum(map(sum, sections))} positions, but {left} are left"
            )
        held[dim] = compose_ranges(held[dim], held_ranges(sections, comm.index(axis)))
        taken += count
    return held


def range_lengths(held: Sequence[Ranges]) -> list[int]:
    return [sum(length for _, length in ranges) for ranges in held]


def range_positions(ranges: Ranges, device: torch.device) -> Tensor:
    """The global positions of `ranges`, int64 [local length]."""
    pieces = [torch.arange(start, start + length, device=device) for start, length in ranges]
    if not pieces:
        return torch.empty(0, dtype=torch.int64, device=device)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def axis_ranges(axis: str, sizes: Sequence[int], local: int | None = None) -> Ranges:
    """What this rank holds of a dim sharded over `axis` alone; `sizes` may be [] where `local`, the length held, is known."""
    comm = communicator()
    return held_ranges(resolve_sections(sizes, comm.size(axis), local=local), comm.index(axis))


def locate(index: Tensor, ranges: Ranges) -> Tensor:
    """The local position of each global position in `index` (int64, any shape); -1 where `ranges` do not hold it."""
    found, passed = None, 0
    for start, length in ranges:
        local = index - start
        outside = (local < 0) | (local >= length)
        if found is None:
            found = local.masked_fill_(outside, -1)
        else:
            found = torch.where(outside, found, local.add_(passed))
        passed += length
    return torch.full_like(index, -1) if found is None else found
