"""Means and variances as sums and a division by a count known now, so that the summed dims may be sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .rewrite import Builder, dtype_of, shape_of

aten = torch.ops.aten


def _dims(x: Any, dims: Sequence[int] | int | None) -> list[int]:
    rank = len(shape_of(x))
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(rank))
    return sorted({d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)}) if rank else []


def _count(x: Any, dims: Sequence[int]) -> int:
    return math.prod(shape_of(x)[d] for d in dims)


def sum_dims(b: Builder, x: Any, dims: Sequence[int] | None, keepdim: bool, *, dtype: torch.dtype | None = None) -> Any:
    found = _dims(x, dims)
    if dtype is not None and dtype != dtype_of(x):
        x = b(aten._to_copy.default, x, dtype=dtype)
    if not found:
        return x if dtype_of(x).is_floating_point else b(aten._to_copy.default, x, dtype=dtype or torch.int64)
    return b.emit(
        aten.sum.dim_IntList, x, found, keepdim, dtype=dtype if dtype is not None and not dtype.is_floating_point else None
    )


def sum_all(b: Builder, x: Any, *, dtype: torch.dtype | None = None) -> Any:
    return b(aten.sum.dim_IntList, x, None, False, dtype=dtype)


def mean_dims(b: Builder, x: Any, dims: Sequence[int] | None, keepdim: bool, *, dtype: torch.dtype | None = None) -> Any:
    found = _dims(x, dims)
    return b(aten.div.Tensor, b(aten.sum.dim_IntList, x, found, keepdim, dtype=dtype), _count(x, found))


def mean_all(b: Builder, x: Any, *, dtype: torch.dtype | None = None) -> Any:
    return b(aten.mean.dim, x, None, False, dtype=dtype)


def _moments(b: Builder, x: Any, dims: Sequence[int] | None, correction: float | None, keepdim: bool) -> tuple[Any, Any]:
    found = _dims(x, dims)
    mean = b(aten.mean.dim, x, found, True)
    centered = b(aten.sub.Tensor, x, mean)
    total = b(aten.sum.dim_IntList, b(aten.mul.Tensor, centered, centered), found, keepdim)
    variance = b(aten.div.Tensor, total, max(0, _count(x, found) - (1 if correction is None else correction)))
    kept = [s for d, s in enumerate(shape_of(x)) if d not in found]
    return variance, mean if keepdim else b(aten.reshape.default, mean, kept)


def var(b: Builder, x: Any, dims: Sequence[int] | None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return _moments(b, x, dims, correction, keepdim)[0]


def std(b: Builder, x: Any, dims: Sequence[int] | None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return b(aten.sqrt.default, var(b, x, dims, correction=correction, keepdim=keepdim))


def var_mean(b: Builder, x: Any, dims: Sequence[int] | None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    return _moments(b, x, dims, correction, keepdim)


def var_dim(b: Builder, x: Any, dims: Sequence[int] | None, unbiased: bool, keepdim: bool) -> Any:
    return var(b, x, dims, correction=int(unbiased), keepdim=keepdim)


def std_dim(b: Builder, x: Any, dims: Sequence[int] | None, unbiased: bool, keepdim: bool) -> Any:
    return std(b, x, dims, correction=int(unbiased), keepdim=keepdim)


def global_average_pool(b: Builder, x: Any, sizes: Sequence[int]) -> Any:
    """adaptive_avg_pool to one element per dim is a mean."""
    if any(s != 1 for s in sizes):
        return NotImplemented
    rank = len(shape_of(x))
    return b(aten.mean.dim, x, list(range(rank - len(sizes), rank)), True)


def weight_norm(b: Builder, v: Any, g: Any, dim: int = 0) -> Any:
    """(v * g / norm, norm), the norm of v over all dims but `dim`. Narrow numbers stay with torch, which sums wide ones."""
    if dtype_of(v).itemsize < 4:
        return NotImplemented
    others = [d for d in range(len(shape_of(v))) if d != dim % len(shape_of(v))]
    norm = b(aten.sqrt.default, b(aten.sum.dim_IntList, b(aten.mul.Tensor, v, v), others, True))
    return b(aten.mul.Tensor, v, b(aten.div.Tensor, g, norm)), norm


def _not_zero(b: Builder, x: Any) -> Any:
    return x if dtype_of(x) == torch.bool else b(aten.ne.Scalar, x, 0)


def any_of(b: Builder, x: Any, dims: Sequence[int] | int | None = None, keepdim: bool = False) -> Any:
    """Some are set: their number is more than 0."""
    if dtype_of(x) == torch.uint8:
        return NotImplemented  # of which the result is one, too
    if isinstance(dims, list | tuple) and not dims:
        return _not_zero(b, x)
    return b(aten.gt.Scalar, b(aten.sum.dim_IntList, _not_zero(b, x), _dims(x, dims), keepdim), 0)


def all_of(b: Builder, x: Any, dims: Sequence[int] | int | None = None, keepdim: bool = False) -> Any:
    """None is not set."""
    if dtype_of(x) == torch.uint8:
        return NotImplemented
    if isinstance(dims, list | tuple) and not dims:
        return _not_zero(b, x)
    return b(aten.eq.Scalar, b(aten.sum.dim_IntList, b(aten.logical_not.default, x), _dims(x, dims), keepdim), 0)


def count_nonzero(b: Builder, x: Any, dims: Sequence[int] | int | None = None) -> Any:
    return b(aten.sum.dim_IntList, _not_zero(b, x), _dims(x, dims), False)


def nansum(b: Builder, x: Any, dims: Sequence[int] | None, keepdim: bool, *, dtype: torch.dtype | None = None) -> Any:
    if dtype_of(x).is_floating_point:
        x = b(aten.where.self, b(aten.isnan.default, x), b.scalar(0.0, dtype_of(x)), x)
    return b(aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype)


RULES: dict[Any, Any] = {
    aten.sum.dim_IntList: sum_dims,
    aten.sum.default: sum_all,
    aten.any.default: any_of,
    aten.any.dim: any_of,
    aten.any.dims: any_of,
    aten.all.default: all_of,
    aten.all.dim: all_of,
    aten.all.dims: all_of,
    aten.count_nonzero.default: count_nonzero,
    aten.count_nonzero.dim_IntList: count_nonzero,
    aten.nansum.default: nansum,
    aten.mean.dim: mean_dims,
    aten.mean.default: mean_all,
    aten.var.correction: var,
    aten.var.default: lambda b, x, unbiased: var(b, x, None, correction=int(unbiased)),
    aten.var.dim: var_dim,
    aten.std.correction: std,
    aten.std.default: lambda b, x, unbiased: std(b, x, None, correction=int(unbiased)),
    aten.std.dim: std_dim,
    aten.var_mean.correction: var_mean,
    aten.var_mean.dim: lambda b, x, dims, unbiased, keepdim: var_mean(b, x, dims, correction=int(unbiased), keepdim=keepdim),
    aten._weight_norm_interface.default: weight_norm,
    aten.adaptive_avg_pool1d.default: global_average_pool,
    aten.adaptive_avg_pool2d.default: global_average_pool,
    aten._adaptive_avg_pool2d.default: global_average_pool,
    aten.adaptive_avg_pool3d.default: global_average_pool,
}
