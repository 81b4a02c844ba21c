"""Random ops drawn by position from the step's seed, so that every mesh and every recomputation draws the same numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ...compiler.torch_compat import OpOverload
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


def _normal(b: Builder, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Standard normal numbers of two uniform ones (Box, Muller 1958)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first, second = (b(ours.uniform.default, b.seed(), b.site(), list(shape), wide) for _ in range(2))
    radius = b(aten.sqrt.default, b(aten.mul.Tensor, b(aten.log1p.default, b(aten.neg.default, first)), -2.0))
    drawn = b(aten.mul.Tensor, radius, b(aten.cos.default, b(aten.mul.Tensor, second, 2 * math.pi)))
    return drawn if dtype == wide else b(aten._to_copy.default, drawn, dtype=dtype)


def randn(b: Builder, size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return _normal(b, tuple(size), dtype or torch.get_default_dtype())


def randn_like(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return _normal(b, shape_of(x), dtype or dtype_of(x))


def normal_functional(b: Builder, x: Any, mean: float = 0.0, std: float = 1.0, **_: Any) -> Any:
    return _moved(b, _normal(b, shape_of(x), dtype_of(x)), mean, std)


def normal_of_tensors(b: Builder, mean: Any, std: Any = 1.0, **_: Any) -> Any:
    """Broadcast mean and deviation, of which one may be a number."""
    tensors = [x for x in (mean, std) if isinstance(x, fx.Node)]
    shape = torch.broadcast_shapes(*(shape_of(x) for x in tensors))
    return _moved(b, _normal(b, tuple(shape), dtype_of(tensors[0])), mean, std)


def _moved(b: Builder, drawn: Any, mean: Any, std: Any) -> Any:
    return b(aten.add.Tensor, b(aten.mul.Tensor, drawn, std), mean)


def uniform_in(b: Builder, x: Any, start: float = 0.0, end: float = 1.0, **_: Any) -> Any:
    drawn = b(ours.uniform.default, b.seed(), b.site(), list(shape_of(x)), dtype_of(x))
    return b(aten.add.Tensor, b(aten.mul.Tensor, drawn, end - start), start)


def exponential(b: Builder, x: Any, rate: float = 1.0, **_: Any) -> Any:
    drawn = b(ours.uniform.default, b.seed(), b.site(), list(shape_of(x)), dtype_of(x))
    return b(aten.mul.Tensor, b(aten.log1p.default, b(aten.neg.default, drawn)), -1.0 / rate)


def _integers(b: Builder, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype | None) -> Any:
    drawn = b(ours.uniform.default, b.seed(), b.site(), list(shape), torch.float64)
    scaled = b(aten.floor.default, b(aten.mul.Tensor, drawn, float(high - low)))
    return b(aten._to_copy.default, b(aten.add.Tensor, scaled, float(low)), dtype=dtype or torch.int64)


def randint(b: Builder, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """(high, size) or (low, high, size)."""
    *bounds, size = args
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return _integers(b, low, high, tuple(size), dtype)


def randint_like(b: Builder, x: Any, *bounds: int, dtype: torch.dtype | None = None, **_: Any) -> Any:
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return _integers(b, low, high, shape_of(x), dtype or dtype_of(x))


RULES: dict[Any, Any] = {
    aten.dropout.default: dropout,
    aten.native_dropout.default: native_dropout,
    aten.rand.default: rand,
    aten.rand_like.default: rand_like,
    aten.bernoulli.default: bernoulli,
    aten.bernoulli.p: bernoulli_p,
    aten.randn.default: randn,
    aten.randn_like.default: randn_like,
    aten.normal_functional.default: normal_functional,
    aten.normal.Tensor_float: normal_of_tensors,
    aten.normal.float_Tensor: normal_of_tensors,
    aten.normal.Tensor_Tensor: normal_of_tensors,
    aten.uniform.default: uniform_in,
    aten.exponential.default: exponential,
    aten.randint.default: randint,
    aten.randint.low: randint,
    aten.randint_like.default: randint_like,
    aten.randint_like.low_dtype: randint_like,
}


def own_generator(node: fx.Node) -> bool:
    """Whether an op draws from torch's generator, whose numbers differ between ranks and meshes."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
