"""Losses as sums over elements and a division by their number, so that batch, tokens and vocabulary may be sharded.

With class indices as target, x the logits with classes last, and `keep = target != ignore_index`:

    nll  = logsumexp(x) - pick(x, where(keep, target, 0))
    loss = sum(where(keep, nll, 0)) / sum(keep)                 weights w: w[target] * nll, over sum(w[target])

Of log-probabilities that a model computes itself, what is picked is that of the logits less their logsumexp.

A target outside [0, classes) that is not ignore_index raises in eager mode; here it makes the loss NaN.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from ...compiler.torch_compat import chunked_cross_entropy
from ..ops import losses as _ops  # noqa: F401  (defines logsumexp and pick)
from .rewrite import Builder, arguments, dtype_of, made_by, shape_of

aten = torch.ops.aten
ours = torch.ops.shardwright
NONE, MEAN, SUM = 0, 1, 2
CHUNKED = chunked_cross_entropy()


def reduced(b: Builder, loss: Any, reduction: int) -> Any:
    if reduction == NONE:
        return loss
    total = b(aten.sum.dim_IntList, loss, None)
    return b(aten.div.Tensor, total, math.prod(shape_of(loss))) if reduction == MEAN else total


def classes_last(b: Builder, x: Any) -> Any:
    rank = len(shape_of(x))
    return x if rank <= 2 else b(aten.permute.default, x, [0, *range(2, rank), 1])


def unmerged(b: Builder, x: Any, target: Any) -> tuple[Any, Any]:
    """Logits [n, c] and target [n] that are reshapes of [.., c] and [..]: the latter, so that the batch stays a dim."""
    if made_by(x, aten.reshape.default) and len(shape_of(x)) == 2:
        inner = x.args[0]
        shape = shape_of(inner)
        if len(shape) > 2 and shape[-1] == shape_of(x)[-1]:
            return inner, b(aten.reshape.default, target, list(shape[:-1]))
    return x, target


def cross_entropy(b: Builder, x: Any, target: Any, weight: Any, reduction: int, ignore: int, smoothing: float) -> Any:
    if dtype_of(target).is_floating_point:
        return _soft_cross_entropy(b, classes_last(b, x), classes_last(b, target), weight, reduction, smoothing)
    x = classes_last(b, x)
    if reduction != NONE:
        x, target = unmerged(b, x, target)
    lse = b(ours.logsumexp.default, x)

    def smooth() -> Any:
        if weight is None:
            rest = b(aten.sum.dim_IntList, x, [len(shape_of(x)) - 1])
            return b(aten.sub.Tensor, b(aten.mul.Tensor, lse, shape_of(x)[-1]), rest)
        rest = b(aten.sum.dim_IntList, b(aten.mul.Tensor, x, weight), [len(shape_of(x)) - 1])
        return b(aten.sub.Tensor, b(aten.mul.Tensor, lse, b(aten.sum.dim_IntList, weight, [0])), rest)

    loss = _indexed(b, x, target, weight, reduction, ignore, lse, smoothing, smooth)
    return b(aten._to_copy.default, loss, dtype=dtype_of(x))


def picked(b: Builder, x: Any, index: Any) -> Any:
    """x[..., index], for an index within x's last dim."""
    last = len(shape_of(x)) - 1
    if made_by(x, aten.reshape.default) and shape_of(x.args[0])[-1:] == shape_of(x)[-1:]:
        rows = list(shape_of(x.args[0])[:-1])
        return b(aten.reshape.default, picked(b, x.args[0], b(aten.reshape.default, index, rows)), list(shape_of(index)))
    if not made_by(x, aten.log_softmax.int) or arguments(x)[1] != last:
        return b(ours.pick.default, x, index)
    logits = b(aten._to_copy.default, x.args[0], dtype=dtype_of(x))
    lse = b(ours.logsumexp.default, logits)
    return b(aten._to_copy.default, b(aten.sub.Tensor, b(ours.pick.default, logits, index), lse), dtype=dtype_of(x))


def _checked(b: Builder, found: Any, index: Any, size: int) -> Any:
    """NaN where the index is none of a dim of `size`."""
    wrong = b(aten.bitwise_or.Tensor, b(aten.lt.Scalar, index, 0), b(aten.ge.Scalar, index, size))
    return b(aten.where.self, wrong, b.scalar(math.nan, dtype_of(found)), found)


def gather(b: Builder, x: Any, dim: int, index: Any, **_: Any) -> Any:
    """One element of each row of the last dim; NaN for an index outside of it, which raises in eager mode."""
    shape = shape_of(x)
    if dim != len(shape) - 1 or shape_of(index) != (*shape[:-1], 1) or not dtype_of(x).is_floating_point:
        return NotImplemented
    position = b(aten._to_copy.default, b(aten.reshape.default, index, list(shape[:-1])), dtype=torch.int64)
    return b(aten.reshape.default, _checked(b, picked(b, x, position), position, shape[-1]), [*shape[:-1], 1])


def logsumexp(b: Builder, x: Any, dims: Sequence[int], keepdim: bool = False) -> Any:
    """Over the last dim."""
    shape = shape_of(x)
    if not shape or [d % len(shape) for d in dims] != [len(shape) - 1] or not dtype_of(x).is_floating_point:
        return NotImplemented
    found = b(aten._to_copy.default, b(ours.logsumexp.default, x), dtype=dtype_of(x))
    return b(aten.reshape.default, found, [*shape[:-1], 1]) if keepdim else found


def nll(b: Builder, x: Any, target: Any, weight: Any, reduction: int, ignore: int) -> Any:
    """nll_loss: `x` holds log-probabilities, [n, c, ...]."""
    x = classes_last(b, x)
    if reduction != NONE:
        x, target = unmerged(b, x, target)
    return b(aten._to_copy.default, _indexed(b, x, target, weight, reduction, ignore, None, 0.0, None), dtype=dtype_of(x))


def _indexed(
    b: Builder, x: Any, target: Any, weight: Any, reduction: int, ignore: int, lse: Any, smoothing: float, smooth: Any
) -> Any:
    classes = shape_of(x)[-1]
    keep = b(aten.ne.Scalar, target, ignore)
    index = b(aten.where.self, keep, target, b.scalar(0, dtype_of(target)))
    found = picked(b, x, index) if lse is None else b(ours.pick.default, x, index)
    terms = b(aten.neg.default, found) if lse is None else b(aten.sub.Tensor, lse, found)
    dtype = dtype_of(terms)
    terms = _checked(b, terms, index, classes)
    counted = None
    if weight is not None:
        flat = b(aten.reshape.default, index, [-1])
        counted = b(aten.reshape.default, b(aten.index_select.default, weight, 0, flat), list(shape_of(index)))
        counted = b(aten.where.self, keep, counted, b.scalar(0, dtype_of(counted)))
        terms = b(aten.mul.Tensor, terms, counted)
    if smoothing:
        hard = b(aten.mul.Tensor, terms, 1 - smoothing)
        terms = b(aten.add.Tensor, hard, b(aten.mul.Tensor, smooth(), smoothing / classes))
    terms = b(aten.where.self, keep, terms, b.scalar(0, dtype))
    if reduction == NONE:
        return terms
    total = b(aten.sum.dim_IntList, terms, None)
    if reduction == SUM:
        return total
    count = b(aten.sum.dim_IntList, keep if counted is None else counted, None)
    return b(aten.div.Tensor, total, b(aten._to_copy.default, count, dtype=dtype))


def _soft_cross_entropy(b: Builder, x: Any, target: Any, weight: Any, reduction: int, smoothing: float) -> Any:
    """Targets are probabilities of the classes. The mean is over the batch and the other dims, not over classes."""
    last = len(shape_of(x)) - 1
    classes = shape_of(x)[-1]
    if smoothing:
        target = b(aten.add.Tensor, b(aten.mul.Tensor, target, 1 - smoothing), smoothing / classes)
    scores = b(aten.mul.Tensor, b(aten.log_softmax.int, x, last), target)
    if weight is not None:
        scores = b(aten.mul.Tensor, scores, weight)
    return reduced(b, b(aten.neg.default, b(aten.sum.dim_IntList, scores, [last])), reduction)


def nll_forward(b: Builder, x: Any, target: Any, weight: Any, reduction: int, ignore: int) -> Any:
    """nll_loss_forward gives (loss, total weight); the second is only for its backward."""
    batched = x if len(shape_of(x)) > 1 or not shape_of(target) else b(aten.unsqueeze.default, x, 0)
    return nll(b, batched, target, weight, reduction, ignore), b.scalar(0, dtype_of(x))


def chunked(b: Builder, x: Any, weight: Any, target: Any, bias: Any, classes: Any, reduction: str, ignore: int, *rest: Any) -> Any:
    """linear_cross_entropy in chunks: a mean is the sum over the number, or the weights, of the rows that count. Of the results the
    first alone is read: the others are gradients, which the op's own backward takes."""
    if reduction != "mean":
        return NotImplemented
    total = b.emit(CHUNKED[0], x, weight, target, bias, classes, "sum", ignore, *rest)
    loss = b(operator.getitem, total, 0)
    keep = b(aten.ne.Scalar, target, ignore)
    if classes is not None:
        index = b(aten.where.self, keep, target, b.scalar(0, dtype_of(target)))
        keep = b(aten.where.self, keep, b(aten.index_select.default, classes, 0, index), b.scalar(0, dtype_of(classes)))
    count = b(aten._to_copy.default, b(aten.sum.dim_IntList, keep, None), dtype=dtype_of(loss))
    return b(aten.div.Tensor, loss, count), None, None, None


def mse(b: Builder, x: Any, y: Any, reduction: int) -> Any:
    difference = b(aten.sub.Tensor, x, y)
    return reduced(b, b(aten.mul.Tensor, difference, difference), reduction)


def l1(b: Builder, x: Any, y: Any, reduction: int) -> Any:
    return reduced(b, b(aten.abs.default, b(aten.sub.Tensor, x, y)), reduction)


def elementwise(target: Any, position: int) -> Any:
    """A loss whose op reduces at argument `position`: unreduced, then summed and divided."""

    def rule(b: Builder, *args: Any, **kwargs: Any) -> Any:
        if args[position] == NONE:
            return NotImplemented
        unreduced = (*args[:position], NONE, *args[position + 1 :])
        return reduced(b, b(target, *unreduced, **kwargs), args[position])

    return rule


RULES: dict[Any, Any] = {
    **dict.fromkeys(CHUNKED[:1], chunked),
    aten.gather.default: gather,
    aten.logsumexp.default: logsumexp,
    aten.cross_entropy_loss.default: cross_entropy,
    aten.nll_loss.default: nll,
    aten.nll_loss_nd.default: nll,
    aten.nll_loss2d.default: nll,
    aten.nll_loss_forward.default: nll_forward,
    aten.nll_loss2d_forward.default: nll_forward,
    aten.mse_loss.default: mse,
    aten.l1_loss.default: l1,
    aten.smooth_l1_loss.default: elementwise(aten.smooth_l1_loss.default, 2),
    aten.huber_loss.default: elementwise(aten.huber_loss.default, 2),
    aten.soft_margin_loss.default: elementwise(aten.soft_margin_loss.default, 2),
    aten.binary_cross_entropy.default: elementwise(aten.binary_cross_entropy.default, 3),
    aten.binary_cross_entropy_with_logits.default: elementwise(aten.binary_cross_entropy_with_logits.default, 4),
    aten.kl_div.default: elementwise(aten.kl_div.default, 2),
}
