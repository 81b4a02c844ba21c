"""Which gradients are copied: those that lie over one another, over themselves, or over what was lent."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.runtime.unshare import unshare

PLACES = st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 6), st.sampled_from([(1,), (2,), (0,), (3, 1), (1, 3)]))


def view(bases: list[Tensor], place: tuple[int, int, int, tuple[int, ...]]) -> Tensor:
    base, start, length, strides = place
    sizes = (length,) if len(strides) == 1 else (2, min(length, 3))
    return bases[base].as_strided(sizes, strides, start)


def cells(x: Tensor) -> list[int]:
    """The address of each element."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride * x.element_size()
    return [x.data_ptr() + int(n) for n in offsets.flatten()] if x.numel() else []


@given(st.lists(PLACES, max_size=5), st.lists(PLACES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_memory_is_shared(gradients: list, lent: list) -> None:
    bases = [torch.arange(24.0), torch.arange(24.0) + 100]
    given_ = {f"g{i}": view(bases, place) for i, place in enumerate(gradients)}
    borrowed = [view(bases, place) for place in lent]
    found = unshare(dict(given_), borrowed)
    for key, x in found.items():
        assert torch.equal(x, given_[key])
        assert len(set(cells(x))) == x.numel()
        assert not any(set(cells(x)) & set(cells(y)) for y in borrowed)
    assert not any(set(cells(x)) & set(cells(y)) for x, y in combinations(found.values(), 2))


def test_neighbours_are_left_where_they_lie() -> None:
    base, weight = torch.arange(24.0), torch.ones(6)
    gradients = {"a": base[:6], "b": base[6:12].view(2, 3), "c": base[12:18].view(2, 3).t()}
    found = unshare(dict(gradients), [weight])
    assert all(found[key] is x for key, x in gradients.items())
