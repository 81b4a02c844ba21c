"""Matmuls without bias, so that a sharded contraction is summed before the bias; and without merged leading dims.

linear(x, w, bias)            -> linear(x, w) + bias
addmm(bias, x, w)             -> mm(x, w) + bias
mm(reshape(x, [b*s, k]), w)   -> reshape(matmul(x, w), [b*s, n])      the batch stays a dim of its own
convolution(x, w, bias)       -> convolution(x, w) + reshape(bias)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .rewrite import Builder, made_by, shape_of

aten = torch.ops.aten


def _unmerged(b: Builder, x: Any) -> Any:
    """`x` [rows, k] with its rows as the several dims that a reshape merged into them; None when it has none such."""
    if not made_by(x, aten.reshape.default) or len(shape_of(x)) != 2:
        return None
    rows, width = shape_of(x)
    inner = x.args[0]
    shape = shape_of(inner)
    for n in range(2, len(shape)):
        if math.prod(shape[:n]) == rows and math.prod(shape[n:]) == width:
            return b(aten.reshape.default, inner, [*shape[:n], width])
    return None


def _with_bias(b: Builder, y: Any, bias: Any) -> Any:
    """y + bias, under the reshape that merged y's leading dims, if there is one."""
    inner = _unmerged(b, y)
    if inner is not None and len(shape_of(bias)) <= 1:
        return b(aten.reshape.default, b(aten.add.Tensor, inner, bias), list(shape_of(y)))
    return b(aten.add.Tensor, y, bias)


def linear(b: Builder, x: Any, weight: Any, bias: Any) -> Any:
    if bias is not None:
        return _with_bias(b, b(aten.linear.default, x, weight), bias)
    inner = _unmerged(b, x)
    if inner is None:
        return NotImplemented
    return b(aten.reshape.default, b(aten.linear.default, inner, weight), [shape_of(x)[0], shape_of(weight)[0]])


def mm(b: Builder, x: Any, weight: Any, *_: Any) -> Any:
    inner = _unmerged(b, x)
    if inner is None or len(shape_of(weight)) != 2:
        return NotImplemented
    return b(aten.reshape.default, b(aten.matmul.default, inner, weight), [shape_of(x)[0], shape_of(weight)[1]])


def _scaled(b: Builder, x: Any, factor: float) -> Any:
    return x if factor == 1 else b(aten.mul.Tensor, x, factor)


def addmm(b: Builder, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _scaled(b, b(aten.mm.default, x, weight), alpha)
    return product if beta == 0 else _with_bias(b, product, _scaled(b, bias, beta))


def added_to(product: Callable[[Builder, Any, Any], Any]) -> Any:
    """The rule of beta * bias + alpha * product(x, y)."""

    def rule(b: Builder, bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1, **_: Any) -> Any:
        found = _scaled(b, product(b, x, y), alpha)
        return found if beta == 0 else b(aten.add.Tensor, _scaled(b, bias, beta), found)

    return rule


def _pair(value: Any, n: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


def conv(n: int) -> Any:
    """conv1d, conv2d, conv3d as `convolution`. Padding given as a word pads explicitly."""

    def rule(b: Builder, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
        batched = x if len(shape_of(x)) == n + 2 else b(aten.unsqueeze.default, x, 0)
        stride, dilation = _pair(stride, n), _pair(dilation, n)
        if isinstance(padding, str):
            batched, padding = _same_padding(b, batched, weight, padding, dilation)
        args = (batched, weight, bias, stride, _pair(padding, n), dilation, False, [0] * n, groups)
        y = b(aten.convolution.default, *args)
        return y if batched is x or len(shape_of(x)) == n + 2 else b(aten.squeeze.dim, y, 0)

    return rule


def _same_padding(b: Builder, x: Any, weight: Any, padding: str, dilation: list[int]) -> tuple[Any, list[int]]:
    kernel = shape_of(weight)[2:]
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, [t // 2 for t in total]
    widths = [w for t in reversed(total) for w in (t // 2, t - t // 2)]
    return b(aten.constant_pad_nd.default, x, widths, 0), [0] * len(total)


def convolution(b: Builder, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    if bias is None:
        return NotImplemented
    y = b(aten.convolution.default, x, weight, None, *rest)
    shape = [1] * len(shape_of(y))
    shape[1] = shape_of(bias)[0]
    return b(aten.add.Tensor, y, b(aten.reshape.default, bias, shape))


RULES: dict[Any, Any] = {
    aten.linear.default: linear,
    aten.mm.default: mm,
    aten.matmul.default: mm,
    aten.addmm.default: addmm,
    aten.baddbmm.default: added_to(lambda b, x, y: b(aten.bmm.default, x, y)),
    aten.addmv.default: added_to(lambda b, x, y: b(aten.mv.default, x, y)),
    aten.addr.default: added_to(lambda b, x, y: b(aten.outer.default, x, y)),
    aten.addbmm.default: added_to(lambda b, x, y: b(aten.sum.dim_IntList, b(aten.bmm.default, x, y), [0])),
    aten.conv1d.default: conv(1),
    aten.conv2d.default: conv(2),
    aten.conv3d.default: conv(3),
    aten.conv1d.padding: conv(1),
    aten.conv2d.padding: conv(2),
    aten.conv3d.padding: conv(3),
    aten.convolution.default: convolution,
}
