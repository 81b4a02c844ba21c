"""logsumexp of a sharded last dim: each rank reduces its shard, and the ranks' results are combined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import losses  # noqa: F401  (defines logsumexp)
from .collectives import library, ops

library.define("logsumexp_shard(Tensor x, str axis) -> Tensor")


def _combine(x: Tensor, axis: str) -> Tensor:
    partial = ops.logsumexp.default(x)
    return torch.logsumexp(ops.all_gather.default(partial.unsqueeze(0), axis, 0, []), 0)


class _LogSumExpShard(torch.autograd.Function):
    """x is V on its last dim, the result I. d lse / dx = exp(x - lse), from the incoming I cotangent: no traffic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Tensor:  # type: ignore[override]
        lse = _combine(x, axis)
        ctx.save_for_backward(x, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, lse = ctx.saved_tensors
        return ops.logsumexp_backward.default(grad, x, lse), None


library.impl("logsumexp_shard", lambda x, axis: _LogSumExpShard.apply(x, axis), "CompositeImplicitAutograd")
