"""Random ops drawn by position from the step's seed, so that every mesh and every recomputation draws the same numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..ops import random as _ops  # noqa: F401  (defines dropout and uniform)
from .rewrite import Builder, dtype_of, shape_of

aten = torch.ops.aten
ours = torch.ops.shardwright


def dropout(b: Builder, x: Any, p: float, train: bool | None) -> Any:
    if train is False or p == 0:
        return x
    if p == 1:
        return b(aten.mul.Tensor, x, 0)
    return b(ours.dropout.default, x, b.seed(), float(p), b.site())


def native_dropout(b: Builder, x: Any, p: float, train: bool | None) -> Any:
    """Gives (result, mask); left alone where the mask is used."""
    if b.origin is None or b.origin.target is not aten.native_dropout.default:
        return NotImplemented
    users = b.origin.users
    if any(not (u.target is operator.getitem and u.args[1] == 0) for u in users):
        return NotImplemented
    return dropout(b, x, p, train), None


def rand(b: Builder, size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return b(ours.uniform.default, b.seed(), b.site(), list(size), dtype or torch.get_default_dtype())


def rand_like(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return b(ours.uniform.default, b.seed(), b.site(), list(shape_of(x)), dtype or dtype_of(x))


def bernoulli(b: Builder, p: Any, **_: Any) -> Any:
    """1 with the probability that stands in the tensor p."""
    drawn = b(ours.uniform.default, b.seed(), b.site(), list(shape_of(p)), torch.float32)
    return b(aten._to_copy.default, b(aten.lt.Tensor, drawn, p), dtype=dtype_of(p))


def bernoulli_p(b: Builder, x: Any, p: float, **_: Any) -> Any:
    drawn = b(ours.uniform.default, b.seed(), b.site(), list(shape_of(x)), torch.float32)
    return b(aten._to_copy.default, b(aten.lt.Scalar, drawn, p), dtype=dtype_of(x))


RULES: dict[Any, Any] = {
    aten.dropout.default: dropout,
    aten.native_dropout.default: native_dropout,
    aten.rand.default: rand,
    aten.rand_like.default: rand_like,
    aten.bernoulli.default: bernoulli,
    aten.bernoulli.p: bernoulli_p,
}
