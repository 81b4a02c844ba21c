"""Cross-entropy's parts, each one pass over the logits: log-sum-exp, and the logit at the label.

    logsumexp(x) [...]          over the last dim of x [..., V], in float32 (float64 for float64 x)
    pick(x, index) [...]        x[..., index], index int64 [...]; 0 where index is outside [0, V)
    pick_shard(...)             the same where this rank holds a shard of the last dim: 0 where another rank holds the
                                position, so that the sum over the axis is the whole's `pick`
    softmax_minus_onehot(...)   the gradient of both at once: exp(x - lse) * grad_lse, plus grad_pick at index

The kernels go through a few rows at a time, so that what stands between the logits and the result stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .collectives import ops
from .define import chunk_elements, define
from .positions import axis_ranges, locate


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_rows(x: Tensor) -> int:
    return max(1, chunk_elements(x.device) // max(1, x.shape[1]))


def _exp_(x: Tensor) -> Tensor:
    """exp, in place. In float32 as a power of two: ATen's exp2 takes a third of the time of its exp on some CPUs."""
    return x.mul_(1 / math.log(2)).exp2_() if x.dtype == torch.float32 else x.exp_()


def _subtract(x: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """x - shift, in the dtype of `out` and `shift`."""
    return torch.sub(x, shift, out=out) if x.dtype == out.dtype else out.copy_(x).sub_(shift)


def _logsumexp(x: Tensor) -> Tensor:
    result = torch.full(x.shape[:-1], -torch.inf, dtype=wide_dtype(x.dtype), device=x.device)
    if not x.numel():
        return result
    rows = x.reshape(-1, x.shape[-1])
    step = _chunk_rows(rows)
    buffer = torch.empty(min(step, len(rows)), rows.shape[1], dtype=result.dtype, device=x.device)
    for part, out in zip(rows.split(step), result.view(-1).split(step), strict=True):
        peak = part.amax(1, keepdim=True).to(result.dtype)
        # A row of -inf has the sum 0; one with +inf has the sum inf. Neither may become NaN.
        peak.masked_fill_(peak.abs() == torch.inf, 0.0)
        terms = _exp_(_subtract(part, peak, buffer[: len(part)]))
        torch.add(terms.sum(1).log_(), peak[:, 0], out=out)
    return result


def _scaled_softmax(
    x: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    local: Tensor | None = None,
    grad_pick: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """exp(x - lse) * grad_lse, and grad_pick added at the positions `local` (those outside [0, V) left out). `out`: memory for it,
    which may be that of x."""
    result = out if out is not None and out.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return result
    size, wide = x.shape[-1], wide_dtype(x.dtype)
    rows = x.reshape(-1, size)
    step = _chunk_rows(rows)
    shift = lse.reshape(-1, 1).to(wide)
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    factor = grad_lse.reshape(-1, 1).to(wide)
    where = added = None
    if local is not None and grad_pick is not None:
        inside = local.reshape(-1, 1).clamp(0, size - 1)
        added = grad_pick.reshape(-1, 1).to(wide).masked_fill(inside != local.reshape(-1, 1), 0.0).split(step)
        where = inside.split(step)
    # The terms stay in this buffer until they are done: what is written to the result is written once.
    buffer = torch.empty(min(step, len(rows)), size, dtype=wide, device=x.device)
    pieces = zip(rows.split(step), result.view(-1, size).split(step), shift.split(step), factor.split(step), strict=True)
    for number, (part, out, part_shift, part_factor) in enumerate(pieces):
        terms = _exp_(_subtract(part, part_shift, buffer[: len(part)]))
        if out.dtype == wide:
            terms = torch.mul(terms, part_factor, out=out)
        else:
            terms.mul_(part_factor)
        if where is not None and added is not None:
            terms.scatter_add_(1, where[number], added[number])
        if out.dtype != wide:
            out.copy_(terms)
    return result


def _logsumexp_backward(grad: Tensor, x: Tensor, lse: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _scaled_softmax(x, lse, grad, out=out)


def _softmax_minus_onehot(
    x: Tensor, lse: Tensor, index: Tensor, grad_lse: Tensor, grad_pick: Tensor, *, out: Tensor | None = None
) -> Tensor:
    return _scaled_softmax(x, lse, grad_lse, index, grad_pick, out)


def _softmax_minus_onehot_shard(
    x: Tensor,
    lse: Tensor,
    index: Tensor,
    grad_lse: Tensor,
    grad_pick: Tensor,
    axis: str,
    sizes: Sequence[int],
    *,
    out: Tensor | None = None,
) -> Tensor:
    local = locate(index, axis_ranges(axis, sizes, x.shape[-1]))
    return _scaled_softmax(x, lse, grad_lse, local, grad_pick, out)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    if not x.shape[-1]:
        return x.new_zeros(index.shape)
    inside = index.clamp(0, x.shape[-1] - 1)
    return x.gather(-1, inside.unsqueeze(-1)).squeeze(-1).masked_fill_(inside != index, 0.0)


def _pick_backward(grad: Tensor, index: Tensor, size: int) -> Tensor:
    result = grad.new_zeros(*grad.shape, size)
    if not result.numel():
        return result
    inside = index.clamp(0, size - 1)
    return result.scatter_(-1, inside.unsqueeze(-1), grad.masked_fill(inside != index, 0.0).unsqueeze(-1))


def _pick_shard(x: Tensor, index: Tensor, axis: str, sizes: Sequence[int]) -> Tensor:
    return _pick(x, locate(index, axis_ranges(axis, sizes, x.shape[-1])))


def _pick_shard_backward(grad: Tensor, index: Tensor, size: int, axis: str, sizes: Sequence[int]) -> Tensor:
    return _pick_backward(grad, locate(index, axis_ranges(axis, sizes, size)), size)


def _fake_reduced(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:-1])


def _fake_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_pick_backward(grad: Tensor, index: Tensor, size: int, *_: Any) -> Tensor:
    return grad.new_empty(*grad.shape, size)


def _save_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _save_pick(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, *ctx.shard = inputs
    ctx.size = x.shape[-1]
    ctx.save_for_backward(index)


define(
    "logsumexp(Tensor x) -> Tensor",
    _logsumexp,
    lambda x: x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype)),
    lambda ctx, grad: ops.logsumexp_backward(grad, *ctx.saved_tensors),
    _save_logsumexp,
)
define("logsumexp_backward(Tensor grad, Tensor x, Tensor lse) -> Tensor", _logsumexp_backward, lambda grad, x, lse: _fake_like(x))
define(
    "pick(Tensor x, Tensor index) -> Tensor",
    _pick,
    _fake_reduced,
    lambda ctx, grad: (ops.pick_backward(grad, *ctx.saved_tensors, ctx.size), None),
    _save_pick,
)
define("pick_backward(Tensor grad, Tensor index, int size) -> Tensor", _pick_backward, _fake_pick_backward)
define(
    "pick_shard(Tensor x, Tensor index, str axis, int[] sizes) -> Tensor",
    _pick_shard,
    _fake_reduced,
    lambda ctx, grad: (ops.pick_shard_backward(grad, *ctx.saved_tensors, ctx.size, *ctx.shard), None, None, None),
    _save_pick,
)
define(
    "pick_shard_backward(Tensor grad, Tensor index, int size, str axis, int[] sizes) -> Tensor",
    _pick_shard_backward,
    _fake_pick_backward,
)
define(
    "softmax_minus_onehot(Tensor x, Tensor lse, Tensor index, Tensor grad_lse, Tensor grad_pick) -> Tensor",
    _softmax_minus_onehot,
    _fake_like,
)
define(
    "softmax_minus_onehot_shard(Tensor x, Tensor lse, Tensor index, Tensor grad_lse, Tensor grad_pick, str axis, "
    "int[] sizes) -> Tensor",
    _softmax_minus_onehot_shard,
    _fake_like,
)
