"""Random graphs of ops that have sharding rules, with a scalar loss and random inputs: what property tests draw.

A graph is made of integers (`Recipe`): the sizes it begins with, then for each op its kind and what it takes. Any integers make a
graph, so that hypothesis can make a failing one smaller by leaving ops out.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from shardwright.compiler.prepare import keep_gradients
from shardwright.passes import rules  # noqa: F401  (registers the rules)
from shardwright.passes.graph_tools import Values, call, metas

aten, ours = torch.ops.aten, torch.ops.shardwright
LOSS, OTHER = "out.0", "out.1"
LARGEST = 600
"""Elements of a value: graphs stay quick to run."""


@dataclass(frozen=True)
class Recipe:
    """`batch`: the graph begins with an input, not with a parameter."""

    sizes: tuple[int, ...]
    ops: tuple[tuple[int, int, int], ...]
    seed: int = 0
    batch: bool = False


@dataclass(frozen=True)
class Drawn:
    """A graph as passes take it, with the values of its inputs by key and what one device computes."""

    graph: fx.GraphModule
    inputs: Mapping[str, Tensor]
    results: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def recipes(most: int = 6, sizes: Sequence[int] = (2, 3, 4, 5, 6, 8)) -> st.SearchStrategy[Recipe]:
    op = st.tuples(st.integers(0, len(KINDS) - 1), st.integers(0, 11), st.integers(0, 11))
    shape = st.lists(st.sampled_from(sizes), min_size=2, max_size=4).map(tuple)
    return st.builds(Recipe, shape, st.lists(op, min_size=2, max_size=most).map(tuple), st.integers(0, 2**16), st.booleans())


def build(recipe: Recipe) -> Drawn:
    builder = _Builder(recipe.seed)
    first = torch.randn(*recipe.sizes, dtype=torch.float64, generator=builder.generator)
    builder.pool.append(builder.input(first) if recipe.batch else builder.parameter(recipe.sizes))
    for kind, a, b in recipe.ops:
        found = KINDS[kind % len(KINDS)](builder, builder.pool[-1 - a % len(builder.pool)], b)
        builder.pool += [] if found is None else [found]
    return builder.finish()


class _Builder:
    def __init__(self, seed: int) -> None:
        self.graph, self.values = fx.Graph(), Values()
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: dict[str, Tensor] = {}
        self.numbers = itertools.count()
        self.pool: list[fx.Node] = []
        """Floating-point values that ops may take."""

    def parameter(self, shape: Sequence[int]) -> fx.Node:
        key = f"param.p{next(self.numbers)}"
        return self._placeholder(key, torch.randn(*shape, dtype=torch.float64, generator=self.generator))

    def input(self, value: Tensor) -> fx.Node:
        return self._placeholder(f"input.i{next(self.numbers)}", value)

    def ids(self, high: int, shape: Sequence[int]) -> fx.Node:
        return self.input(torch.randint(high, tuple(shape), generator=self.generator))

    def _placeholder(self, key: str, value: Tensor) -> fx.Node:
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        with nullcontext() if first is None else self.graph.inserting_before(first):
            node = self.graph.placeholder(key.replace(".", "_"))
        node.meta.update(key=key, val=self.values.tensor(tuple(value.shape), value.dtype), grad=key.startswith("param."))
        self.inputs[key] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = call(self.graph, self.values, target, args, kwargs)
        node.meta.update(grad=any(n.meta["grad"] for n in node.all_input_nodes), types={}, calls={})
        value = node.meta["val"]
        if isinstance(value, Tensor) and not value.is_floating_point():
            node.meta["grad"] = False
        return node

    def item(self, node: fx.Node, k: int) -> fx.Node:
        return self.call(operator.getitem, node, k)

    def finish(self) -> Drawn:
        """The loss: the weighed sum of all that nothing else uses. The last value that something uses is an output too."""
        leaves = [n for n in self.pool if not n.users]
        inner = [n for n in self.pool if n.users and n.op != "placeholder"]
        terms = []
        for leaf in leaves:
            weights = torch.randn(shape_of(leaf), dtype=torch.float64, generator=self.generator)
            weights = self.input(weights) if leaf.meta["grad"] else self.parameter(shape_of(leaf))
            terms.append(self.call(aten.sum.default, self.call(aten.mul.Tensor, leaf, weights)))
        loss = terms[0]
        for term in terms[1:]:
            loss = self.call(aten.add.Tensor, loss, term)
        other = inner[-1:]
        self.graph.output((loss, *other))
        gm = fx.GraphModule(torch.nn.Module(), self.graph)
        gm.meta["outputs"] = (LOSS, OTHER)[: 1 + len(other)]
        keep_gradients(gm, LOSS)
        args = [self.inputs[n.meta["key"]] for n in gm.graph.nodes if n.op == "placeholder"]
        leaves_ = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
        results = dict(zip(gm.meta["outputs"], gm(*leaves_), strict=True))
        keys = [n.meta["key"] for n in gm.graph.nodes if n.op == "placeholder"]
        wanted = {k: leaf for k, leaf in zip(keys, leaves_, strict=True) if k.startswith("param.")}
        found = torch.autograd.grad(results[LOSS], list(wanted.values()), allow_unused=True, materialize_grads=True)
        return Drawn(gm, self.inputs, {k: v.detach() for k, v in results.items()}, dict(zip(wanted, found, strict=True)))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return metas(node)[0].shape


Kind = Callable[[_Builder, fx.Node, int], fx.Node | None]


def linear(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    return b.call(aten.linear.default, x, b.parameter((2 + k % 5, shape_of(x)[-1])))


def matmul(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    shape = shape_of(x)
    if len(shape) < 2:
        return None
    if len(shape) == 2:
        return b.call(aten.mm.default, x, b.parameter((shape[-1], 2 + k % 4)))
    lead = shape[:-2] if k % 2 else shape[1:-2]
    return b.call(aten.matmul.default, x, b.parameter((*lead, shape[-1], 2 + k % 4)))


def unary(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    ops = (aten.tanh, aten.gelu, aten.neg, aten.sigmoid, aten.silu, aten.clone)
    return b.call(ops[k % len(ops)].default, x)


def scaled(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    target, args = ((aten.mul.Scalar, (0.5,)), (aten.div.Scalar, (3.0,)), (aten.add.Tensor, (1.5,)))[k % 3]
    return b.call(target, x, *args)


def binary(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    """With itself, with a value of the same shape where there is one, or with a parameter that broadcasts."""
    others = [n for n in b.pool if n is not x and shape_of(n) == shape_of(x)]
    target = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)[k % 3]
    if k == 11:
        return b.call(aten.mul.Tensor, x, x)
    if others and k < 9:
        return b.call(target, x, others[k % len(others)])
    shape = shape_of(x)
    own = tuple(1 if k % 2 and d == 0 else s for d, s in enumerate(shape))
    return b.call(target, x, b.parameter(own[k % max(1, len(shape)) :] or (1,)))


def where(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    shape = shape_of(x)
    mask = b.input(torch.rand(shape[k % 2 :], generator=b.generator) < 0.6)
    return b.call(aten.where.self, mask, x, b.parameter(shape)) if k % 3 else b.call(aten.masked_fill.Scalar, x, mask, 0.25)


def merge(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    shape = shape_of(x)
    if len(shape) < 2:
        return None
    d = k % (len(shape) - 1)
    return b.call(aten.reshape.default, x, [*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :]])


def split(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    """A dim into two, the outer or the inner one the smaller."""
    for d, size in enumerate(shape_of(x)):
        factor = next((f for f in (2, 3) if size % f == 0 and size > f), None)
        if factor is not None and len(shape_of(x)) < 5:
            pair = (factor, size // factor) if k % 2 else (size // factor, factor)
            return b.call(aten.view.default, b.call(aten.clone.default, x), [*shape_of(x)[:d], *pair, *shape_of(x)[d + 1 :]])
    return None


def transpose(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    rank = len(shape_of(x))
    if rank == 4 and k % 3 == 0:
        return b.call(aten.permute.default, x, [3, 1, 0, 2])
    if rank < 2 or k % 3 == 0:
        return b.call(aten.unsqueeze.default, x, k % (rank + 1))
    return b.call(aten.transpose.int, x, 0, 1 + k % (rank - 1))


def expand(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    if len(shape_of(x)) > 3:
        return None
    return b.call(aten.expand.default, x, [2 + k % 3, *shape_of(x)])


def reduced(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    shape = shape_of(x)
    if len(shape) < 2:
        return None
    d = k % len(shape)
    if k % 4 == 3:
        return b.call(aten.logsumexp.default, x, [d], k % 2 == 0)
    if k % 4 == 2:
        return b.call(ours.logsumexp.default, x)
    if k % 5 == 4:
        return b.call(aten.amax.default, x, [d], False)
    return b.call(aten.sum.dim_IntList, x, [d], k % 2 == 0)


def softmax(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    target = aten.softmax.int if k % 2 else aten.log_softmax.int
    return b.call(target, x, k % len(shape_of(x)))


def cumsum(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    return b.call(aten.cumsum.default, x, k % len(shape_of(x)))


def norm(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    n = shape_of(x)[-1]
    if k % 2:
        return b.call(aten.layer_norm.default, x, [n], b.parameter((n,)), b.parameter((n,)), 1e-3)
    return b.call(aten.rms_norm.default, x, [n], b.parameter((n,)), 1e-3)


def embedding(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    """As wide as x's last dim, added to x."""
    *lead, width = shape_of(x)
    found = b.call(aten.embedding.default, b.parameter((3 + k % 5, width)), b.ids(3 + k % 5, lead[k % 2 :]))
    return b.call(aten.add.Tensor, x, found)


def gathered(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    shape = shape_of(x)
    if len(shape) < 2:
        return None
    if k % 3 == 0:
        return b.call(ours.pick.default, x, b.ids(shape[-1], shape[:-1]))
    if k % 3 == 1:
        return b.call(aten.index_select.default, x, 0, b.ids(shape[0], (2 + k % 3,)))
    return b.call(aten.gather.default, x, 1, b.ids(shape[1], (shape[0], 3, *shape[2:])))


def attention(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    """Over a value of four dims; grouped heads where they are even in number."""
    shape = shape_of(x)
    if len(shape) != 4:
        return None
    n, heads, length, width = shape
    groups = heads // 2 if heads % 2 == 0 and k % 2 else heads
    key, value = b.parameter((n, groups, length, width)), b.parameter((n, groups, length, 3))
    return b.item(b.call(ours.attention.default, x, key, value, None, k % 3 == 0, 0.4), 0)


def cat(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    d = k % len(shape_of(x))
    shape = [*shape_of(x)]
    shape[d] = 1 + k % 4
    return b.call(aten.cat.default, [x, b.parameter(shape)], d)


def sliced(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
    shape = shape_of(x)
    d = k % len(shape)
    if shape[d] < 3:
        return None
    if k % 3 == 0:
        return b.call(aten.slice.Tensor, x, d, 1, shape[d])
    if k % 3 == 1 and len(shape) > 1:
        return b.call(aten.select.int, x, d, k % shape[d])
    pieces = b.call(aten.split_with_sizes.default, x, [shape[d] - 2, 2], d)
    return b.item(pieces, k % 2)


def moved(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    d = k % len(shape_of(x))
    if k % 3 == 0:
        return b.call(aten.flip.default, x, [d])
    if k % 3 == 1:
        return b.call(aten.constant_pad_nd.default, x, [1, 2])
    return b.call(aten.roll.default, x, [1], [d])


def dropout(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    return b.call(ours.dropout.default, x, b.input(torch.tensor(11 + k)), 0.4, k)


def squared_error(b: _Builder, x: fx.Node, k: int) -> fx.Node:
    target = b.input(torch.randn(shape_of(x), dtype=torch.float64, generator=b.generator))
    return b.call(aten.mse_loss.default, x, target, 0)


_ALL: tuple[Kind, ...] = (
    *(linear, matmul, unary, scaled, binary, where, merge, split, transpose, expand, reduced, softmax, cumsum, norm, embedding),
    *(gathered, attention, cat, sliced, moved, dropout, squared_error),
)


def _small(kind: Kind) -> Kind:
    """Nothing where the result would be too large, or has no dims left for other ops to work on."""

    def made(b: _Builder, x: fx.Node, k: int) -> fx.Node | None:
        found = kind(b, x, k)
        if found is None or (found.meta["val"].numel() <= LARGEST and found.meta["val"].dim()):
            return found
        _discard(b, found)
        return None

    made.__name__ = kind.__name__
    return made


def _discard(b: _Builder, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    if node.op == "placeholder":
        del b.inputs[node.meta["key"]]
    b.graph.erase_node(node)
    for source in inputs:
        if not source.users and source not in b.pool:
            _discard(b, source)


KINDS: tuple[Kind, ...] = tuple(map(_small, _ALL))
