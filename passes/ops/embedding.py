"""Ops over one shard of an index space: rows of an embedding table, positions of an arange.

    embedding_shard(weight, ids, padding_idx, axis, sizes) [*ids.shape, H]
    gather_shard(x, dim, index, axis, sizes) [*index.shape]

`weight` [rows, H] holds this rank's rows of a table sharded over `axis` in the sections `sizes`; `ids` are global.
Rows that another rank holds give 0: the sum over the axis is the whole's embedding. Row `padding_idx` (global; -1 for
none) gets no gradient. `x` holds this rank's part of `dim`, and a gather gives 0 likewise,
and NaN for an index that no rank holds, which raises where `dim` is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .collectives import communicator, ops
from .define import define
from .positions import axis_ranges, locate, range_lengths, range_positions


def _embedding_shard(weight: Tensor, ids: Tensor, padding_idx: int, axis: str, sizes: Sequence[int]) -> Tensor:
    rows, width = weight.shape
    if not rows:
        return weight.new_zeros(*ids.shape, width)
    local = locate(ids, axis_ranges(axis, sizes, rows)).view(-1)
    found = weight.index_select(0, local.clamp(min=0))
    return found.masked_fill_((local < 0).unsqueeze(1), 0.0).view(*ids.shape, width)


def _embedding_shard_backward(grad: Tensor, ids: Tensor, rows: int, padding_idx: int, axis: str, sizes: Sequence[int]) -> Tensor:
    if not rows or not ids.numel():
        return grad.new_zeros(rows, grad.shape[-1])
    local = locate(ids, axis_ranges(axis, sizes, rows))
    if padding_idx >= 0:
        local.masked_fill_(ids == padding_idx, -1)
    # To ATen -1 is here an ordinary "padding index": the one whose gradient is left out.
    return torch.ops.aten.embedding_dense_backward(grad, local, rows, -1, False)


def _gather_shard(x: Tensor, dim: int, index: Tensor, axis: str, sizes: Sequence[int]) -> Tensor:
    if not x.shape[dim]:
        return x.new_zeros(index.shape)
    local = locate(index, axis_ranges(axis, sizes, x.shape[dim]))
    found = x.gather(dim, local.clamp(min=0)).masked_fill_(local < 0, 0)
    return found.masked_fill_((index < 0) | (index >= sum(sizes)), torch.nan) if x.is_floating_point() else found


def _gather_shard_backward(grad: Tensor, dim: int, index: Tensor, shape: Sequence[int], axis: str, sizes: Sequence[int]) -> Tensor:
    result = grad.new_zeros(shape)
    if not shape[dim]:
        return result
    local = locate(index, axis_ranges(axis, sizes, shape[dim]))
    return result.scatter_add_(dim, local.clamp(min=0), grad.masked_fill(local < 0, 0.0))


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, index, *ctx.shard = inputs
    ctx.shape = list(x.shape)
    ctx.save_for_backward(index)


def _arange_shard(start: float, step: float, axis: str, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    positions = range_positions(axis_ranges(axis, sizes), communicator().device)
    if dtype.is_floating_point:
        positions = positions.to(torch.float64)
    return positions.mul_(step).add_(start).to(dtype)


def _fake_arange(start: float, step: float, axis: str, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(range_lengths([axis_ranges(axis, sizes)]), dtype=dtype, device=communicator().device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, *ctx.shard = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids)


define(
    "embedding_shard(Tensor weight, Tensor ids, int padding_idx, str axis, int[] sizes) -> Tensor",
    _embedding_shard,
    lambda weight, ids, *_: weight.new_empty(*ids.shape, weight.shape[1]),
    lambda ctx, grad: (ops.embedding_shard_backward(grad, *ctx.saved_tensors, ctx.rows, *ctx.shard), None, None, None, None),
    _save,
)
define(
    "embedding_shard_backward(Tensor grad, Tensor ids, int rows, int padding_idx, str axis, int[] sizes) -> Tensor",
    _embedding_shard_backward,
    lambda grad, ids, rows, *_: grad.new_empty(rows, grad.shape[-1]),
)
# The values start + step * position, for the positions that this rank holds of a dim sharded over `axis`.
define("arange_shard(Scalar start, Scalar step, str axis, int[] sizes, ScalarType dtype) -> Tensor", _arange_shard, _fake_arange)
define(
    "gather_shard(Tensor x, int dim, Tensor index, str axis, int[] sizes) -> Tensor",
    _gather_shard,
    lambda x, dim, index, *_: x.new_empty(index.shape),
    lambda ctx, grad: (ops.gather_shard_backward(grad, ctx.dim, *ctx.saved_tensors, ctx.shape, *ctx.shard), None, None, None, None),
    _save_gather,
)
define(
    "gather_shard_backward(Tensor grad, int dim, Tensor index, int[] shape, str axis, int[] sizes) -> Tensor",
    _gather_shard_backward,
    lambda grad, dim, index, shape, *_: grad.new_empty(shape),
)
