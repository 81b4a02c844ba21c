"""Attention as one op, with its backward as another. The kernel is chosen when it runs.

    attention(q, k, v, mask, causal, scale) -> (out, lse)

q [B, H, Sq, D], k [B, G, Sk, D], v [B, G, Sk, Dv]; out [B, H, Sq, Dv] in q's dtype. G divides H: query heads h of
H/G in a row share key and value head h // (H/G). lse [B, H, Sq] is the natural
log-sum-exp of the scaled and masked scores (float32; float64 for float64 inputs): what the backward recomputes the
probabilities from, so that no Sq x Sk tensor is kept. `mask` broadcasts to [B, H, Sq, Sk]: bool (True: attend) or a
float that is added to the scores; it has no gradient. `causal` lets query i attend to keys 0..i, on top of the mask.

A query that may attend to no key gives zeros and takes no gradient, as in F.scaled_dot_product_attention; lse is of no
meaning there. Gradients flow through `out` only.

`out` is laid out as torch.empty_like(q) is (contiguous where q's last dim is not dense), so that views of it that
were captured hold; the gradients as [B, S, H, D] in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked_attention
from .attention_layouts import empty_gradients, empty_out
from .collectives import ops
from .define import define

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    mask = _four_dims(mask)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        out, lse = _empty_results(q, v)
        return out.zero_(), lse.zero_()
    if _use_cpu_kernel(q):
        return _cpu_forward(q, k, v, mask, causal, scale)
    if _use_cuda_flash(q, k, v, mask, causal):
        return _flash_forward(q, k, v, causal, scale)
    if _use_cuda_efficient(q):
        return _efficient_forward(q, k, v, mask, causal, scale)
    return _chunked_forward(q, k, v, mask, causal, scale)


def _attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _four_dims(mask)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        found = tuple(x.zero_() for x in empty_gradients(q, k, v))
    elif _use_cpu_kernel(q):
        found = _cpu_backward(grad_out, q, k, v, out, lse, mask, causal, scale)
    elif _use_cuda_flash(q, k, v, mask, causal):
        found = _flash_backward(grad_out, q, k, v, out, lse, causal, scale)
    elif _use_cuda_efficient(q):
        found = _efficient_backward(grad_out, q, k, v, out, lse, mask, causal, scale)
    else:
        found = _chunked_backward(grad_out, q, k, v, out, lse, mask, causal, scale)
    grad_q, grad_k, grad_v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in found)
    return grad_q, grad_k, grad_v


# Which kernel. Forward and backward ask the same questions of the same shapes, so they agree.


def _use_cpu_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64, *_HALF)


def _use_cuda_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Flash attention aligns a causal mask to the last key where Sq != Sk, we to the first: square only."""
    if q.device.type != "cuda" or q.dtype not in _HALF or mask is not None or (causal and q.shape[2] != k.shape[2]):
        return False
    capability, width = torch.cuda.get_device_capability(q.device), max(q.shape[3], v.shape[3])
    # Its backward takes heads wider than 192 on the data-centre parts alone.
    return capability >= (8, 0) and (width <= 192 or (width <= 256 and capability[1] == 0))


def _use_cuda_efficient(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.float32, *_HALF)


# Shared key and value heads, for kernels that take one for each query head.


def _repeated(heads: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, D] with each head repeated up to `heads`."""
    repeats = heads // k.shape[1]
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x [B, G, S, D] from that of its repeated heads."""
    return grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)


# Results and masks.


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    lse = q.new_empty((batch, queries, heads), dtype=_accumulator(q)).transpose(1, 2)
    return empty_out(q, v, q.device), lse


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _settled(out: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """`out`, cut to v's width, in the layout that the fake kernel promised."""
    out = _cut_width(out, v)
    strides = empty_out(q, v, torch.device("meta")).stride()
    if out.stride() == strides:
        return out
    order = sorted(range(4), key=lambda dim: -strides[dim])
    return out.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])


def _four_dims(mask: Tensor | None) -> Tensor | None:
    """`mask` with four dims, and expanded dims back to size 1, so that work on the mask is done once."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    for dim in range(4):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _added(mask: Tensor, dtype: torch.dtype, masked: float) -> Tensor:
    """The mask as a float to add to the scores, `masked` where bool says not to attend."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), masked)


def _pad_width(x: Tensor, width: int) -> Tensor:
    """`x` with zeros up to `width`, and a last dim that is dense: every kernel takes that for granted."""
    if x.shape[-1] != width:
        return F.pad(x, (0, width - x.shape[-1])).contiguous()
    return x if x.stride(-1) == 1 else x.contiguous()


def _cut_width(x: Tensor, like: Tensor) -> Tensor:
    return x.narrow(-1, 0, like.shape[-1])


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# CPU: the kernel of F.scaled_dot_product_attention. It takes one head size; zeros beyond D or Dv change nothing.


def _cpu_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    width = max(q.shape[3], v.shape[3])
    q, k, v = (_pad_width(x, width) for x in (q, k, v))
    return q, k, v, None if mask is None else _added(mask, q.dtype, -torch.inf)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide_q, wide_k, wide_v, added = _cpu_inputs(q, k, v, mask)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(wide_q, wide_k, wide_v, 0.0, causal, attn_mask=added, scale=scale)
    return _settled(out, q, v), lse


def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide_q, wide_k, wide_v, added = _cpu_inputs(q, k, v, mask)
    width = wide_q.shape[3]
    grad_q, grad_k, grad_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _pad_width(grad_out, width), wide_q, wide_k, wide_v, _pad_width(out, width), lse, 0.0, causal, attn_mask=added, scale=scale
    )
    return _cut_width(grad_q, q), _cut_width(grad_k, k), _cut_width(grad_v, v)


# CUDA, half precision without a mask: flash attention. Head sizes in multiples of 8.


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    width = _round_up(max(q.shape[3], v.shape[3]), 8)
    wide_q, wide_k, wide_v = (_pad_width(x, width) for x in (q, k, v))
    out, lse = _aten._scaled_dot_product_flash_attention(wide_q, wide_k, wide_v, 0.0, causal, False, scale=scale)[:2]
    return _settled(out, q, v), lse


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = _round_up(max(q.shape[3], v.shape[3]), 8)
    wide_q, wide_k, wide_v, wide_out, wide_grad = (_pad_width(x, width) for x in (q, k, v, out, grad_out))
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    # None: the sequences are all of one length, so there are no cumulative lengths.
    grad_q, grad_k, grad_v = _aten._scaled_dot_product_flash_attention_backward(
        wide_grad, wide_q, wide_k, wide_v, wide_out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
        0.0, causal, no_dropout, no_dropout, scale=scale,
    )  # fmt: skip
    return _cut_width(grad_q, q), _cut_width(grad_k, k), _cut_width(grad_v, v)


# CUDA, otherwise: memory-efficient attention. Rows of operands and of the bias start at multiples of 16 bytes.


def _efficient_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    multiple = 4 if q.dtype == torch.float32 else 8
    q, k, v = (_pad_width(x, _round_up(x.shape[3], multiple)) for x in (q, k, v))
    if mask is None:
        return q, k, v, None
    keys = k.shape[2]
    # Finite: rows that are masked everywhere must not become NaN here; `_dead_rows` clears them.
    lowest = torch.finfo(q.dtype).min / 4
    added = _added(mask, q.dtype, lowest).clamp(min=lowest)
    added = added.expand(*added.shape[:3], keys)
    added = _pad_width(added, _round_up(keys, 16)).contiguous().narrow(3, 0, keys)
    return q, k, v, added.expand(q.shape[0], q.shape[1], q.shape[2], keys)


def _dead_rows(mask: Tensor, causal: bool, queries: int, keys: int) -> Tensor:
    """bool, broadcastable to [B, H, Sq, 1]: queries that may attend to no key."""
    allowed = mask if mask.dtype == torch.bool else mask != -torch.inf
    if causal:
        allowed = allowed.expand(*allowed.shape[:2], queries, keys).tril()
    return allowed.any(-1, keepdim=True).logical_not_()


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide_q, wide_k, wide_v, bias = _efficient_inputs(q, *_repeated(q.shape[1], k, v), mask)
    out, lse = _aten._scaled_dot_product_efficient_attention(wide_q, wide_k, wide_v, bias, True, 0.0, causal, scale=scale)[:2]
    if mask is not None:
        out = out.masked_fill_(_dead_rows(mask, causal, q.shape[2], k.shape[2]), 0.0)
    return _settled(out, q, v), lse.narrow(2, 0, q.shape[2])


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide_q, wide_k, wide_v, bias = _efficient_inputs(q, *_repeated(q.shape[1], k, v), mask)
    if mask is not None:
        grad_out = grad_out.masked_fill(_dead_rows(mask, causal, q.shape[2], k.shape[2]), 0.0)
    queries = q.shape[2]
    # The kernel works on blocks of 32 queries; infinity gives those beyond the end no weight.
    wide_lse = F.pad(lse, (0, _round_up(queries, 32) - queries), value=torch.inf).contiguous()
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    grad_q, grad_k, grad_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
        _pad_width(grad_out, wide_v.shape[3]), wide_q, wide_k, wide_v, bias, _pad_width(out, wide_v.shape[3]), wide_lse,
        no_dropout, no_dropout, 0.0, [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return _cut_width(grad_q, q), _summed(_cut_width(grad_k, k), k), _summed(_cut_width(grad_v, v), v)


# Anywhere: exact, a few queries at a time.


def _chunked_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(q, v)
    top, total = chunked_attention.forward(q, *_repeated(q.shape[1], k, v), mask, causal, scale, out)
    return out, torch.add(top, total.log_(), out=lse)


def _chunked_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    many = _repeated(q.shape[1], k, v)
    grad_q, grad_k, grad_v, _ = chunked_attention.backward(grad_out, q, *many, out, lse, None, mask, causal, scale)
    return grad_q, _summed(grad_k, k), _summed(grad_v, v)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # no zeros for lse
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, mask)


def _gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, mask = ctx.saved_tensors
    return (*ops.attention_backward(grad_out, q, k, v, out, lse, mask, ctx.causal, ctx.scale), None, None, None)


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> (Tensor out, Tensor lse)",
    _attention,
    _fake_attention,
    _gradients,
    _save,
)
define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, bool causal, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
)
