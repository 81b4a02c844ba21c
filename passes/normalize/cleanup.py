"""Ops that change nothing are dropped; casts, constants and scalar arithmetic get one spelling each."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .masks import FALSE, All, truth
from .rewrite import Builder, dtype_of, made_by, shape_of, value_of

aten = torch.ops.aten


def first(b: Builder, x: Any, *_: Any, **__: Any) -> Any:
    return x


def nothing(b: Builder, *_: Any, **__: Any) -> None:
    return None


def detach(b: Builder, x: Any) -> Any:
    return NotImplemented if isinstance(x, fx.Node) and x.meta.get("grad") else x


def to_copy(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    if dtype is None or dtype == dtype_of(x):
        return x
    return b.emit(aten._to_copy.default, x, dtype=dtype)


def to_dtype(b: Builder, x: Any, dtype: torch.dtype, *_: Any, **__: Any) -> Any:
    return b(aten._to_copy.default, x, dtype=dtype)


def to_dtype_layout(b: Builder, x: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
    return b(aten._to_copy.default, x, dtype=dtype)


def type_as(b: Builder, x: Any, other: Any) -> Any:
    return b(aten._to_copy.default, x, dtype=dtype_of(other))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | complex)


def _unchanged(x: Any, number: float) -> bool:
    """Whether arithmetic of `x` with the number keeps its dtype."""
    return not isinstance(number, bool) and (
        dtype_of(x).is_floating_point or (isinstance(number, int) and dtype_of(x) != torch.bool)
    )


def add(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        scaled = y * alpha if _is_number(y) else b(aten.mul.Tensor, y, alpha)
        return b(aten.add.Tensor, x, scaled)
    if _is_number(y) and y == 0 and _unchanged(x, y):
        return x
    return b.emit(aten.add.Tensor, x, y)


def sub(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        scaled = y * alpha if _is_number(y) else b(aten.mul.Tensor, y, alpha)
        return b(aten.sub.Tensor, x, scaled)
    if _is_number(y) and y == 0 and _unchanged(x, y):
        return x
    return b.emit(aten.sub.Tensor, x, y)


def mul(b: Builder, x: Any, y: Any) -> Any:
    if _is_number(y) and y == 1 and _unchanged(x, y):
        return x
    return b.emit(aten.mul.Tensor, x, y)


def div(b: Builder, x: Any, y: Any) -> Any:
    if _is_number(y) and y == 1 and dtype_of(x).is_floating_point:
        return x
    return b.emit(aten.div.Tensor, x, y)


def add_scalar(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
    return b(aten.add.Tensor, x, y, alpha=alpha)


def sub_scalar(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
    return b(aten.sub.Tensor, x, y, alpha=alpha)


def rsub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
    return b(aten.add.Tensor, b(aten.mul.Tensor, x, -alpha), y)


def mul_scalar(b: Builder, x: Any, y: Any) -> Any:
    return b(aten.mul.Tensor, x, y)


def div_scalar(b: Builder, x: Any, y: Any) -> Any:
    return b(aten.div.Tensor, x, y)


def cat(b: Builder, tensors: list[Any], dim: int) -> Any:
    kept = [t for t in tensors if shape_of(t) != (0,)] if any(len(shape_of(t)) > 1 for t in tensors) else list(tensors)
    rank = len(shape_of(kept[0]))
    dim = dim % rank if rank else 0
    kept = [t for t in kept if shape_of(t)[dim] > 0] or kept[:1]
    return kept[0] if len(kept) == 1 else b.emit(aten.cat.default, kept, dim)


def where(b: Builder, condition: Any, x: Any, y: Any) -> Any:
    """A condition that is provably True or False chooses now; dims along which every operand is expanded are expanded after."""
    shape = torch.broadcast_shapes(*(shape_of(t) for t in (condition, x, y)))
    known = truth(condition)
    if known in (All(()), FALSE) and dtype_of(x) == dtype_of(y):
        return b(aten.expand.default, y if known == FALSE else x, list(shape))
    small = [_unspread(b, t) for t in (condition, x, y)]
    if torch.broadcast_shapes(*(shape_of(t) for t in small)) != shape:
        return b(aten.expand.default, b.emit(aten.where.self, *small), list(shape))
    return NotImplemented


def _unspread(b: Builder, x: Any) -> Any:
    """What `x` repeats along dims: the operand of an expand, the number of a constant."""
    if made_by(x, aten.full.default) and shape_of(x):
        return b.scalar(x.args[1], dtype_of(x))
    return x.args[0] if made_by(x, aten.expand.default) else x


def where_scalars(b: Builder, condition: Any, x: Any, y: Any) -> Any:
    """The overloads of `where` with numbers, as `where.self` with 0-dim constants."""
    dtype = torch.result_type(*(v if _is_number(v) else value_of(v) for v in (x, y)))
    tensors = [b.scalar(v, dtype) if _is_number(v) else v for v in (x, y)]
    return b(aten.where.self, condition, *tensors)


def logical(target: Any) -> Any:
    """The rule of `&`, `|`, `^`: `target`, where a constant True or False needs no op."""

    def rule(b: Builder, x: Any, y: Any) -> Any:
        return b(target, x, y)

    return rule


def pad(b: Builder, x: Any, widths: list[int], mode: str, value: float | None) -> Any:
    if mode != "constant":
        return NotImplemented
    return b(aten.constant_pad_nd.default, x, list(widths), 0 if value is None else value)


def constant_pad(b: Builder, x: Any, widths: list[int], value: float) -> Any:
    return x if not any(widths) else NotImplemented


def factory(target: Any) -> Any:
    """Constants name their dtype and no device: they are made where the program runs."""

    def rule(b: Builder, *args: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype")
        if dtype is None:
            dtype = (
                b.origin.meta["val"].dtype if b.origin is not None and b.origin.target is target else _default_dtype(target, args)
            )
        return b.emit(target, *args, dtype=dtype)

    return rule


def _default_dtype(target: Any, args: tuple[Any, ...]) -> torch.dtype:
    numbers = args[1:2] if target is aten.full.default else args
    if target in (aten.zeros.default, aten.ones.default) or any(isinstance(a, float) for a in numbers):
        return torch.get_default_dtype()
    return torch.bool if target is aten.full.default and isinstance(args[1], bool) else torch.int64


def like(target: Any) -> Any:
    """The same for `full_like` and its relatives, whose dtype is their operand's unless named."""

    def rule(b: Builder, x: Any, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        return b.emit(target, x, *args, dtype=None if dtype == dtype_of(x) else dtype)

    return rule


def filled(number: float) -> Any:
    """zeros(shape), ones(shape) as full."""

    def rule(b: Builder, size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> Any:
        return b(aten.full.default, list(size), number, dtype=dtype or torch.get_default_dtype())

    return rule


def new_filled(number: float | None) -> Any:
    """x.new_full and its relatives as full: nothing of x but its dtype matters."""

    def rule(b: Builder, x: Any, size: list[int], *value: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        return b(aten.full.default, list(size), number if number is not None else value[0], dtype=dtype or dtype_of(x))

    return rule


RULES: dict[Any, Any] = {
    aten._assert_tensor_metadata.default: nothing,
    aten._assert_scalar.default: nothing,
    aten._assert_async.default: nothing,
    aten._assert_async.msg: nothing,
    aten.alias.default: first,
    aten.lift_fresh.default: first,
    aten.lift_fresh_copy.default: first,
    aten.clone.default: first,
    aten.contiguous.default: first,
    aten.positive.default: first,
    aten.detach.default: detach,
    aten._to_copy.default: to_copy,
    aten.to.dtype: to_dtype,
    aten.to.dtype_layout: to_dtype_layout,
    aten.to.device: lambda b, x, device, dtype, *_, **__: b(aten._to_copy.default, x, dtype=dtype),
    aten.to.other: lambda b, x, other, *_, **__: b(aten.type_as.default, x, other),
    aten.type_as.default: type_as,
    aten.add.Tensor: add,
    aten.sub.Tensor: sub,
    aten.mul.Tensor: mul,
    aten.div.Tensor: div,
    aten.add.Scalar: add_scalar,
    aten.sub.Scalar: sub_scalar,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: lambda b, x, y, *, alpha=1: b(aten.sub.Tensor, y, x, alpha=alpha),
    aten.zero.default: lambda b, x: b(aten.full.default, list(shape_of(x)), 0, dtype=dtype_of(x)),
    aten.alias_copy.default: first,
    aten.mul.Scalar: mul_scalar,
    aten.div.Scalar: div_scalar,
    aten.square.default: lambda b, x: b(aten.mul.Tensor, x, x),
    aten.min.other: lambda b, x, y: b(aten.minimum.default, x, y),
    aten.max.other: lambda b, x, y: b(aten.maximum.default, x, y),
    aten.cat.default: cat,
    aten.concat.default: lambda b, tensors, dim: b(aten.cat.default, tensors, dim),
    aten.where.self: where,
    aten.where.ScalarOther: where_scalars,
    aten.where.ScalarSelf: where_scalars,
    aten.where.Scalar: where_scalars,
    aten.__and__.Tensor: logical(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: logical(aten.bitwise_or.Tensor),
    aten.__xor__.Tensor: logical(aten.bitwise_xor.Tensor),
    aten.pad.default: pad,
    aten.constant_pad_nd.default: constant_pad,
    aten.arange.default: factory(aten.arange.default),
    aten.arange.start: factory(aten.arange.start),
    aten.arange.start_step: factory(aten.arange.start_step),
    aten.full.default: factory(aten.full.default),
    aten.scalar_tensor.default: lambda b, value, *, dtype=None, **_: b.scalar(value, dtype or torch.get_default_dtype()),
    aten.zeros.default: filled(0),
    aten.ones.default: filled(1),
    aten.new_zeros.default: new_filled(0),
    aten.new_ones.default: new_filled(1),
    aten.new_full.default: new_filled(None),
    aten.zeros_like.default: like(aten.zeros_like.default),
    aten.ones_like.default: like(aten.ones_like.default),
    aten.full_like.default: like(aten.full_like.default),
}
