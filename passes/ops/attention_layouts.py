"""How attention's results lie in memory: as its operands do, whose heads are mostly views of [batch, tokens, heads x width].

What follows makes such a view of them again, for which no copy is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_out(q: Tensor, v: Tensor, device: torch.device) -> Tensor:
    batch, heads, queries, width = q.shape
    if v.shape[3] == width and q.stride(3) == 1:
        return torch.empty_like(q, device=device)
    if q.stride(1) < q.stride(2) and q.stride(3) == 1:
        return q.new_empty(batch, queries, heads, v.shape[3], device=device).transpose(1, 2)
    return q.new_empty(batch, heads, queries, v.shape[3], device=device)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
    return a, b, c
