"""The grouped matmul of a mixture of experts.

    grouped_linear(x, weight, expert) [T, N]:   out[t] = weight[expert[t]] @ x[t]

x [T, K], weight [E, N, K], expert int64 [T]. A row whose expert is outside [0, E) gives zeros and takes no gradient, so
that experts sharded over ranks add up:

    grouped_linear_shard(x, weight, expert, axis, sizes) [T, N]

has in `weight` this rank's experts, cut over `axis` in the sections `sizes`; `expert` is global, and the sum over the axis is
the whole's result. The two gradients are ops of their own, so that a schedule may part them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .collectives import ops
from .define import define
from .positions import axis_ranges, locate


class _Groups:
    """Rows in the order of their experts; those of no expert last."""

    def __init__(self, expert: Tensor, experts: int):
        key = expert.masked_fill((expert < 0) | (expert >= experts), experts)
        ordered = key.numel() < 2 or (key.device.type == "cpu" and bool((key[1:] >= key[:-1]).all()))
        self.order = None if ordered else torch.argsort(key, stable=True)
        key = key if self.order is None else key[self.order]
        self.rows = key.numel()
        self.ends = torch.searchsorted(key, torch.arange(experts, device=key.device), right=True, out_int32=True)

    def sorted(self, x: Tensor) -> Tensor:
        return x.contiguous() if self.order is None else x.index_select(0, self.order)

    def unsorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(expert, first row, end row) of each expert that has rows."""
        start = 0
        for number, end in enumerate(self.ends.tolist()):
            if end > start:
                yield number, start, end
            start = end

    def clear_rest(self, x: Tensor) -> Tensor:
        """Zeros in the rows of no expert, which the grouped kernel leaves undefined."""
        if not len(self.ends):
            return x.zero_()
        return x.masked_fill_((torch.arange(self.rows, device=x.device) >= self.ends[-1]).unsqueeze(1), 0.0)


def _use_grouped_kernel(*operands: Tensor) -> bool:
    """torch's grouped matmul takes bfloat16, with rows that start at multiples of 16 bytes."""
    if not all(x.device.type == "cuda" and x.dtype == torch.bfloat16 and x.numel() and x.shape[-1] % 8 == 0 for x in operands):
        return False
    return torch.cuda.get_device_capability(operands[0].device) >= (8, 0)


def _by_expert(x: Tensor, matrices: Tensor, expert: Tensor) -> Tensor:
    """out[t] = x[t] @ matrices[expert[t]], for matrices [E, K, N]."""
    groups = _Groups(expert, matrices.shape[0])
    rows = groups.sorted(x)
    if _use_grouped_kernel(x, matrices, matrices.transpose(1, 2)):
        return groups.unsorted(groups.clear_rest(torch.nn.functional.grouped_mm(rows, matrices, offs=groups.ends)))
    out = x.new_empty(x.shape[0], matrices.shape[2])
    last = 0
    for number, start, last in groups.spans():
        torch.mm(rows[start:last], matrices[number], out=out[start:last])
    out[last:].zero_()
    return groups.unsorted(out)


def _grouped_linear(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    return _by_expert(x, weight.transpose(1, 2), expert)


def _grouped_linear_grad_x(grad: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    return _by_expert(grad, weight, expert)


def _grouped_linear_grad_w(grad: Tensor, x: Tensor, expert: Tensor, experts: int) -> Tensor:
    groups = _Groups(expert, experts)
    rows_grad, rows_x = groups.sorted(grad), groups.sorted(x)
    if experts and _use_grouped_kernel(rows_grad, rows_x):
        # Columns are grouped here: rows of no expert lie beyond the last end and are not read.
        return torch.nn.functional.grouped_mm(rows_grad.t(), rows_x, offs=groups.ends)
    result = grad.new_zeros(experts, grad.shape[1], x.shape[1])
    for number, start, end in groups.spans():
        torch.mm(rows_grad[start:end].t(), rows_x[start:end], out=result[number])
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, expert = ctx.saved_tensors
    grad_x = ops.grouped_linear_grad_x(grad, weight, expert) if ctx.needs_input_grad[0] else None
    grad_w = ops.grouped_linear_grad_w(grad, x, expert, weight.shape[0]) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None


define(
    "grouped_linear(Tensor x, Tensor weight, Tensor expert) -> Tensor",
    _grouped_linear,
    lambda x, weight, expert: x.new_empty(x.shape[0], weight.shape[1]),
    _gradients,
    _save,
)
define(
    "grouped_linear_grad_x(Tensor grad, Tensor weight, Tensor expert) -> Tensor",
    _grouped_linear_grad_x,
    lambda grad, weight, expert: grad.new_empty(grad.shape[0], weight.shape[2]),
)
define(
    "grouped_linear_grad_w(Tensor grad, Tensor x, Tensor expert, int experts) -> Tensor",
    _grouped_linear_grad_w,
    lambda grad, x, expert, experts: grad.new_empty(experts, grad.shape[1], x.shape[1]),
)


# One shard of the experts.


def _local(expert: Tensor, experts: int, axis: str, sizes: Sequence[int]) -> Tensor:
    """The rows' experts as this rank counts its `experts`, -1 for those of another rank."""
    return locate(expert, axis_ranges(axis, sizes, experts))


def _grouped_linear_shard(x: Tensor, weight: Tensor, expert: Tensor, axis: str, sizes: Sequence[int]) -> Tensor:
    return _grouped_linear(x, weight, _local(expert, weight.shape[0], axis, sizes))


def _grouped_linear_shard_grad_x(grad: Tensor, weight: Tensor, expert: Tensor, axis: str, sizes: Sequence[int]) -> Tensor:
    return _grouped_linear_grad_x(grad, weight, _local(expert, weight.shape[0], axis, sizes))


def _grouped_linear_shard_grad_w(grad: Tensor, x: Tensor, expert: Tensor, experts: int, axis: str, sizes: Sequence[int]) -> Tensor:
    return _grouped_linear_grad_w(grad, x, _local(expert, experts, axis, sizes), experts)


def _save_shard(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.axis, ctx.sizes = inputs
    ctx.save_for_backward(*operands)


def _shard_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, expert = ctx.saved_tensors
    place = (ctx.axis, ctx.sizes)
    grad_x = ops.grouped_linear_shard_grad_x(grad, weight, expert, *place) if ctx.needs_input_grad[0] else None
    grad_w = ops.grouped_linear_shard_grad_w(grad, x, expert, weight.shape[0], *place) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None, None, None


define(
    "grouped_linear_shard(Tensor x, Tensor weight, Tensor expert, str axis, int[] sizes) -> Tensor",
    _grouped_linear_shard,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[1]),
    _shard_gradients,
    _save_shard,
)
define(
    "grouped_linear_shard_grad_x(Tensor grad, Tensor weight, Tensor expert, str axis, int[] sizes) -> Tensor",
    _grouped_linear_shard_grad_x,
    lambda grad, weight, *_: grad.new_empty(grad.shape[0], weight.shape[2]),
)
define(
    "grouped_linear_shard_grad_w(Tensor grad, Tensor x, Tensor expert, int experts, str axis, int[] sizes) -> Tensor",
    _grouped_linear_shard_grad_w,
    lambda grad, x, expert, experts, *_: grad.new_empty(experts, grad.shape[1], x.shape[1]),
)
