"""Batch normalization as sums over the batch, so that a sharded batch gives the statistics of the whole one, exactly.

    mean = sum(x) / n;  var = sum((x - mean)^2) / n;  y = (x - mean) * rsqrt(var + eps) * weight + bias
    running = running * (1 - momentum) + new * momentum              (new var: unbiased)

over batch and spatial dims, n their number. In evaluation, mean and var are the running ones. x [N, C, ...].
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .rewrite import Builder, dtype_of, shape_of

aten = torch.ops.aten


def _per_channel(b: Builder, value: Any, x: Any) -> Any:
    shape = [1] * len(shape_of(x))
    shape[1] = shape_of(x)[1]
    return b(aten.reshape.default, value, shape)


def _wide(b: Builder, x: Any) -> Any:
    """Half precision is normalized in float32, as torch does."""
    return b(aten._to_copy.default, x, dtype=torch.float32) if dtype_of(x) in (torch.float16, torch.bfloat16) else x


def _scaled(b: Builder, x: Any, centered: Any, inverse: Any, weight: Any, bias: Any) -> Any:
    y = b(aten.mul.Tensor, centered, inverse)
    if weight is not None:
        y = b(aten.mul.Tensor, y, _per_channel(b, weight, x))
    if bias is not None:
        y = b(aten.add.Tensor, y, _per_channel(b, bias, x))
    return b(aten._to_copy.default, y, dtype=dtype_of(x))


def evaluated(b: Builder, x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> Any:
    inverse = b(aten.rsqrt.default, b(aten.add.Tensor, var, eps))
    centered = b(aten.sub.Tensor, _wide(b, x), _per_channel(b, mean, x))
    return _scaled(b, x, centered, _per_channel(b, inverse, x), weight, bias)


def trained(b: Builder, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> tuple[Any, ...]:
    """(y, batch mean, batch 1/std, new running mean, new running var); the last two None without running statistics."""
    wide = _wide(b, x)
    dims = [d for d in range(len(shape_of(x))) if d != 1]
    count = math.prod(shape_of(x)[d] for d in dims)
    batch_mean = b(aten.div.Tensor, b(aten.sum.dim_IntList, wide, dims, True), count)
    centered = b(aten.sub.Tensor, wide, batch_mean)
    batch_var = b(aten.div.Tensor, b(aten.sum.dim_IntList, b(aten.mul.Tensor, centered, centered), dims, True), count)
    inverse = b(aten.rsqrt.default, b(aten.add.Tensor, batch_var, eps))
    y = _scaled(b, x, centered, inverse, weight, bias)
    channels = [shape_of(x)[1]]
    flat_mean, flat_inverse, flat_var = (b(aten.reshape.default, s, channels) for s in (batch_mean, inverse, batch_var))
    unbiased = b(aten.mul.Tensor, flat_var, count / max(1, count - 1))
    new_mean = None if mean is None else _running(b, mean, flat_mean, momentum)
    new_var = None if var is None else _running(b, var, unbiased, momentum)
    return y, flat_mean, flat_inverse, new_mean, new_var


def _running(b: Builder, old: Any, new: Any, momentum: float) -> Any:
    kept = b(aten.mul.Tensor, old, 1 - momentum)
    fresh = b(aten.mul.Tensor, b(aten._to_copy.default, b(aten.detach.default, new), dtype=dtype_of(old)), momentum)
    return b(aten.add.Tensor, kept, fresh)


def functional(b: Builder, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
    if not training:
        return evaluated(b, x, weight, bias, mean, var, eps), None, None, mean, var
    return trained(b, x, weight, bias, mean, var, momentum, eps)


def no_training(b: Builder, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return evaluated(b, x, weight, bias, mean, var, eps), None, None


def no_stats(b: Builder, x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> Any:
    return trained(b, x, weight, bias, None, None, momentum, eps)[:3]


def with_update(b: Builder, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    y, batch_mean, inverse, new_mean, new_var = trained(b, x, weight, bias, mean, var, momentum, eps)
    return y, batch_mean, inverse, None, new_mean, new_var


def whole(
    b: Builder, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, cudnn: bool
) -> Any:
    """aten.batch_norm, which updates no running statistics in a functional graph."""
    return functional(b, x, weight, bias, mean, var, training, momentum, eps)[0]


RULES: dict[Any, Any] = {
    aten._native_batch_norm_legit_functional.default: functional,
    aten._native_batch_norm_legit_no_training.default: no_training,
    aten._native_batch_norm_legit.no_stats: no_stats,
    aten._batch_norm_no_update.default: lambda b, *args: (*no_training(b, *args), None),
    aten._batch_norm_with_update_functional.default: with_update,
    aten.batch_norm.default: whole,
}
