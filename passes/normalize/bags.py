"""Bags of embeddings as lookups that are summed, so that samples, rows and width may all be cut.

embedding_bag(weight, ids, offsets)    -> embedding(weight, ids), summed where bags are equally long, as those of 2-d ids are;
                                          otherwise each row is added to its bag, which is found among the offsets
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from .masks import affine
from .rewrite import Builder, Rules, dtype_of, shape_of

aten = torch.ops.aten
SUM, MEAN, MAX = range(3)
PUBLIC = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)
INNER = (aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
"""What the public ones are made of, to which a padding of -1 is none."""


def embedding_bag(
    b: Builder,
    weight: Any,
    ids: Any,
    offsets: Any,
    by_frequency: bool,
    mode: int,
    sparse: bool,
    weights: Any,
    include_last: bool,
    padding: int | None = None,
) -> Any:
    """(sums, means or largest of each bag, and three results that only the op's own backward reads)."""
    if padding is not None and padding < 0:
        padding += shape_of(weight)[0]
    bags = shape_of(offsets)[0] - include_last
    length = _length(offsets, bags, shape_of(ids)[0])
    if by_frequency or sparse or (length is None and mode == MAX) or not bags or not shape_of(ids)[0] or _others_read(b):
        held = -1 if padding is None else padding
        return b.emit(aten._embedding_bag.default, weight, ids, offsets, by_frequency, mode, sparse, weights, include_last, held)
    ids = ids if length is None else b(aten.reshape.default, ids, [bags, length])
    rows = b(aten.embedding.default, weight, ids)
    rows = b(aten._to_copy.default, rows, dtype=torch.float32) if dtype_of(rows).itemsize < 4 else rows
    kept = None if padding is None else b(aten.ne.Scalar, ids, padding)
    if weights is not None:
        rows = b(aten.mul.Tensor, rows, b(aten.unsqueeze.default, b(aten.reshape.default, weights, list(shape_of(ids))), -1))
    if kept is not None:
        nothing = b.scalar(-torch.inf if mode == MAX else 0.0, dtype_of(rows))
        rows = b(aten.where.self, b(aten.unsqueeze.default, kept, -1), rows, nothing)
    counted = kept if kept is not None else b(aten.full.default, list(shape_of(ids)), 1, dtype=torch.int64)
    if length is None:
        start = b(aten.slice.Tensor, offsets, 0, 0, bags)
        place = b(aten.arange.default, shape_of(ids)[0], dtype=dtype_of(offsets))
        bag = b(aten.sub.Tensor, b(aten.searchsorted.Tensor, start, place, right=True), 1)
        result = _added(b, bags, bag, rows)
        count = _added(b, bags, bag, b(aten._to_copy.default, counted, dtype=torch.int64))
    else:
        result = b(operator.getitem, b(aten.max.dim, rows, 1), 0) if mode == MAX else b(aten.sum.dim_IntList, rows, [1])
        count = b(aten.sum.dim_IntList, counted, [1])
    if mode == MEAN:
        result = b(aten.div.Tensor, result, b(aten.unsqueeze.default, b(aten.clamp.default, count, 1), -1))
    if mode == MAX and kept is not None:
        found = b(aten.unsqueeze.default, b(aten.gt.Scalar, count, 0), -1)
        result = b(aten.where.self, found, result, b.scalar(0.0, dtype_of(result)))
    return b(aten._to_copy.default, result, dtype=dtype_of(weight)), None, None, None


def inner(b: Builder, weight: Any, ids: Any, offsets: Any, *args: Any) -> Any:
    by_frequency, mode, sparse, weights, include_last, padding = args
    held = None if padding < 0 else padding
    return embedding_bag(b, weight, ids, offsets, by_frequency, mode, sparse, weights, include_last, held)


def _added(b: Builder, bags: int, bag: Any, rows: Any) -> Any:
    empty = b(aten.full.default, [bags, *shape_of(rows)[1:]], 0, dtype=dtype_of(rows))
    return b(aten.index_add.default, empty, 0, bag, rows)


def _length(offsets: Any, bags: int, count: int) -> int | None:
    """How long each bag is, where the offsets prove all to be equally long."""
    form = affine(offsets)
    if form is None or not bags or count % bags or form.constant != 0:
        return None
    length = count // bags
    return length if form.coefficients == (length if len(shape_of(offsets)) and shape_of(offsets)[0] > 1 else 0,) else None


def _others_read(b: Builder) -> bool:
    """Whether the graph reads more than the first result."""
    origin = b.origin
    if origin is None or origin.target not in (*PUBLIC, *INNER):
        return False
    return any(user.args[1:] != (0,) and user.users for user in origin.users)


RULES: Rules = {**dict.fromkeys(PUBLIC, embedding_bag), **dict.fromkeys(INNER, inner)}
