"""logsumexp of a sharded last dim, softmax and log_softmax of any sharded dim: each rank reduces its shard, and the ranks' results
are combined. The results of softmax are sharded as its operand is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .collectives import library, ops
from .losses import wide_dtype  # and it defines logsumexp

library.define("logsumexp_shard(Tensor x, str axis) -> Tensor")


def _combine(partial: Tensor, axis: str) -> Tensor:
    """logsumexp of the whole, from those of the ranks' shards."""
    return torch.logsumexp(ops.all_gather.default(partial.unsqueeze(0), axis, 0, []), 0)


class _LogSumExpShard(torch.autograd.Function):
    """x is V on its last dim, the result I. d lse / dx = exp(x - lse), from the incoming I cotangent: no traffic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Tensor:  # type: ignore[override]
        lse = _combine(ops.logsumexp.default(x), axis)
        ctx.save_for_backward(x, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, lse = ctx.saved_tensors
        return ops.logsumexp_backward.default(grad, x, lse), None


library.impl("logsumexp_shard", lambda x, axis: _LogSumExpShard.apply(x, axis), "CompositeImplicitAutograd")


def _log_softmax(x: Tensor, dim: int, axis: str) -> Tensor:
    """Of the whole, this rank's shard."""
    return x - _combine(torch.logsumexp(x, dim, keepdim=True), axis)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


class _SoftmaxShard(torch.autograd.Function):
    """y = exp(x - lse). dx = y * (dy - sum(dy * y)), the sum over all shards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: str) -> Tensor:  # type: ignore[override]
        y = torch.exp(_log_softmax(_wide(x), dim, axis)).to(x.dtype)
        ctx.save_for_backward(y)
        ctx.place = (dim, axis)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (y,), (dim, axis) = ctx.saved_tensors, ctx.place
        wide, y = _wide(grad), _wide(y)
        total = ops.all_reduce.default((wide * y).sum(dim, keepdim=True), axis)
        return (y * (wide - total)).to(grad.dtype), None, None


class _LogSoftmaxShard(torch.autograd.Function):
    """y = x - lse. dx = dy - exp(y) * sum(dy), the sum over all shards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: str) -> Tensor:  # type: ignore[override]
        y = _log_softmax(_wide(x), dim, axis).to(x.dtype)
        ctx.save_for_backward(y)
        ctx.place = (dim, axis)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (y,), (dim, axis) = ctx.saved_tensors, ctx.place
        wide = _wide(grad)
        total = ops.all_reduce.default(wide.sum(dim, keepdim=True), axis)
        return (wide - torch.exp(_wide(y)) * total).to(grad.dtype), None, None


for _name, _function in (("softmax_shard", _SoftmaxShard), ("log_softmax_shard", _LogSoftmaxShard)):
    library.define(f"{_name}(Tensor x, int dim, ScalarType? dtype, str axis) -> Tensor")

    def _kernel(x: Tensor, dim: int, dtype: torch.dtype | None, axis: str, function: Any = _function) -> Tensor:
        return function.apply(x if dtype is None else x.to(dtype), dim, axis)

    library.impl(_name, _kernel, "CompositeImplicitAutograd")
