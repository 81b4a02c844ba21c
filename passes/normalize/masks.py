"""Proofs about index tensors and masks: values that follow from indices alone, read symbolically, never guessed from shapes.

An `Affine` is an integer tensor whose element at index (i0, i1, ...) is constant + c0*i0 + c1*i1 + ...; an `AtLeast` a
boolean one that is True where such a form is >= 0; an `All` the conjunction of several; an `Opaque` any other tensor. All
are taken from the graph's producers of a value: arange, full, unsqueeze, expand, comparisons, `&`, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...compiler.torch_compat import OpOverload
from .rewrite import Builder, arguments, bind, dtype_of, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficients[d] * index[d], of `shape` (a dim of size 1 has coefficient 0)."""

    shape: tuple[int, ...]
    coefficients: tuple[int, ...]
    constant: int

    def bounds(self) -> tuple[int, int]:
        steps = [c * (n - 1) for c, n in zip(self.coefficients, self.shape, strict=True)]
        return self.constant + sum(min(0, s) for s in steps), self.constant + sum(max(0, s) for s in steps)


@dataclass(frozen=True)
class AtLeast:
    """True where the form is >= 0."""

    form: Affine


@dataclass(frozen=True)
class Opaque:
    """A boolean node, right-aligned to broadcast."""

    node: fx.Node


@dataclass(frozen=True)
class All:
    """The conjunction of its parts; True when there are none."""

    parts: tuple[AtLeast | Opaque, ...]


FALSE = "false"
Truth = All | str


def affine(x: Any) -> Affine | None:
    """The affine form of an integer node, or None."""
    if not isinstance(x, fx.Node) or x.op != "call_function" or dtype_of_or_none(x) not in (torch.int64, torch.int32):
        return None
    reader = AFFINE.get(x.target)
    form = reader(x) if reader else None
    return _fitted(x) if form is None else form


EVALUATED, ANCESTORS = 1 << 20, 64
"""The elements, and the nodes before it, up to which a value is computed to be read."""


def _fitted(x: fx.Node) -> Affine | None:
    """The form of a small tensor that no input decides, from its numbers: a captured graph has one shape."""
    value = _evaluated(x)
    if value is None or not value.numel():
        return None
    first = int(value.flatten()[0])
    steps = tuple(int(value.select(d, 1).flatten()[0]) - first if n > 1 else 0 for d, n in enumerate(value.shape))
    fit = torch.full(value.shape, first)
    for d, (n, step) in enumerate(zip(value.shape, steps, strict=True)):
        fit += (torch.arange(n) * step).view([n if k == d else 1 for k in range(value.dim())])
    return Affine(tuple(value.shape), steps, first) if torch.equal(fit, value.to(torch.int64)) else None


def _evaluated(x: fx.Node) -> torch.Tensor | None:
    """What a node computes from constants alone, None where it depends on an input, a parameter, or on much."""
    before: dict[fx.Node, None] = {}
    stack = [x]
    while stack:
        n = stack.pop()
        if n in before:
            continue
        value = n.meta.get("val")
        small = isinstance(value, torch.Tensor) and value.numel() <= EVALUATED
        if not isinstance(n.target, OpOverload) or not small or len(before) == ANCESTORS:
            return None
        if torch.Tag.nondeterministic_seeded in n.target.tags:
            return None
        before[n] = None
        stack.extend(n.all_input_nodes)
    known: dict[fx.Node, torch.Tensor] = {}
    for n in x.graph.nodes:
        if n in before:
            kwargs = {k: v for k, v in n.kwargs.items() if k not in ("device", "pin_memory")}
            known[n] = n.target(*fx.map_arg(n.args, known.__getitem__), **fx.map_arg(kwargs, known.__getitem__))
            if n is x:
                break
    return known[x]


def dtype_of_or_none(x: fx.Node) -> torch.dtype | None:
    value = x.meta["val"]
    return value.dtype if isinstance(value, torch.Tensor) else None


def _constant(x: fx.Node, number: Any) -> Affine | None:
    shape = shape_of(x)
    return Affine(shape, (0,) * len(shape), int(number)) if isinstance(number, int) and not isinstance(number, bool) else None


def _arange(x: fx.Node) -> Affine | None:
    args = arguments(x)
    start, step = 0, 1
    if x.target is not aten.arange.default:
        start = args[0]
        step = args[2] if len(args) > 2 else 1
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    (size,) = shape_of(x)
    return Affine((size,), (step if size > 1 else 0,), start)


def _unsqueeze(x: fx.Node) -> Affine | None:
    inner, dim = affine(x.args[0]), arguments(x)[1]
    if inner is None:
        return None
    spread = (*inner.coefficients[:dim], 0, *inner.coefficients[dim:])
    return Affine(shape_of(x), spread, inner.constant)


def _reshape(x: fx.Node) -> Affine | None:
    """A reshape that only adds or drops dims of size 1."""
    inner = affine(x.args[0])
    if inner is None or [s for s in inner.shape if s != 1] != [s for s in shape_of(x) if s != 1]:
        return None
    kept = iter(c for c, s in zip(inner.coefficients, inner.shape, strict=True) if s != 1)
    return Affine(shape_of(x), tuple(next(kept) if s != 1 else 0 for s in shape_of(x)), inner.constant)


def _expand(x: fx.Node) -> Affine | None:
    inner = affine(x.args[0])
    return None if inner is None else _broadcast(inner, shape_of(x))


def _broadcast(form: Affine, shape: Sequence[int]) -> Affine:
    pad = (0,) * (len(shape) - len(form.shape))
    return Affine(tuple(shape), pad + form.coefficients, form.constant)


def _permuted(x: fx.Node) -> Affine | None:
    inner = affine(x.args[0])
    if inner is None:
        return None
    dims = list(range(len(inner.shape)))
    if x.target is aten.permute.default:
        dims = list(arguments(x)[1])
    else:
        a, c = arguments(x)[1:3]
        dims[a], dims[c] = dims[c], dims[a]
    return Affine(shape_of(x), tuple(inner.coefficients[d] for d in dims), inner.constant)


def _slice(x: fx.Node) -> Affine | None:
    inner = affine(x.args[0])
    if inner is None:
        return None
    _, dim, start, _, step = arguments(x)
    c = inner.coefficients[dim]
    coefficients = (*inner.coefficients[:dim], c * step if shape_of(x)[dim] > 1 else 0, *inner.coefficients[dim + 1 :])
    return Affine(shape_of(x), coefficients, inner.constant + c * (start or 0))


def _operand(x: Any, shape: Sequence[int]) -> Affine | None:
    if isinstance(x, int) and not isinstance(x, bool):
        return Affine(tuple(shape), (0,) * len(shape), x)
    form = affine(x)
    return None if form is None else _broadcast(form, shape)


def _combined(shape: Sequence[int], x: Any, y: Any, sign: int) -> Affine | None:
    a, c = _operand(x, shape), _operand(y, shape)
    if a is None or c is None:
        return None
    coefficients = tuple(p + sign * q for p, q in zip(a.coefficients, c.coefficients, strict=True))
    return Affine(tuple(shape), coefficients, a.constant + sign * c.constant)


def _add(x: fx.Node) -> Affine | None:
    (a, c), kwargs = bind(x.target, x.args, x.kwargs)
    sign = 1 if x.target is aten.add.Tensor else -1
    return _combined(shape_of(x), a, c, sign) if kwargs.get("alpha", 1) == 1 else None


def _scaled(x: fx.Node, factor: Any) -> Affine | None:
    inner = affine(x.args[0])
    if inner is None or not isinstance(factor, int) or isinstance(factor, bool):
        return None
    return Affine(inner.shape, tuple(c * factor for c in inner.coefficients), inner.constant * factor)


AFFINE: dict[Any, Callable[[fx.Node], Affine | None]] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: lambda x: _constant(x, arguments(x)[1]),
    aten.full_like.default: lambda x: _constant(x, arguments(x)[1]),
    aten.zeros_like.default: lambda x: _constant(x, 0),
    aten.ones_like.default: lambda x: _constant(x, 1),
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _reshape,
    aten.reshape.default: _reshape,
    aten.expand.default: _expand,
    aten.permute.default: _permuted,
    aten.transpose.int: _permuted,
    aten.slice.Tensor: _slice,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.mul.Tensor: lambda x: _scaled(x, x.args[1]),
    aten.neg.default: lambda x: _scaled(x, -1),
    aten._to_copy.default: lambda x: affine(x.args[0]),
}

COMPARISONS: dict[Any, tuple[int, int]] = {  # sign of (x - y), and what to add, for "form >= 0"
    aten.ge.Tensor: (1, 0),
    aten.ge.Scalar: (1, 0),
    aten.gt.Tensor: (1, -1),
    aten.gt.Scalar: (1, -1),
    aten.le.Tensor: (-1, 0),
    aten.le.Scalar: (-1, 0),
    aten.lt.Tensor: (-1, -1),
    aten.lt.Scalar: (-1, -1),
}
EQUALITIES: dict[Any, bool] = {aten.eq.Tensor: True, aten.eq.Scalar: True, aten.ne.Tensor: False, aten.ne.Scalar: False}
CONJUNCTIONS = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)


def truth(x: fx.Node) -> Truth:
    """A boolean node as a conjunction of what is known of it, or FALSE."""
    if x.op == "call_function":
        args = arguments(x)
        if x.target in COMPARISONS:
            form = _comparison(x, args)
            if form is not None:
                return _decided(form)
        if x.target in EQUALITIES:
            form = _difference(x, args)
            equal = None if form is None else _equal(form)
            if equal is not None:
                return All(()) if equal == EQUALITIES[x.target] else FALSE
        if x.target in CONJUNCTIONS and all(isinstance(a, fx.Node) and dtype_of(a) == torch.bool for a in args[:2]):
            return _both(truth(args[0]), truth(args[1]))
        if x.target in (aten.full.default, aten.full_like.default):
            return All(()) if args[1] else FALSE
        if x.target is aten.ones_like.default:
            return All(())
        if x.target is aten.tril.default:
            return _lower(x, args)
        if x.target is aten.expand.default:
            return truth(args[0])
        if x.target is aten._to_copy.default:
            return _cast(x, args[0])
        if x.target in (aten.unsqueeze.default, aten.reshape.default, aten.squeeze.dim):
            inner = truth(args[0])
            if not isinstance(inner, All) or not inner.parts:
                return inner
            return _moved(inner, shape_of(args[0]), shape_of(x)) or All((Opaque(x),))
    return All((Opaque(x),))


def _cast(x: fx.Node, inner: fx.Node) -> Truth:
    form = affine(inner)
    if form is not None and form.coefficients == (0,) * len(form.shape):
        return All(()) if form.constant else FALSE
    return All((Opaque(x),))


def _comparison(x: fx.Node, args: tuple[Any, ...]) -> Affine | None:
    sign, shift = COMPARISONS[x.target]
    form = _difference(x, args)
    if form is None:
        return None
    return Affine(form.shape, tuple(sign * c for c in form.coefficients), sign * form.constant + shift)


def _difference(x: fx.Node, args: tuple[Any, ...]) -> Affine | None:
    """The first operand of a comparison less the second."""
    for a in args[:2]:
        if isinstance(a, float) or (isinstance(a, fx.Node) and dtype_of(a).is_floating_point):
            return None
    return _combined(shape_of(x), args[0], args[1], -1)


def _equal(form: Affine) -> bool | None:
    """Whether the form is 0 everywhere (True) or nowhere (False), as far as its bounds tell."""
    low, high = form.bounds()
    return True if low == high == 0 else False if low > 0 or high < 0 else None


def _decided(form: Affine) -> Truth:
    low, high = form.bounds()
    return All(()) if low >= 0 else FALSE if high < 0 else All((AtLeast(form),))


def _lower(x: fx.Node, args: tuple[Any, ...]) -> Truth:
    """tril of all True: row - column + diagonal >= 0."""
    inner, shape = truth(args[0]), shape_of(x)
    if inner != All(()):
        return All((Opaque(x),))
    coefficients = (*([0] * (len(shape) - 2)), 1 if shape[-2] > 1 else 0, -1 if shape[-1] > 1 else 0)
    return _decided(Affine(shape, coefficients, args[1]))


def _both(a: Truth, c: Truth) -> Truth:
    if isinstance(a, str) or isinstance(c, str):
        return FALSE
    return All(tuple(dict.fromkeys(a.parts + c.parts)))


def _moved(inner: All, before: tuple[int, ...], after: tuple[int, ...]) -> All | None:
    """The parts after a reshape of a mask [before] that adds or drops dims of size 1, or None where it does more."""
    if [s for s in before if s != 1] != [s for s in after if s != 1]:
        return None
    parts: list[AtLeast | Opaque] = []
    for part in inner.parts:
        if isinstance(part, Opaque):
            return None
        form = _broadcast(part.form, before)
        kept = iter(c for c, s in zip(form.coefficients, before, strict=True) if s != 1)
        parts.append(AtLeast(Affine(after, tuple(next(kept) if s != 1 else 0 for s in after), form.constant)))
    return All(tuple(parts))


def is_causal(part: AtLeast | Opaque, queries: int, keys: int) -> bool:
    """Whether the part says exactly: key position <= query position, both from 0, equally many."""
    if not isinstance(part, AtLeast) or queries != keys or len(part.form.shape) < 2:
        return False
    *others, i, j = part.form.coefficients
    return not any(others) and (i, j) == (1, -1) and part.form.constant == 0


@dataclass(frozen=True)
class Mask:
    """A boolean mask in parts: whether it is causal, and what else must hold, as nodes to be and-ed (broadcasting)."""

    causal: bool
    parts: tuple[fx.Node, ...]


def boolean_mask(b: Builder, x: fx.Node, queries: int, keys: int) -> Mask | None:
    """What a boolean attention mask [.., queries, keys] says; None when it is provably False everywhere."""
    found = truth(x)
    if isinstance(found, str):
        return None
    causal = any(is_causal(p, queries, keys) for p in found.parts)
    rest = [p for p in found.parts if not is_causal(p, queries, keys)]
    return Mask(causal, tuple(p.node if isinstance(p, Opaque) else rebuilt(b, p.form) for p in rest))


def rebuilt(b: Builder, form: Affine) -> fx.Node:
    """form >= 0 as a boolean node: one arange per dim that matters."""
    total: Any = None
    for d, c in enumerate(form.coefficients):
        if c:
            shape = [s if k == d else 1 for k, s in enumerate(form.shape)]
            term = b(aten.reshape.default, b(aten.arange.default, form.shape[d], dtype=torch.int64), shape)
            term = term if c == 1 else b(aten.mul.Tensor, term, c)
            total = term if total is None else b(aten.add.Tensor, total, term)
    return b(aten.ge.Scalar, total, -form.constant)


def allowed_by(x: Any) -> fx.Node | None:
    """The boolean `allowed` of a float mask where(allowed, 0, lowest), lowest being -inf or a dtype's lowest number."""
    if not isinstance(x, fx.Node) or x.op != "call_function":
        return None
    if x.target in (aten.expand.default, aten._to_copy.default):
        return allowed_by(x.args[0])
    if x.target is aten.where.self:
        operands: Any = x.args
        condition, yes, no = operands
        if _number(yes) == 0 and _lowest(_number(no), x):
            return condition
    return None


def _number(x: Any) -> float | None:
    if isinstance(x, fx.Node) and x.op == "call_function" and x.target in (aten.full.default, aten.full_like.default):
        return arguments(x)[1]
    return None


def _lowest(number: float | None, x: fx.Node) -> bool:
    return number is not None and (number == -math.inf or number <= torch.finfo(dtype_of(x)).min / 2)
