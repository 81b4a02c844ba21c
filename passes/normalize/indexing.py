"""Indexing by full ranges is a permutation of dims: so the batch, taken by an arange, stays a dim of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .masks import affine
from .rewrite import Builder, shape_of

aten = torch.ops.aten


def index(b: Builder, x: Any, indices: Sequence[Any]) -> Any:
    """x[i0, i1, ...] where index k is provably arange(x.shape[k]) along one dim of the result, a dim of its own."""
    if any(i is None for i in indices):
        return NotImplemented
    forms = [affine(i) for i in indices]
    spread = torch.broadcast_shapes(*(shape_of(i) for i in indices))
    along = []
    for k, form in enumerate(forms):
        if form is None or form.constant != 0:
            return NotImplemented
        steps = [d - len(form.shape) for d, c in enumerate(form.coefficients) if c]
        if len(steps) != 1 or form.coefficients[steps[0]] != 1 or form.shape[steps[0]] != shape_of(x)[k]:
            return NotImplemented
        along.append(steps[0] + len(spread))
    if len(set(along)) != len(along) or any(s != 1 for d, s in enumerate(spread) if d not in along):
        return NotImplemented
    rest = list(range(len(along), len(shape_of(x))))
    order = sorted(range(len(along)), key=lambda k: along[k])
    moved = b(aten.permute.default, x, order + rest)
    return b(aten.reshape.default, moved, [*spread, *(shape_of(x)[d] for d in rest)])
