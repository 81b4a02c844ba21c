"""Compute the same with fewer passes over memory, and in fewer lines to read.

Requires  a joint graph (passes/differentiate.py).
Ensures   the same outputs, up to rounding, by these rewrites:

    pow(x, 1)                  x
    t(t(x))                    x                       and any transpose of the same dims
    view(view(x))              view(x), or x           where x is contiguous
    where(c, x, x)             x                       a gate of a gradient (compiler/branches.py)
    expand(a) * (x * c)        expand(a * c) * x       c a number
    x + a * b                  addcmul(x, a, b)        where a * b has no other use
    x + a @ b                  addmm(x, a, b)          where a @ b has no other use; x as large, or a bias
    sum of slices' gradients   cat of what was given   where the slices are all of the dim: rotated halves, fused projections

Collectives stay, and in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .graph_tools import Values, arguments, call, output_node

aten = torch.ops.aten

_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_TRANSPOSES = frozenset({aten.t.default, aten.transpose.int})

Rewrite = Callable[[fx.Node, fx.Graph, Values], fx.Node | None]
"""What may stand for a node, made in front of it; None where the rewrite does not apply."""


def simplify(gm: fx.GraphModule, values: Values) -> fx.GraphModule:
    """Rewrite in place and return the graph."""
    results = set(output_node(gm).all_input_nodes)
    for node in list(gm.graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is None:
            continue
        with gm.graph.inserting_before(node):
            found = rewrite(node, gm.graph, values)
        if found is None:
            continue
        if node in results and (found.op == "placeholder" or found in results):
            continue  # an output of its own
        if not found.meta.get("types"):
            found.meta["types"] = dict(node.meta.get("types", {}))
        operands = node.all_input_nodes
        node.replace_all_uses_with(found)
        results = {found if n is node else n for n in results}
        gm.graph.erase_node(node)
        for operand in operands:
            _drop_unused(gm.graph, operand)
    return gm


def _drop_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase what a rewrite left without a use, and what only that used."""
    if node.users or node.target not in _REWRITABLE:
        return
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        _drop_unused(graph, operand)


def _made(like: fx.Node, graph: fx.Graph, values: Values, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """A new call with the facts of `like`, but for its types."""
    new = call(graph, values, target, args)
    new.meta.update({k: v for k, v in like.meta.items() if k not in ("val", "types", "calls")})
    return new


def _same_layout(one: fx.Node, two: fx.Node) -> bool:
    a, b = one.meta["val"], two.meta["val"]
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _is(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def _power_of_one(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    x, exponent = arguments(node)
    return x if exponent == 1 and isinstance(x, fx.Node) and _same_layout(x, node) else None


def _transpose_twice(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    (inner, *_) = arguments(node)
    if not _is(inner, *_TRANSPOSES):
        return None
    return arguments(inner)[0] if _swapped(inner) == _swapped(node) else None


def _swapped(node: fx.Node) -> frozenset[int]:
    rank = node.meta["val"].dim()
    dims = arguments(node)[1:] or ((0, 1) if rank == 2 else (0,))
    return frozenset(d % max(rank, 1) for d in dims)


def _view_of_view(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    inner, shape = arguments(node)
    source = arguments(inner)[0] if _is(inner, *_RESHAPES) else inner
    value = source.meta["val"]
    if not value.is_contiguous():
        return None
    if tuple(value.shape) == tuple(node.meta["val"].shape):
        return source if _same_layout(source, node) else None
    may_copy = aten.reshape.default in (node.target, inner.target)
    target = aten.reshape.default if may_copy else aten.view.default
    return _made(node, graph, values, target, (source, shape)) if source is not inner else None


def _either_is_it(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    _, x, y = arguments(node)
    return x if x is y and isinstance(x, fx.Node) and _same_layout(x, node) else None


def _number_on_the_smaller(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    for wide, scaled in (arguments(node), arguments(node)[::-1]):
        if not (_is(wide, aten.expand.default) and _is(scaled, aten.mul.Scalar) and len(scaled.users) == 1):
            continue
        (small, sizes, *_), (x, number) = arguments(wide), arguments(scaled)
        alike = small.meta["val"].dtype == x.meta["val"].dtype == node.meta["val"].dtype
        # In half precision the number may be what keeps the product in range.
        if (
            alike
            and node.meta["val"].dtype != torch.float16
            and math.prod(small.meta["val"].shape) < math.prod(x.meta["val"].shape)
        ):
            less = _made(node, graph, values, aten.mul.Scalar, (small, number))
            return _made(node, graph, values, aten.mul.Tensor, (_made(node, graph, values, aten.expand.default, (less, sizes)), x))
    return None


def _add(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    if not _plain_sum(node):
        return None
    return (
        _add_of_slices(node, graph, values) or _add_of_product(node, graph, values) or _add_of_matrix_product(node, graph, values)
    )


def _add_of_slices(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    pieces = _slices(node)
    if pieces is None or len(pieces) < 2:
        return None
    _, sizes, dim, *_ = arguments(pieces[0])
    pieces.sort(key=lambda piece: arguments(piece)[3])
    ends = [0]
    for piece in pieces:
        grad, own_sizes, own_dim, start, end, step = arguments(piece)
        if (
            [*own_sizes] != [*sizes]
            or own_dim != dim
            or step != 1
            or start != ends[-1]
            or end - start != grad.meta["val"].shape[dim]
        ):
            return None
        ends.append(end)
    if ends[-1] != sizes[dim]:
        return None
    made = _made(node, graph, values, aten.cat.default, ([arguments(piece)[0] for piece in pieces], dim))
    if _same_layout(made, node):
        return made
    graph.erase_node(made)
    return None


def _plain_sum(node: fx.Node) -> bool:
    """Without `alpha`."""
    return not node.kwargs and len(arguments(node)) == 2


def _slices(node: fx.Node) -> list[fx.Node] | None:
    """The slice_backward calls that a chain of additions sums; None where anything else is in it, or used elsewhere too."""
    found: list[fx.Node] = []
    for operand in arguments(node):
        if not isinstance(operand, fx.Node) or len(operand.users) != 1:
            return None
        below = [operand] if _is(operand, aten.slice_backward.default) else None
        if _is(operand, aten.add.Tensor) and _plain_sum(operand):
            below = _slices(operand)
        if below is None:
            return None
        found += below
    return found


def _add_of_product(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    for term, product in (arguments(node), arguments(node)[::-1]):
        if not (_is(product, aten.mul.Tensor) and isinstance(term, fx.Node) and term is not product):
            continue
        parts = [term, *arguments(product)]
        own = len(product.users) == 1 and product.meta.get("phase") == node.meta.get("phase")
        if not own or not all(isinstance(p, fx.Node) for p in parts):
            continue
        result = node.meta["val"]
        if result.dtype.is_floating_point and all(p.meta["val"].dtype == result.dtype for p in parts):
            made = _made(node, graph, values, aten.addcmul.default, tuple(parts))
            if _same_layout(made, node):
                return made
            graph.erase_node(made)
    return None


def _add_of_matrix_product(node: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    operands = [n for n in arguments(node) if isinstance(n, fx.Node)]
    if len(operands) < 2 or not node.meta["val"].dtype.is_floating_point:
        return None
    for term, product in ((operands[0], operands[1]), (operands[1], operands[0])):
        chain = _matrix_product(product, node)
        # Made where the product was, so that its factors live no longer: what it is added to must be there. A bias soon is.
        if chain is None or not _same_layout(product, node) or not (term < chain or term.meta["val"].dim() == 1):
            continue
        with graph.inserting_before(chain if term < chain else node):
            term = _as_matrix(term, chain, node, graph, values)
            made = term and _made(node, graph, values, aten.addmm.default, (term, *arguments(chain)))
        if made is None:
            continue
        if chain is product:
            return made
        return _made(node, graph, values, aten.view.default, (made, [*node.meta["val"].shape]))
    return None


def _matrix_product(node: fx.Node, user: fx.Node) -> fx.Node | None:
    """The matrix product that `node` is a reshape of and that only `user` reads; None where there is none."""
    while len(node.users) == 1 and node.meta.get("phase") == user.meta.get("phase"):
        if _is(node, aten.mm.default):
            return node
        if not _is(node, *_RESHAPES):
            return None
        node = arguments(node)[0]
    return None


def _as_matrix(term: fx.Node, product: fx.Node, total: fx.Node, graph: fx.Graph, values: Values) -> fx.Node | None:
    """What is added to the matrix `product` where `term` is added to a reshape of it, of the shape of `total`."""
    x, matrix = term.meta["val"], product.meta["val"]
    if x.dtype != matrix.dtype:
        return None
    if x.dim() == 1 and x.shape[0] == matrix.shape[1] == total.meta["val"].shape[-1]:
        return term
    if x.shape != total.meta["val"].shape or not x.is_contiguous():
        return None
    source = arguments(term)[0] if _is(term, *_RESHAPES) else term
    if _same_layout(source, product):
        return source
    return term if _same_layout(term, product) else _made(total, graph, values, aten.view.default, (term, [*matrix.shape]))


_REWRITES: dict[Any, Rewrite] = {
    aten.pow.Tensor_Scalar: _power_of_one,
    aten.t.default: _transpose_twice,
    aten.transpose.int: _transpose_twice,
    aten.view.default: _view_of_view,
    aten._unsafe_view.default: _view_of_view,
    aten.where.self: _either_is_it,
    aten.mul.Tensor: _number_on_the_smaller,
    aten.add.Tensor: _add,
}
_REWRITABLE = frozenset({*_REWRITES, aten.mm.default, aten.mul.Scalar, aten.expand.default, aten.slice_backward.default})
