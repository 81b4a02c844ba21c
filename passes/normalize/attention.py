"""Attention as one op, with a mask that is provably causal or absent as a flag; spelled out for more than four dims."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from ..ops import attention as _ops  # noqa: F401  (defines attention and chunked_attention)
from .masks import allowed_by, boolean_mask, truth
from .rewrite import Builder, dtype_of, shape_of

aten = torch.ops.aten
ours = torch.ops.shardwright


def attention(
    b: Builder,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    dropout: float,
    causal: bool,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """scaled_dot_product_attention: q [.., queries, d], k [.., keys, d], v [.., keys, e], mask broadcast to [.., queries, keys]."""
    scale = 1 / math.sqrt(shape_of(q)[-1]) if scale is None else scale
    if enable_gqa:
        k, v = (_repeat_heads(b, x, shape_of(q)[-3]) for x in (k, v))
    q, k, v = _common_batch(b, q, k, v)
    rank = len(shape_of(q))
    queries, keys = shape_of(q)[-2], shape_of(k)[-2]
    if mask is not None and dtype_of(mask) != torch.bool and not mask.meta.get("grad"):
        mask = _as_boolean(mask, queries, keys)
    if mask is not None and dtype_of(mask) == torch.bool:
        mask, causal = _simplified(b, mask, causal, queries, keys)
    if mask is not None:
        mask = _unexpanded(mask)
    if rank > 4:
        return explicit(b, q, k, v, mask, dropout, causal, scale)
    while len(shape_of(q)) < 4:
        q, k, v = (b(aten.unsqueeze.default, x, max(0, len(shape_of(x)) - 2)) for x in (q, k, v))
    if mask is not None and rank == 3 and len(shape_of(mask)) == 3:
        mask = b(aten.unsqueeze.default, mask, 1)
    learned = mask is not None and bool(mask.meta.get("grad"))
    if dropout > 0 or learned or (causal and queries != keys):
        parts = (mask, None) if learned else (None, mask)
        drawn = (b.seed(), causal, scale, float(dropout), b.site()) if dropout > 0 else (None, causal, scale, 0.0, 0)
        out = b(ours.chunked_attention.default, q, k, v, *parts, *drawn, [], [], [], [], [])
    else:
        out = b(ours.attention.default, q, k, v, mask, causal, scale)
    return b(aten.reshape.default, b.emit(operator.getitem, out, 0), [*_batch(q, rank), queries, shape_of(v)[-1]])


def _batch(q: Any, rank: int) -> tuple[int, ...]:
    shape = shape_of(q)
    return shape[:2] if rank == 4 else shape[:1] if rank == 3 else ()


def _repeat_heads(b: Builder, x: Any, heads: int) -> Any:
    dim = len(shape_of(x)) - 3
    return b(aten.repeat_interleave.self_int, x, heads // shape_of(x)[dim], dim)


def _common_batch(b: Builder, *tensors: Any) -> list[Any]:
    batch = torch.broadcast_shapes(*(shape_of(t)[:-2] for t in tensors))
    return [b(aten.expand.default, t, [*batch, *shape_of(t)[-2:]]) for t in tensors]


def _as_boolean(mask: Any, queries: int, keys: int) -> Any:
    """The boolean mask an additive one of 0 and the lowest number stands for, when no row is left without a key."""
    allowed = allowed_by(mask)
    if allowed is None:
        return mask
    found = truth(allowed)
    plain = not isinstance(found, str) and all(not hasattr(p, "node") for p in found.parts)
    return allowed if plain else mask


def _simplified(b: Builder, mask: Any, causal: bool, queries: int, keys: int) -> tuple[Any, bool]:
    """The mask without what is provably True, and whether it is, or was, causal."""
    found = boolean_mask(b, mask, queries, keys)
    if found is None:
        return mask, causal
    rest: Any = None
    for part in found.parts:
        rest = part if rest is None else b(aten.bitwise_and.Tensor, rest, part)
    if rest is not None and len(shape_of(rest)) == 1:
        rest = b(aten.unsqueeze.default, rest, 0)
    return rest, causal or found.causal


def _unexpanded(mask: Any) -> Any:
    """What the mask is a plain expand of: it broadcasts the same."""
    if mask.target is aten.expand.default and len(shape_of(mask.args[0])) == len(shape_of(mask)):
        return mask.args[0]
    return mask


def explicit(b: Builder, q: Any, k: Any, v: Any, mask: Any, dropout: float, causal: bool, scale: float) -> Any:
    """The same by matmul, softmax, dropout and matmul. A row without any key gives 0 under a boolean mask."""
    queries, keys = shape_of(q)[-2], shape_of(k)[-2]
    scores = b(aten.mul.Tensor, b(aten.matmul.default, q, b(aten.mT.default, k)), scale)
    if causal:
        column = b(aten.arange.default, keys, dtype=torch.int64)
        row = b(aten.unsqueeze.default, b(aten.arange.default, queries, dtype=torch.int64), 1)
        lower = b(aten.le.Tensor, column, row)
        mask = lower if mask is None else b(aten.bitwise_and.Tensor, mask, lower)
    if mask is None:
        weights = b(aten.softmax.int, scores, len(shape_of(scores)) - 1)
    elif dtype_of(mask) == torch.bool:
        dtype = dtype_of(scores)
        scores = b(aten.where.self, mask, scores, b.scalar(torch.finfo(dtype).min, dtype))
        weights = b(aten.softmax.int, scores, len(shape_of(scores)) - 1)
        weights = b(aten.where.self, mask, weights, b.scalar(0.0, dtype))
    else:
        weights = b(aten.softmax.int, b(aten.add.Tensor, scores, mask), len(shape_of(scores)) - 1)
    if dropout > 0:
        weights = b(aten.dropout.default, weights, dropout, True)
    return b(aten.matmul.default, weights, v)


RULES: dict[Any, Any] = {aten.scaled_dot_product_attention.default: attention}
