"""Attention with a bias that is learned, or with dropout, a few queries at a time: no tensor of all queries times all keys but
the bias itself.

    chunked_attention(q, k, v, bias, mask, seed, causal, scale, p, site, shape, axes, dims, counts, sizes) -> (out, top, total)

q, k, v, mask, causal, scale and out as in ops/attention.py. `bias` broadcasts to [B, H, Sq, Sk], is added to the scaled scores
and has a gradient. Weights are dropped with probability `p` by their position in the global [B, H, Sq, Sk] `shape` ([]: q's and
k's own), of which this rank has what the cuts leave (ops/random.py): the same numbers as `dropout` of the whole would draw.

top, total [B, H, Sq] are each query's largest score and its sum of exp(score - top): what the backward recomputes the
weights from. One number for both would not do where all scores are as low as the type goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_layouts import empty_gradients, empty_out
from .collectives import ops
from .define import define
from .positions import compose_ranges, cut_ranges, whole_ranges
from .random import dropped

CHUNK_SCORES = 1 << 22
"""Scores held at a time."""

Drop = Callable[[Tensor, int], Tensor]
"""Dropout of weights [B, H, rows, Sk], the first of which are those of query `start`."""


def chunks(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        yield start, min(start + step, q.shape[2])


def four_dims(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 4 else x.view(*[1] * (4 - x.dim()), *x.shape)


def rows_of(x: Tensor, start: int, end: int) -> Tensor:
    """Rows start..end of what broadcasts to [B, H, Sq, Sk]."""
    return x if x.shape[2] == 1 else x[:, :, start:end]


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool, scale: float, start: int) -> Tensor:
    """Masked scores of the queries `q`, the first of which is query `start`, over all keys."""
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    end = start + q.shape[2]
    if bias is not None:
        scores.add_(rows_of(bias, start, end))
    if mask is not None:
        rows = rows_of(mask, start, end)
        scores = scores.masked_fill_(rows.logical_not(), -torch.inf) if rows.dtype == torch.bool else scores.add_(rows)
    if causal:
        row = torch.arange(start, end, device=q.device)
        scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > row[:, None], -torch.inf)
    return scores


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor,
    bias: Tensor | None = None, drop: Drop | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills `out` [B, H, Sq, Dv]; top and total, in the type that sums are made in."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    top, total = (q.new_empty(q.shape[:3], dtype=wide) for _ in range(2))
    k, v = k.to(wide), v.to(wide)
    for start, end in chunks(q, k):
        scores = _scores(q[:, :, start:end].to(wide), k, bias, mask, causal, scale, start)
        high = scores.amax(-1)
        high.masked_fill_(high == -torch.inf, 0.0)
        weights = scores.sub_(high[..., None]).exp_()
        sums = weights.sum(-1)
        sums.masked_fill_(sums == 0.0, 1.0)  # no key at all: zeros
        weights.div_(sums[..., None])
        out[:, :, start:end] = torch.matmul(weights if drop is None else drop(weights, start), v)
        top[:, :, start:end], total[:, :, start:end] = high, sums
    return top, total


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, total: Tensor | None,
    mask: Tensor | None, causal: bool, scale: float, bias: Tensor | None = None, drop: Drop | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, in the type of sums, of bias. `total` None: `top` is the log of the sum of all."""
    wide = top.dtype
    wide_k, wide_v = k.to(wide), v.to(wide)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
    for start, end in chunks(q, k):
        rows_q, rows_grad, rows_out = (x[:, :, start:end].to(wide) for x in (q, grad_out, out))
        weights = _scores(rows_q, wide_k, bias, mask, causal, scale, start).sub_(top[:, :, start:end, None]).exp_()
        if total is not None:
            weights.div_(total[:, :, start:end, None])
        kept = weights if drop is None else drop(weights, start)
        grad_v += torch.matmul(kept.transpose(-1, -2), rows_grad)
        grad_kept = torch.matmul(rows_grad, wide_v.transpose(-1, -2))
        grad_scores = grad_kept if drop is None else drop(grad_kept, start)
        # d scores = weights * (d weights - sum(weights * d weights)), and that sum is grad_out . out.
        grad_scores.sub_((rows_grad * rows_out).sum(-1, keepdim=True)).mul_(weights)
        if grad_bias is not None:
            rows = rows_of(grad_bias, start, end)
            rows += grad_scores.sum_to_size(*rows.shape)
        grad_scores.mul_(scale)
        grad_q[:, :, start:end] = torch.matmul(grad_scores, wide_k)
        grad_k += torch.matmul(grad_scores.transpose(-1, -2), rows_q)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


# --- the op ---------------------------------------------------------------------------------------------------------


def _dropout(
    q: Tensor, k: Tensor, seed: Tensor | None, p: float, site: int, shape: Sequence[int], *cuts: Sequence[Any]
) -> Drop | None:
    if p == 0.0:
        return None
    assert seed is not None
    own = [*q.shape[:3], k.shape[2]]
    batch, heads, queries, keys = cut_ranges(shape, *cuts) if shape else whole_ranges(own)

    def drop(weights: Tensor, start: int) -> Tensor:
        held = [batch, heads, compose_ranges(queries, [(start, weights.shape[2])]), keys]
        return dropped(weights, seed, p, site, shape or own, held)

    return drop


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None, causal: bool, scale: float,
    p: float, site: int, shape: Sequence[int], *cuts: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = empty_out(q, v, q.device)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        top = q.new_zeros(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        return out.zero_(), top, torch.ones_like(top)
    drop = _dropout(q, k, seed, p, site, shape, *cuts)
    return out, *forward(q, k, v, four_dims(mask), causal, scale, out, four_dims(bias), drop)


def _attention_backward(
    grad_out: Tensor, out: Tensor, top: Tensor, total: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, causal: bool, scale: float, p: float, site: int, shape: Sequence[int],
    *cuts: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _fake_backward(grad_out, out, top, total, q, k, v, bias)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return tuple(x.zero_() for x in grads)  # type: ignore[return-value]
    drop = _dropout(q, k, seed, p, site, shape, *cuts)
    found = backward(grad_out, q, k, v, out, top, total, four_dims(mask), causal, scale, four_dims(bias), drop)
    for into, x in zip(grads, found, strict=True):
        if x is not None:
            into.copy_(x.reshape(into.shape))
    return grads


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    top = q.new_empty(q.shape[:3], dtype=wide)
    return empty_out(q, v, q.device), top, torch.empty_like(top)


def _fake_backward(
    grad_out: Tensor, out: Tensor, top: Tensor, total: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_gradients(q, k, v), q.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, mask, seed, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, q, k, v, bias, mask, seed)


def _gradients(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_q, grad_k, grad_v, grad_bias = ops.chunked_attention_backward(grad_out, *ctx.saved_tensors, *ctx.rest)
    return grad_q, grad_k, grad_v, grad_bias if ctx.needs_input_grad[3] else None, *[None] * 11


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? seed, bool causal, float scale, float p, int site, "
    "int[] shape, str[] axes, int[] dims, int[] counts, int[] sizes"
)
define(f"chunked_attention({_ARGUMENTS}) -> (Tensor out, Tensor top, Tensor total)", _attention, _fake_attention, _gradients, _save)
define(
    f"chunked_attention_backward(Tensor grad_out, Tensor out, Tensor top, Tensor total, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
)
