"""A mixture of experts without sorting: tokens stay in their order, and each is multiplied with the weight of its expert.

Models sort the (token, slot) rows by expert, multiply group by group, and put the rows back. Rows in sorted order are here
a `Sorted` value: rows `x` and the permutation they were taken by. Row-wise ops go through it, a grouped matmul over the
sorted experts' group ends becomes `grouped_linear`, and taking rows by the inverse permutation ends it. Any other use
computes the sorted rows after all, so that the result is right whether or not the whole pattern was found.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ops import experts as _ops  # noqa: F401  (defines grouped_linear)
from . import indexing
from .masks import affine
from .rewrite import Builder, Lazy, Rule, Rules, bind, dtype_of, made_by, shape_of

aten = torch.ops.aten
ours = torch.ops.shardwright
GROUPED_MM = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})


@dataclass(frozen=True, eq=False)
class Sorted(Lazy):
    """rows[permutation]: `rows` [T, ...] (or a tuple of them), `permutation` int64 [T], the indices of a sort."""

    rows: fx.Node
    permutation: fx.Node

    @property
    def value(self) -> Tensor:
        return self.rows.meta["val"]

    def node(self, b: Builder) -> fx.Node:
        return b.emit(aten.index.Tensor, self.rows, [self.permutation])


@dataclass(frozen=True, eq=False)
class GroupSizes(Lazy):
    """How many rows each of `groups` experts has; `original` computes it. `ends`: their running sum instead."""

    original: fx.Node
    experts: fx.Node
    groups: int
    ends: bool = False

    @property
    def value(self) -> Tensor:
        return self.original.meta["val"]

    def node(self, b: Builder) -> fx.Node:
        return self.original


def permutation_of(x: Any) -> fx.Node | None:
    """`x` when it is the indices of a sort of a 1-d tensor: a permutation."""
    if made_by(x, operator.getitem) and x.args[1] == 1 and made_by(x.args[0], aten.sort.default, aten.sort.stable):
        return x if len(shape_of(x)) == 1 else None
    return x if made_by(x, aten.argsort.default, aten.argsort.stable) and len(shape_of(x)) == 1 else None


def inverse_of(x: Any) -> fx.Node | None:
    """The permutation that `x` is the inverse of: arange put, or scattered, to its places, or its argsort."""
    if made_by(x, aten.index_put.default) and len(x.args[1]) == 1 and not (len(x.args) > 3 and x.args[3]):
        return _if_range(permutation_of(x.args[1][0]), x.args[2])
    if made_by(x, aten.scatter.src):
        return _if_range(permutation_of(x.args[2]), x.args[3])
    found = permutation_of(x)
    return None if found is None else permutation_of(_sorted_operand(found))


def _if_range(permutation: fx.Node | None, source: Any) -> fx.Node | None:
    if permutation is None:
        return None
    form = affine(source)
    whole = form is not None and form.shape == shape_of(permutation) and form.constant == 0 and form.coefficients in ((1,), (0,))
    return permutation if whole else None


def index(b: Builder, x: Any, indices: Sequence[Any]) -> Any:
    """x[permutation] and x[permutation // k] are sorted rows; taking sorted rows by the inverse gives them back."""
    if len(indices) != 1 or not isinstance(indices[0], fx.Node | Sorted):
        return NotImplemented
    (i,) = indices
    if isinstance(i, Sorted):
        return NotImplemented if isinstance(x, Lazy) else Sorted(b(aten.index.Tensor, x, [i.rows]), i.permutation)
    if isinstance(x, Lazy):
        return x.rows if isinstance(x, Sorted) and inverse_of(i) is x.permutation else NotImplemented
    permutation = permutation_of(i)
    if permutation is not None and shape_of(x)[0] == shape_of(permutation)[0] and inverse_of(i) is None:
        return Sorted(x, permutation)
    slots = _slots_of(i, shape_of(x)[0])
    return NotImplemented if slots is None else _repeated(b, x, *slots)


def index_add(b: Builder, x: Any, dim: int, i: Any, source: Any, *, alpha: float = 1) -> Any:
    """x with sorted rows added at permutation // k: each token gets the sum of its k rows."""
    slots = _slots_of(i, shape_of(x)[0]) if isinstance(i, fx.Node) else None
    if isinstance(x, Lazy) or not isinstance(source, Sorted) or dim != 0 or slots is None or slots[0] is not source.permutation:
        return NotImplemented
    tokens, *rest = shape_of(x)
    total = b(aten.sum.dim_IntList, b(aten.reshape.default, source.rows, [tokens, slots[1], *rest]), [1])
    return b(aten.add.Tensor, x, total, alpha=alpha)


def _slots_of(i: Any, tokens: int) -> tuple[fx.Node, int] | None:
    """(permutation, k) when `i` is permutation // k over tokens * k rows."""
    if not made_by(i, aten.floor_divide.default, aten.div.Tensor_mode) or not isinstance(i.args[1], int):
        return None
    if i.target is aten.div.Tensor_mode and i.kwargs.get("rounding_mode") != "floor":
        return None
    permutation = permutation_of(i.args[0])
    whole = permutation is not None and shape_of(permutation)[0] == tokens * i.args[1]
    return (permutation, i.args[1]) if permutation is not None and whole else None


def _repeated(b: Builder, x: Any, permutation: fx.Node, k: int) -> Sorted:
    shape = shape_of(x)
    spread = b(aten.expand.default, b(aten.unsqueeze.default, x, 1), [shape[0], k, *shape[1:]])
    return Sorted(b(aten.reshape.default, spread, [shape[0] * k, *shape[1:]]), permutation)


def sort(target: Any) -> Rule:
    """The rule of a sort: of integers, the sorted values are `Sorted`."""

    def rule(b: Builder, x: Any, *args: Any, **kwargs: Any) -> Any:
        if len(shape_of(x)) != 1 or dtype_of(x).is_floating_point:
            return NotImplemented
        permutation = b.emit(operator.getitem, b.emit(target, x, *args, **kwargs), 1)
        return Sorted(x, permutation), permutation

    return rule


def histc(b: Builder, x: Any, bins: int, low: float, high: float) -> Any:
    """Bins [0, bins-1] of integers count each number; order does not matter."""
    counted = x.rows if isinstance(x, Sorted) else x
    original = b.emit(aten.histc.default, counted, bins, low, high)
    if low == 0 and high == bins - 1:
        experts: Any = counted.args[0] if made_by(counted, aten._to_copy.default) else counted
        if dtype_of(experts) in (torch.int64, torch.int32):
            return GroupSizes(original, experts, bins)
    return original


def cumsum(b: Builder, x: Any, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(x, GroupSizes) or x.ends:
        return NotImplemented
    return GroupSizes(b.emit(aten.cumsum.default, x.original, dim, dtype=dtype), x.experts, x.groups, ends=True)


def to_copy(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    if isinstance(x, GroupSizes):
        return GroupSizes(b(aten._to_copy.default, x.original, dtype=dtype), x.experts, x.groups, x.ends)
    return Sorted(b(aten._to_copy.default, x.rows, dtype=dtype), x.permutation)


def grouped_mm(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x [T, K] sorted by expert, weight [E, K, N], ends int32 [E] -> [T, N] sorted."""
    named = {a.name: v for a, v in zip(target._schema.arguments, args, strict=False)} | kwargs
    x, weight, ends = (args[0], args[1], named.get("offs", args[2] if len(args) > 2 else None))
    if not (isinstance(x, Sorted) and isinstance(ends, GroupSizes) and ends.ends) or named.get("bias") is not None:
        return NotImplemented
    ordered = _sorted_operand(x.permutation)
    if ordered is not ends.experts or len(shape_of(weight)) != 3 or shape_of(weight)[0] != ends.groups:
        return NotImplemented
    experts = b(aten._to_copy.default, ends.experts, dtype=torch.int64)
    product = b(ours.grouped_linear.default, x.rows, b(aten.transpose.int, weight, 1, 2), experts)
    out = named.get("out_dtype")
    return Sorted(b(aten._to_copy.default, product, dtype=out) if out else product, x.permutation)


def _sorted_operand(permutation: fx.Node) -> Any:
    """What was sorted, ascending, to give the permutation; None for a descending sort."""
    call = permutation.args[0] if made_by(permutation, operator.getitem) else permutation
    assert isinstance(call, fx.Node)
    args, kwargs = bind(call.target, call.args, call.kwargs)
    names = [a.name for a in call.target._schema.arguments]  # type: ignore[union-attr]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return None if named.get("descending") else named["self"]


ROWWISE_VIEWS = frozenset({aten.split.Tensor, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.softmax.int})


def rowwise(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op on sorted rows that treats each row alone, as the same op on the rows; anything else wants the rows sorted."""
    operands = [a for a in args if isinstance(a, Sorted)]
    if not operands:
        return NotImplemented
    permutation, rank = operands[0].permutation, len(shape_of(operands[0]))
    if not _is_rowwise(target, args, permutation, rank):
        return NotImplemented
    result = b(target, *(a.rows if isinstance(a, Sorted) else a for a in args), **kwargs)
    if isinstance(result, tuple):
        return tuple(Sorted(r, permutation) for r in result)
    if isinstance(result.meta["val"], tuple):
        return tuple(Sorted(b.emit(operator.getitem, result, k), permutation) for k in range(len(result.meta["val"])))
    return Sorted(result, permutation)


def _is_rowwise(target: Any, args: tuple[Any, ...], permutation: fx.Node, rank: int) -> bool:
    tensors = [a for a in args if isinstance(a, fx.Node | Lazy)]
    same = all(t.permutation is permutation for t in tensors if isinstance(t, Sorted))
    if target is aten.linear.default:
        return isinstance(args[0], Sorted) and len(tensors) == 2 and rank == 2
    if target in ROWWISE_VIEWS:
        position = {"split": 2, "slice": 1, "unsqueeze": 1, "squeeze": 1, "softmax": 1}[target._schema.name.split("::")[1]]
        return len(tensors) == 1 and args[position] > 0
    if torch.Tag.pointwise not in getattr(target, "tags", ()) and target is not ours.dropout.default:
        return False
    ranks = [len(shape_of(t)) for t in tensors]
    others = [t for t in tensors if not isinstance(t, Sorted)]
    along = all(len(shape_of(t)) < max(ranks) or shape_of(t)[0] == 1 for t in others)
    return same and along and all(len(shape_of(t)) == max(ranks) for t in tensors if isinstance(t, Sorted))


def on_sorted(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rule of calls that have a lazy value among their arguments."""
    special = SPECIAL.get(target)
    if special is not None:
        return special(b, *args, **kwargs)
    if target in TRANSLATED:
        return b.rules[target](b, *args, **kwargs)
    if getattr(getattr(target, "_schema", None), "name", "") in GROUPED_MM:
        return grouped_mm(b, target, args, kwargs)
    return rowwise(b, target, args, kwargs)


TRANSLATED = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.type_as.default,
        aten.chunk.default,
        aten.square.default,
        aten.mul.Scalar,
        aten.dropout.default,
    }
)
"""Ops whose ordinary rules only call other ops by `b(...)`, and so work on sorted rows as they are."""

SPECIAL: Rules = {
    aten.index.Tensor: index,
    aten.index_add.default: index_add,
    aten.histc.default: histc,
    aten.cumsum.default: cumsum,
    aten._to_copy.default: to_copy,
}


def index_rule(b: Builder, x: Any, indices: Sequence[Any]) -> Any:
    found = index(b, x, indices)
    return indexing.index(b, x, indices) if found is NotImplemented else found


RULES: dict[Any, Any] = {
    Lazy: on_sorted,
    aten.index.Tensor: index_rule,
    aten.sort.default: sort(aten.sort.default),
    aten.sort.stable: sort(aten.sort.stable),
}
