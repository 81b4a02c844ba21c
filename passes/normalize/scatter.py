"""Rows scattered by a mask (the patches of an image among the tokens of a text) as a lookup: each row takes the source's row of its
number among the masked ones. So rows and their width may be sharded, and the source is gathered at most.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .rewrite import Builder, Rules, arguments, dtype_of, made_by, shape_of

aten = torch.ops.aten


def masked_scatter(b: Builder, x: Any, mask: Any, source: Any) -> Any:
    """x with the elements of source, in order, where the mask is set; the mask says the same for all of a row, which is made of the
    last dims.

    A mask that sets more rows than the source has is out of the lookup's range, as it is refused by the op itself.
    """
    shape, width = shape_of(x), 1
    base = arguments(mask)[0] if made_by(mask, aten.expand.default) else mask
    own = shape_of(base)
    lead = len(shape)
    while lead and (lead - len(shape) + len(own) < 1 or own[lead - len(shape) - 1] == 1):
        lead -= 1
        width *= shape[lead]
    length = math.prod(shape_of(source))
    plain = dtype_of(mask) == torch.bool and dtype_of(source) == dtype_of(x) and 0 not in shape
    if width == 1 or length < width or not plain or torch.broadcast_shapes(shape, shape_of(mask)) != shape:
        return NotImplemented
    kept = b(aten.expand.default, base, [*shape[:lead], *[1] * (len(shape) - lead)])
    count = b(aten.cumsum.default, b(aten._to_copy.default, b(aten.reshape.default, kept, [-1]), dtype=torch.int64), 0)
    number = b(aten.clamp.default, b(aten.sub.Tensor, count, 1), 0)
    flat = b(aten.reshape.default, source, [-1])
    if length % width:
        flat = b(aten.slice.Tensor, flat, 0, 0, length - length % width, 1)
    taken = b(aten.index_select.default, b(aten.reshape.default, flat, [-1, width]), 0, number)
    return b(aten.where.self, kept, b(aten.reshape.default, taken, list(shape)), x)


RULES: Rules = {aten.masked_scatter.default: masked_scatter}
