"""Sample calls of every op that has a sharding rule: float64, odd sizes, dims longer than the axes they are tried on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from shardwright.compiler.check_rule import Choice, Sample, run_whole
from shardwright.compiler.torch_compat import chunked_cross_entropy
from shardwright.passes import rules  # noqa: F401  (registers the rules)
from shardwright.passes.rules import factories as factory_rules
from shardwright.passes.rules.base import Axis, OpCall, Strategy, strategies
from shardwright.passes.types import Varying

aten = torch.ops.aten
ours = torch.ops.shardwright


class _Source:
    """Random tensors, the same at every import."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def real(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def unit(self, *shape: int) -> Tensor:
        return 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64, generator=self.generator)

    def ints(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def bools(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.6


def samples() -> list[Sample]:
    return [Sample(*row) if isinstance(row, tuple) else row for table in TABLES for row in table(_Source())]


def pairs(call: OpCall) -> Iterator[tuple[str, list[tuple[Axis, Choice]]]]:
    """Each factor of a call over an axis of two, and the first that is left over another: (the first's label, both)."""
    first, second = Axis("x", 2), Axis("y", 2)

    def left(call: OpCall) -> Strategy:
        offered = strategies(call, second)
        return next((s for s in offered if is_sharded(s)), offered[0])

    for label in dict.fromkeys(s.label for s in strategies(call, first) if is_sharded(s)):

        def taken(call: OpCall, label: str = label) -> Strategy:
            return next(s for s in strategies(call, first) if s.label == label)

        yield label, [(first, taken), (second, left)]


def is_sharded(strategy: Strategy) -> bool:
    """Whether some value is cut."""
    return any(isinstance(t, Varying) for t in (*strategy.ins, *strategy.outs))


def products(s: _Source) -> Iterator[Any]:
    yield aten.mm.default, (s.real(5, 7), s.real(7, 6))
    yield aten.bmm.default, (s.real(4, 3, 5), s.real(4, 5, 7))
    yield aten.mv.default, (s.real(5, 7), s.real(7))
    yield aten.dot.default, (s.real(7), s.real(7))
    yield aten.outer.default, (s.real(5), s.real(4))
    yield aten.linear.default, (s.real(3, 5, 7), s.real(9, 7))
    yield aten.linear.default, (s.real(7), s.real(9, 7))
    yield aten.matmul.default, (s.real(3, 5, 7), s.real(7, 4))
    yield aten.matmul.default, (s.real(4, 1, 5, 7), s.real(3, 7, 4))
    yield Sample(aten.matmul.default, (s.real(3, 5, 7), s.real(7)), sharded=False)
    yield aten._trilinear.default, (s.real(5, 4), s.real(6, 4, 3), s.real(5, 3), [1, 3], [0], [1, 2], [2, 3])
    yield aten._trilinear.default, (s.real(5, 4), s.real(6, 4, 3), s.real(5, 3), [1, 3], [0], [1, 2], [3])
    yield ours.grouped_linear.default, (s.real(11, 5), s.real(3, 6, 5), s.ints(3, 11))


def attention(s: _Source) -> Iterator[Any]:
    q, k, v = s.real(3, 4, 5, 6), s.real(3, 4, 7, 6), s.real(3, 4, 7, 6)
    op = ours.attention.default
    yield op, (q, k, v, None, False, 0.4)
    yield op, (q, s.real(3, 4, 5, 6), s.real(3, 4, 5, 6), None, True, 0.4)
    yield op, (q, k, v, s.bools(3, 1, 5, 7).index_fill_(3, torch.tensor([0]), True), False, 0.4)
    yield op, (q, k, v, s.real(4, 5, 7).detach(), False, 0.4)
    yield op, (q, k, v, s.real(3, 1, 1, 7), False, 0.4)
    yield op, (q, s.real(3, 2, 7, 6), s.real(3, 2, 7, 6), None, False, 0.4)
    op, no_cuts = ours.chunked_attention.default, ([], [], [], [], [])
    whole, plain = (None, None, None, False, 0.4, 0.0, 0, *no_cuts), (False, 0.4, 0.0, 0, *no_cuts)
    yield op, (q, k, v, *whole)
    yield op, (q, k, v, s.real(1, 4, 5, 7), None, None, *plain)
    yield op, (q, k, v, s.real(3, 1, 1, 7), s.bools(5, 7).index_fill_(1, torch.tensor([0]), True), None, *plain)
    yield op, (q, k, v, None, s.real(4, 5, 7).detach(), torch.tensor(11), False, 0.4, 0.3, 6, *no_cuts)
    yield op, (q, k, v, s.real(4, 5, 7), None, torch.tensor(11), True, 0.4, 0.3, 7, *no_cuts)


def views(s: _Source) -> Iterator[Any]:
    for op in (aten.reshape.default, aten.view.default):
        yield op, (s.real(3, 4, 12), [3, 4, 3, 4])
        yield op, (s.real(3, 4, 3, 4), [12, 12])
        yield op, (s.real(12), [3, 4])
        yield op, (s.real(2, 3, 4), [6, 1, 4])
    yield aten.reshape.default, (s.real(12, 5), [-1, 4, 5])
    yield aten.expand.default, (s.real(3, 1, 4), [3, 5, 4])
    yield aten.expand.default, (s.real(1, 4), [3, 5, 4])
    yield aten.expand.default, (s.real(3, 1, 4), [-1, 5, -1])
    yield aten.permute.default, (s.real(3, 4, 5), [2, 0, 1])
    yield aten.permute.default, (s.real(3, 4, 5), [-1, 1, 0])
    yield aten.transpose.int, (s.real(3, 4, 5), 0, -1)
    yield aten.t.default, (s.real(3, 4),)
    yield Sample(aten.t.default, (s.real(4),))
    yield aten.unsqueeze.default, (s.real(3, 4), 1)
    yield aten.unsqueeze.default, (s.real(3, 4), -1)
    yield aten.squeeze.default, (s.real(3, 1, 4, 1),)
    yield aten.squeeze.dim, (s.real(3, 1, 4, 1), 1)
    yield aten.squeeze.dim, (s.real(3, 1, 4, 1), 2)
    yield aten.squeeze.dims, (s.real(3, 1, 4, 1), [1, -1])
    yield aten.slice.Tensor, (s.real(3, 12), 1, 4, 8)
    yield aten.slice.Tensor, (s.real(3, 12), 1, 6, 9223372036854775807)
    yield aten.slice.Tensor, (s.real(12, 3), 0, -6, 9)
    yield aten.slice.Tensor, (s.real(3, 12), 1, 1, 9, 2)
    yield aten.slice.Tensor, (s.real(3, 12), -1)
    yield aten.select.int, (s.real(3, 4, 5), 1, -1)
    yield aten.unbind.int, (s.real(3, 4, 5), 1)
    yield aten.cat.default, ([s.real(3, 4), s.real(3, 5)], 1)
    yield aten.cat.default, ([s.real(3, 4), s.real(2, 4), s.real(1, 4)],)
    yield aten.cat.default, ([s.real(2, 7), s.real(2, 7), s.real(2, 7)], 1)
    yield aten.cat.default, ([s.real(5, 2), s.real(3, 2)],)
    yield aten.stack.default, ([s.real(3, 4), s.real(3, 4)], -1)
    yield aten.split.Tensor, (s.real(3, 12), 4, 1)
    yield aten.split.Tensor, (s.real(11, 4), 4)
    yield aten.split_with_sizes.default, (s.real(3, 12), [6, 3, 3], -1)
    yield aten.split_with_sizes.default, (s.real(9, 4), [6, 2, 1])
    yield aten.constant_pad_nd.default, (s.real(3, 4, 5), [1, 2])
    yield aten.constant_pad_nd.default, (s.real(3, 4, 5), [0, 0, 1, -1], 2.5)
    yield aten.pad.default, (s.real(3, 4, 5), [2, 1], "reflect")
    yield aten.pad.default, (s.real(3, 4, 5), [2, 1], "constant", 1.5)
    yield aten.flip.default, (s.real(3, 4, 5), [1])
    yield aten.roll.default, (s.real(3, 4, 5), [1, 2], [0, -1])
    yield Sample(aten.roll.default, (s.real(3, 4, 5), [2]), sharded=False)
    yield aten.unfold.default, (s.real(3, 7, 5), 1, 3, 2)
    yield aten.unfold.default, (s.real(3, 7, 5), -2, 4, 1)
    yield aten.unfold_backward.default, (s.real(3, 3, 5, 3), [3, 7, 5], 1, 3, 2)
    yield aten.diagonal.default, (s.real(3, 4, 5),)
    yield aten.diagonal.default, (s.real(3, 4, 5, 4), 1, 3, -3)
    yield aten.tril.default, (s.real(3, 4, 5),)
    yield aten.triu.default, (s.real(3, 4, 5), 1)


def reductions(s: _Source) -> Iterator[Any]:
    x = s.real(3, 4, 5)
    yield aten.sum.default, (x,)
    yield aten.sum.default, (s.bools(3, 4),)
    yield aten.sum.dim_IntList, (x, [1])
    yield aten.sum.dim_IntList, (x, [0, -1], True)
    yield aten.sum.dim_IntList, (x, None)
    yield aten.sum.dim_IntList, (x, [])
    for op in (aten.amax.default, aten.amin.default):
        yield op, (x, [1])
        yield op, (x, [-1], True)
        yield op, (x,)
    yield aten.max.default, (x,)
    yield aten.min.default, (x,)
    for op in (aten._softmax.default, aten._log_softmax.default):
        yield op, (x, -1, False)
    for op in (aten.softmax.int, aten.log_softmax.int):
        yield op, (x, 1)
    yield aten.softmax.int, (x.float(), -1, torch.float64)
    for op in (aten.softmax.int, aten.log_softmax.int):
        yield op, (s.real(3, 129), 1)
        yield op, (s.real(2, 130, 3).float(), -2, torch.float64)
    yield aten.cumsum.default, (x, 1)
    yield aten.cumsum.default, (s.bools(3, 4), -1)
    yield aten.cumprod.default, (x, 0)
    yield aten.sort.default, (x,)
    yield aten.sort.default, (x, 0, True)
    yield aten.topk.default, (x, 2)
    yield aten.topk.default, (x, 2, 1)
    yield aten.argsort.default, (x, 1)
    yield aten.argmax.default, (x, 1)
    yield aten.argmin.default, (x, -1, True)
    yield Sample(aten.argmax.default, (x,), sharded=False)
    yield aten.logsumexp.default, (x, [-1])
    yield aten.logsumexp.default, (x, [0, 2], True)
    yield aten.linalg_vector_norm.default, (x, 2, [1])
    yield aten.linalg_vector_norm.default, (x, 3, [-1], True)
    yield Sample(aten.linalg_vector_norm.default, (x,), sharded=False)
    yield aten.prod.dim_int, (x, 1)
    yield aten.any.dim, (s.bools(3, 4, 5), 1)
    yield aten.all.dim, (s.bools(3, 4, 5), -1, True)
    yield aten.max.dim, (x, 1)
    yield aten.min.dim, (x, -1, True)
    yield aten.norm.ScalarOpt_dim, (x, 2, [1])
    yield aten.norm.ScalarOpt_dim, (x, 3, [0, 2], True)
    yield aten.vdot.default, (s.real(7), s.real(7))
    yield ours.logsumexp.default, (x,)
    yield ours.logsumexp.default, (s.real(3, 7).float(),)
    yield ours.pick.default, (x, s.ints(5, 3, 4))
    yield ours.pick.default, (s.real(6, 7), s.ints(7, 6, low=-2))
    linear, rest = (s.real(7, 4), s.real(9, 4), s.ints(9, 7)), (2, "balanced", torch.float64)
    for op in chunked_cross_entropy()[:1]:
        yield Sample(op, (*linear, None, None, "sum", 3, 0.0, *rest, True, True, True, False), differentiable=2)
        yield Sample(op, (*linear, None, s.unit(9), "sum", 3, 0.0, *rest, True, False, True, False), differentiable=0)
    for op in chunked_cross_entropy()[1:]:
        yield Sample(op, (*linear, None, s.unit(9), 3, *rest), differentiable=2)


def lookups(s: _Source) -> Iterator[Any]:
    yield aten.embedding.default, (s.real(11, 5), s.ints(11, 3, 4))
    yield aten.embedding.default, (s.real(11, 5), s.ints(11, 7), 3)
    yield Sample(aten.embedding.default, (s.real(11, 5), s.ints(11, 7), -1, True), sharded=False)
    yield aten.gather.default, (s.real(3, 7), 1, s.ints(7, 3, 5))
    yield aten.gather.default, (s.real(7, 4, 3), -3, s.ints(7, 5, 2, 3))
    yield aten.gather.default, (s.ints(9, 3, 7), 1, s.ints(7, 3, 5))
    yield aten.gather.default, (s.bools(3, 7), 1, s.ints(7, 3, 5))
    yield aten.index_select.default, (s.real(3, 7), -1, s.ints(7, 5))
    places = torch.stack([torch.randperm(7, generator=s.generator)[:5] for _ in range(4)])
    yield aten.scatter.src, (s.real(4, 7), 1, places, s.real(4, 5))
    yield aten.scatter.value, (s.real(4, 7), -1, places, 2.5)
    yield aten.scatter_add.default, (s.real(4, 7), 1, s.ints(7, 4, 5), s.real(4, 5))
    x, i = s.real(5, 6, 7), s.ints(5, 3, 4)
    yield aten.index.Tensor, (x, [i])
    yield aten.index.Tensor, (x, [None, i])
    yield aten.index.Tensor, (x, [i, s.ints(6, 4)])
    yield aten.index.Tensor, (x, [i, None, s.ints(7, 3, 1)])
    yield Sample(aten.index.Tensor, (x, [s.bools(5)]), sharded=False)
    yield aten._unsafe_index.Tensor, (x, [None, i])
    y = s.real(6, 4, 5)
    put = aten.index_put.default
    rows = torch.tensor([5, 0, 3])
    yield put, (y, [rows], s.real(3, 4, 5))
    yield put, (y, [rows], s.real(4, 5))
    yield put, (y, [None, torch.tensor([2, 0])], s.real(2, 1))
    yield put, (y, [rows, None, torch.tensor([4, 1, 1])], s.real(3, 4))
    yield Sample(put, (y, [s.bools(6)], s.real(1)), sharded=False)
    yield put, (y, [s.ints(6, 7)], s.real(7, 4, 5), True)
    yield put, (y, [None, s.ints(4, 7)], s.real(7, 5), True)
    yield put, (y, [s.ints(6, 7, 1), None, s.ints(5, 3)], s.real(7, 3, 4), True)
    yield put, (y, [s.ints(6, 4, 7)], s.real(7, 1, 5), True)
    yield aten.index_add.default, (y, 0, s.ints(6, 7), s.real(7, 4, 5)), {"alpha": 2}
    yield aten.index_add.default, (y, -2, s.ints(4, 7), s.real(6, 7, 5))
    yield aten.index_add.default, (s.ints(9, 6), 0, s.ints(6, 7), s.ints(9, 7))
    yield aten.index_copy.default, (y, 0, rows, s.real(3, 4, 5))
    yield aten.index_fill.int_Scalar, (y, 1, torch.tensor([2, 0]), 1.5)
    yield aten.index_fill.int_Tensor, (y, -1, torch.tensor([2, 0]), torch.tensor(0.5, dtype=torch.float64))
    yield aten.index_reduce.default, (y, 0, s.ints(6, 7), s.unit(7, 4, 5), "prod")
    yield aten.index_reduce.default, (y, 1, s.ints(4, 7), s.real(6, 7, 5), "amax")
    yield aten.scatter_reduce.two, (y, 1, s.ints(4, 6, 7, 5), s.real(6, 7, 5), "amax")
    yield aten.scatter_reduce.two, (y, 0, s.ints(6, 7, 4, 5), s.unit(7, 4, 5), "mean"), {"include_self": False}
    yield aten.scatter_add.default, (s.real(6), 0, s.ints(6, 7), s.real(7))
    yield aten.scatter_add.default, (y, 0, s.ints(6, 7, 4, 5), s.real(7, 4, 5))
    yield aten.scatter_add.default, (y, 1, s.ints(4, 6, 7, 3), s.real(6, 7, 3))
    yield Sample(aten.scatter.reduce, (s.real(4, 7), 1, places, s.real(4, 5)), {"reduce": "add"}, differentiable=0)
    yield Sample(aten.scatter.value_reduce, (s.real(4, 7), 1, places, 2.0), {"reduce": "multiply"}, differentiable=0)
    yield aten.isin.Tensor_Tensor, (s.ints(9, 3, 5), s.ints(9, 4))
    yield aten.isin.Tensor_Scalar, (s.ints(3, 3, 5), 2)
    bounds = torch.arange(6) / 5 - 0.6
    yield Sample(aten.bucketize.Tensor, (s.real(3, 5), bounds.double()), differentiable=0)
    yield Sample(aten.searchsorted.Tensor, (bounds.double(), s.real(3, 5)), differentiable=0)
    own = s.real(3, 4, 6).sort().values
    yield Sample(aten.searchsorted.Tensor, (own, s.real(3, 4, 5)), {"right": True}, differentiable=0)
    yield Sample(aten.searchsorted.Tensor, (own, s.real(3, 4, 5)), {"sorter": own.argsort()}, differentiable=0)


def pointwise(s: _Source) -> Iterator[Any]:
    x, row, one = s.real(3, 4, 5), s.real(4, 1), s.real(1)
    scalar = torch.tensor(0.5, dtype=torch.float64)
    yield aten.add.Tensor, (x, row), {"alpha": 2}
    yield aten.add.Tensor, (x, 2.0)
    yield aten.sub.Tensor, (x, row)
    yield aten.mul.Tensor, (x, row)
    yield aten.mul.Tensor, (x, x)
    yield aten.mul.Tensor, (x, one)
    yield aten.mul.Scalar, (x, 2.0)
    yield aten.div.Tensor, (x, row)
    yield aten.div.Scalar, (x, 3)
    yield aten.neg.default, (x,)
    yield aten.where.self, (s.bools(4, 5), x, row)
    yield aten.where.self, (s.bools(3, 4, 5), scalar, x)
    yield aten._to_copy.default, (x,), {"dtype": torch.float32}
    yield aten._to_copy.default, (x.float(),), {"dtype": torch.float64}
    yield aten._to_copy.default, (s.ints(9, 3, 4),), {"dtype": torch.float64}
    for op in (aten.clone, aten.alias, aten.detach, aten.zeros_like, aten.ones_like):
        yield op.default, (x,)
    yield aten.full_like.default, (x, 2.5)
    yield Sample(aten.copy.default, (x, s.real(3, 4, 5)), differentiable=0)
    yield Sample(aten.copy.default, (x, s.real(5)), differentiable=0)
    yield aten.masked_fill.Scalar, (x, s.bools(4, 5), 1.5)
    yield aten.masked_fill.Tensor, (x, s.bools(3, 1, 5), scalar)
    yield aten.fill.Scalar, (x, 1.5)
    yield aten.fill.Tensor, (x, scalar)
    for loss in (aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss, aten.kl_div):
        yield loss.default, (x, s.unit(3, 4, 5), 0)
    yield Sample(aten.mse_loss.default, (x, s.real(3, 4, 5)), sharded=False)
    yield Sample(aten.soft_margin_loss.default, (x, s.unit(3, 4, 5), 0), differentiable=1)
    yield Sample(aten.binary_cross_entropy.default, (s.unit(3, 4), s.unit(3, 4), s.unit(4), 0), differentiable=2)
    logits = (x, s.unit(3, 4, 5), None, s.unit(4, 1), 0)
    yield Sample(aten.binary_cross_entropy_with_logits.default, logits, differentiable=2)
    yield Sample(ours.with_slope.default, (x, s.real(3, 4, 5), s.real(3, 4, 5)), differentiable=2)
    yield ours.dropout.default, (x, torch.tensor(11), 0.3, 4)
    yield ours.dropout.default, (s.real(7), torch.tensor(11), 0.3, 5)
    yield ours.uniform.default, (torch.tensor(11), 6, [7, 8, 9], torch.float64)
    yield ours.uniform.default, (torch.tensor(11), 7, [7], torch.float32)


def normalizations(s: _Source) -> Iterator[Any]:
    x, w, b = s.real(3, 4, 6), s.real(6), s.real(6)
    yield aten.layer_norm.default, (x, [6], w, b)
    yield aten.layer_norm.default, (x, [4, 6])
    yield aten.layer_norm.default, (x, [6], w)
    yield aten.native_layer_norm.default, (x, [6], w, b, 1e-5)
    yield aten.rms_norm.default, (x, [6], w, 1e-6)
    yield aten.group_norm.default, (s.real(3, 6, 5), 2, w, b)
    yield aten.group_norm.default, (s.real(3, 6, 5), 3)


def convolutions(s: _Source) -> Iterator[Any]:
    x, options = s.real(3, 4, 7, 6), ([1, 2], [1, 0], [1, 1])
    yield aten.convolution.default, (x, s.real(5, 4, 3, 2), None, *options, False, [0, 0], 1)
    yield aten.convolution.default, (x, s.real(6, 2, 3, 2), None, *options, False, [0, 0], 2)
    yield aten.convolution.default, (x, s.real(4, 5, 3, 2), None, *options, True, [0, 0], 1)
    yield aten.convolution.default, (x, s.real(8, 1, 3, 2), None, *options, False, [0, 0], 4)
    yield aten.convolution.default, (x, s.real(4, 3, 3, 2), None, *options, True, [0, 1], 2)
    yield aten.convolution.default, (s.real(3, 6, 7), s.real(6, 1, 3), None, [1], [2], [1], False, [0], 6)
    yield Sample(aten.convolution.default, (x, s.real(5, 4, 3, 2), s.real(5), *options, False, [0, 0], 1), sharded=False)
    yield aten.im2col.default, (x, [3, 2], [1, 1], [1, 0], [2, 1])
    yield aten.im2col.default, (s.real(4, 7, 6), [3, 2], [1, 1], [0, 0], [1, 1])
    yield aten.col2im.default, (s.real(3, 24, 25), [7, 6], [3, 2], [1, 1], [0, 0], [1, 1])
    yield aten.max_pool2d.default, (x, [3, 2], [2, 2], [1, 0])
    yield aten.max_pool2d_with_indices.default, (x, [3, 2])
    yield aten.max_pool1d.default, (s.real(3, 4, 7), [2])
    yield aten.avg_pool2d.default, (x, [3, 2])
    yield aten.avg_pool1d.default, (s.real(3, 4, 7), [2])
    yield aten.adaptive_avg_pool2d.default, (x, [3, 2])
    yield aten.adaptive_avg_pool2d.default, (s.real(4, 7, 6), [1, 1])
    yield aten._adaptive_avg_pool2d.default, (x, [3, 2])
    yield aten.adaptive_avg_pool1d.default, (s.real(3, 4, 7), [2])
    yield aten.upsample_nearest2d.vec, (x, None, [2.0, 2.0])
    yield aten.upsample_bilinear2d.vec, (x, [9, 5], False, None)
    yield aten.adaptive_avg_pool3d.default, (s.real(3, 4, 5, 4, 4), [2, 2, 2])
    for op in (aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa):
        yield op.default, (x, [9, 5], False)
        yield op.vec, (x, None, True, [2.0, 1.5])


def factories(s: _Source) -> Iterator[Any]:
    x, double = s.real(3, 4), {"dtype": torch.float64}
    yield aten.full.default, ([3, 5], 2.5), double
    yield aten.zeros.default, ([3, 5],), double
    yield aten.ones.default, ([3, 5],), double
    yield Sample(aten.empty.memory_format, ([3, 5],), double, compare=False)
    yield aten.new_zeros.default, (x, [5, 4])
    yield aten.new_ones.default, (x, [5, 4])
    yield aten.new_full.default, (x, [5, 4], 1.5)
    yield Sample(aten.new_empty.default, (x, [5, 4]), compare=False)
    yield Sample(aten.linspace.default, (-1.0, 2.0, 7), double, sharded=False)
    yield Sample(aten.logspace.default, (-1.0, 2.0, 7), double, sharded=False)
    for op in (aten.tril_indices, aten.triu_indices):
        yield Sample(op.default, (4, 5), sharded=False)
    for name in factory_rules.WINDOWS:
        yield Sample(getattr(aten, name).default, (7,), double, sharded=False)
        yield Sample(getattr(aten, name).periodic, (7, False), double, sharded=False)
    yield aten.arange.default, (7,)
    yield aten.arange.default, (7,), double
    yield aten.arange.start, (-2, 5)
    yield aten.arange.start_step, (1, 13, 2)
    yield aten.arange.start_step, (0.5, 3.0, 0.25), double
    yield aten.arange.start_step, (9, 2, -1)


def batched(s: _Source) -> Iterator[Any]:
    """Matrices, samples and channels by themselves. The last two dims of `a` are a well-conditioned, positive definite matrix."""
    rows = s.real(3, 5, 4, 4)
    a = rows @ rows.mT + 4 * torch.eye(4, dtype=torch.float64)
    half, b = torch.linalg.cholesky(a), s.real(3, 5, 4, 2)
    lu, pivots = torch.linalg.lu_factor(a)
    older = (aten.cholesky,) if hasattr(aten, "cholesky") else ()
    for op in (*older, aten.linalg_cholesky_ex, aten.linalg_inv_ex, aten.linalg_lu_factor_ex):
        yield op.default, (a,)
    for op in (aten.linalg_lu, aten.linalg_matrix_exp, aten.linalg_qr, aten._linalg_det, aten._linalg_slogdet):
        yield op.default, (a,)
    # A factor of a phase is left open in these: no gradient of the vectors is asked for.
    yield Sample(aten._linalg_eigh.default, (a,), differentiable=0)
    yield Sample(aten.linalg_ldl_factor_ex.default, (a,), differentiable=0)
    yield Sample(aten.linalg_eig.default, (a,), differentiable=0)
    yield Sample(aten._linalg_svd.default, (s.real(3, 5, 4, 3),), differentiable=0)
    yield aten.cholesky_inverse.default, (half,)
    yield aten.cholesky_solve.default, (b, half)
    yield aten._linalg_solve_ex.default, (a, b)
    yield Sample(aten.linalg_householder_product.default, (s.real(3, 5, 4, 2), s.unit(3, 5, 2)), differentiable=0)
    yield aten.linalg_lu_solve.default, (lu, pivots, b)
    yield aten.linalg_solve_triangular.default, (half, b), {"upper": False}
    yield aten.triangular_solve.default, (b, half, False)
    tolerance = torch.tensor(1e-12, dtype=torch.float64)
    yield Sample(aten.linalg_pinv.atol_rtol_tensor, (a,), {"atol": tolerance, "rtol": tolerance}, differentiable=1)
    plane, volume = s.real(3, 5, 8, 8), s.real(3, 5, 8, 8, 4)
    yield aten.adaptive_max_pool2d.default, (plane, [2, 2])
    yield aten.adaptive_max_pool3d.default, (volume, [2, 2, 2])
    yield aten._adaptive_avg_pool3d.default, (volume, [2, 2, 2])
    yield aten.avg_pool3d.default, (volume, [2, 2, 2])
    yield aten.max_pool3d_with_indices.default, (volume, [2, 2, 2])
    yield aten.max_unpool2d.default, (*aten.max_pool2d_with_indices.default(plane, [2, 2], [2, 2]), [8, 8])
    pooled = aten.max_pool3d_with_indices.default(volume, [2, 2, 2])
    yield aten.max_unpool3d.default, (*pooled, [8, 8, 4], [2, 2, 2], [0, 0, 0])
    yield Sample(aten.fractional_max_pool2d.default, (plane, [2, 2], [4, 4], s.unit(3, 5, 2)), differentiable=1)
    yield Sample(aten.fractional_max_pool3d.default, (volume, [2, 2, 2], [4, 4, 2], s.unit(3, 5, 3)), differentiable=1)
    yield aten.grid_sampler_2d.default, (plane, s.unit(3, 4, 4, 2), 0, 0, False)
    yield aten.grid_sampler_3d.default, (volume, s.unit(3, 4, 4, 4, 3), 0, 0, False)
    yield aten.pixel_shuffle.default, (s.real(3, 5, 4, 2, 2), 2)
    yield aten.pixel_unshuffle.default, (s.real(3, 5, 2, 4, 4), 2)
    yield aten.channel_shuffle.default, (s.real(5, 4, 2, 2), 2)
    yield Sample(aten.geqrf.default, (s.real(3, 5, 4, 4),), differentiable=0)
    reflected, scales = aten.geqrf.default(s.real(3, 5, 4, 4))
    yield Sample(aten.ormqr.default, (reflected, scales, b), differentiable=0)
    yield aten.lu_unpack.default, (lu, pivots)
    ldl, swaps, _ = aten.linalg_ldl_factor_ex.default(a)
    yield Sample(aten.linalg_ldl_solve.default, (ldl, swaps, b), differentiable=0)
    yield aten.affine_grid_generator.default, (s.real(5, 2, 3), [5, 3, 4, 6], False)
    yield aten.linalg_cross.default, (s.real(4, 3, 5), s.real(4, 3, 1)), {"dim": 1}
    yield aten.linalg_cross.default, (s.real(1, 4, 3), s.real(5, 4, 3))
    yield aten.renorm.default, (s.real(3, 5, 4), 2, 1, 0.7)
    yield Sample(aten.multi_margin_loss.default, (s.real(5, 4), s.ints(4, 5), 1, 1.0, s.unit(4), 0), differentiable=1)
    yield Sample(aten.multi_margin_loss.default, (s.real(5, 4), s.ints(4, 5)), sharded=False)
    yield aten.multilabel_margin_loss_forward.default, (s.real(5, 4), s.ints(4, 5, 4), 0)
    yield aten._cdist_forward.default, (s.real(3, 5, 4), s.real(3, 6, 4), 2.0, None)
    yield aten._cdist_forward.default, (s.real(5, 4), s.real(3, 6, 4), 1.0, None)
    yield aten._euclidean_dist.default, (s.real(3, 5, 4), s.real(3, 6, 4))
    yield aten.diag_embed.default, (s.real(3, 5, 4),)
    yield Sample(aten.diag_embed.default, (s.real(3, 5, 4), 0, 0, 1), sharded=False)
    yield Sample(aten.linalg_solve_triangular.default, (half[:1], b), {"upper": False}, sharded=False)
    # As many rows as there are matrices: not a batch.
    square = half[0, :4]
    yield Sample(aten.linalg_solve_triangular.default, (square, s.real(4, 6)), {"upper": False}, sharded=False)
    yield Sample(aten.cholesky_solve.default, (s.real(4, 4, 3), half[0, 0]), sharded=False)


def fourier(s: _Source) -> Iterator[Any]:
    x = torch.complex(s.real(3, 4, 5), s.real(3, 4, 5))
    yield aten._fft_c2c.default, (x, [1, 2], 0, True)
    yield aten._fft_c2c.default, (x, [2], 2, False)
    yield aten._fft_r2c.default, (s.real(3, 4, 5), [1], 0, True)
    yield aten._fft_c2r.default, (x, [1], 2, 6)
    yield aten.view_as_real.default, (x,)
    yield aten.view_as_complex.default, (s.real(3, 4, 2),)
    yield aten._conj_physical.default, (x,)
    yield aten._to_copy.default, (s.real(3, 4),), {"dtype": torch.complex128}
    yield aten.mul.Tensor, (x, s.real(4, 1))
    yield aten.complex.default, (s.real(3, 4), s.real(4))
    yield aten.polar.default, (s.unit(3, 4), s.real(4))


def orders(s: _Source) -> Iterator[Any]:
    x = s.real(3, 5, 4)
    yield aten.kthvalue.default, (x, 2, 1)
    yield aten.mode.default, (s.ints(3, 3, 5, 4), 1)
    yield aten.median.dim, (x, 1)
    yield aten.nanmedian.dim, (x, 1)
    yield aten.std_mean.correction, (x, [1]), {"correction": 1}
    yield aten.var_mean.correction, (x, [1]), {"correction": 1}
    # torch 2.11 cannot differentiate aminmax.
    differentiable = 99 if torch.__version__ >= "2.13" else 0
    yield Sample(aten.aminmax.default, (x,), {"dim": 1}, differentiable=differentiable)
    yield aten.sort.stable, (x,), {"stable": True, "dim": 1}
    yield aten.cummax.default, (x, 1)
    yield aten.cummin.default, (x, 1)
    yield aten.logcumsumexp.default, (x, 1)
    yield aten._safe_softmax.default, (x, 1)
    yield aten.glu.default, (x, 2)
    yield aten.log_sigmoid_forward.default, (x,)
    yield aten._prelu_kernel.default, (x, s.real(1, 5, 1))
    yield aten.hardswish.default, (4 * x,)
    yield aten.frexp.Tensor, (x,)
    yield Sample(aten.floor_divide.default, (s.ints(9, 3, 5), s.ints(5, 3, 5, low=1)), differentiable=0)


TABLES = (
    products,
    attention,
    views,
    reductions,
    orders,
    lookups,
    pointwise,
    normalizations,
    convolutions,
    batched,
    fourier,
    factories,
)


def tagged_pointwise_ops() -> list[OpOverload]:
    """Every functional ATen op of one result that torch tags as elementwise: what `find_rule` gives the generic rule."""
    found = []
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            schema = op._schema
            if torch.Tag.pointwise in op.tags and [str(r.type) for r in schema.returns] == ["Tensor"] and not schema.is_mutable:
                found.append(op)
    return found


def generic_sample(op: OpOverload) -> Sample | None:
    """A call of `op` with broadcast tensors and plain scalars; None where the op takes no such call."""
    s = _Source()
    arguments = [a for a in op._schema.arguments if not a.kwarg_only and not a.has_default_value()]
    for tensor in (s.unit, lambda *shape: s.ints(5, *shape, low=1), s.bools):
        shapes = iter([(5, 4), (4,), (5, 1), (5, 4)])
        args = tuple(tensor(*next(shapes)) if str(a.type) == "Tensor" else 2 for a in arguments)
        try:
            run_whole(Sample(op, args), grad=True)
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        return Sample(op, args)
    return None
