"""Every rewrite gives what it stands for, where it applies; nothing is rewritten where it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.passes.graph_tools import Values
from shardwright.passes.simplify import simplify

aten = torch.ops.aten


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """What `function` calls, as a joint graph of one phase."""
    values = Values()
    gm = make_fx(function, tracing_mode="real")(*inputs)
    by_node: dict[fx.Node, Any] = {}
    for node, x in zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True):
        by_node[node] = values.like(x)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta = {"val": None, "phase": "forward", "types": {}}
            node.meta["val"] = values.of(node.target, node.args, node.kwargs)
        elif node in by_node:
            node.meta = {"val": by_node[node], "key": node.name}
    output = next(n for n in gm.graph.nodes if n.op == "output")
    if isinstance(output.args[0], fx.Node):
        output.args = ((output.args[0],),)
    return simplify(gm, values)


def calls(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def check(function: Callable[..., Any], inputs: tuple[Tensor, ...], expected: list[Any]) -> None:
    gm = graph_of(function, *inputs)
    assert calls(gm) == expected
    gm.graph.lint()
    gm.recompile()
    wanted = function(*inputs)
    for found, value in zip(gm(*inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-13, atol=1e-13)
        assert found.stride() == value.stride()


X, Y, ROWS = (torch.randn(s, dtype=torch.float64) for s in ((4, 6), (4, 6), (4, 1)))
W, BIAS, CUBE = (torch.randn(s, dtype=torch.float64) for s in ((6, 6), (6,), (2, 2, 6)))
T, V, R, MM, ADDMM = aten.t.default, aten.view.default, aten.reshape.default, aten.mm.default, aten.addmm.default

REWRITTEN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], list[Any]]] = {
    "power of one": (lambda x: aten.sin(aten.pow.Tensor_Scalar(x, 1.0)), (X,), [aten.sin.default]),
    "where of one value": (
        lambda x, y, mask: aten.sin(torch.where(mask, x, x)) + y,
        (X, Y, X > 0),
        [aten.sin.default, aten.add.Tensor],
    ),
    "t of t": (lambda x, y: x.t().t() @ y.t(), (X, Y), [T, MM]),
    "transposes of one pair of dims, written in two ways": (
        lambda x: x.transpose(0, 1).transpose(-1, -2).sin(),
        (X,),
        [aten.sin.default],
    ),
    "view of view": (lambda x: x.view(24).view(2, 12).sin(), (X,), [V, aten.sin.default]),
    "view back": (lambda x: x.view(24).view(4, 6).sin(), (X,), [aten.sin.default]),
    "number on the smaller": (
        lambda x, r: aten.mul.Tensor(r.expand(4, 6), aten.mul.Scalar(x, 2.0)),
        (X, ROWS),
        [aten.mul.Scalar, aten.expand.default, aten.mul.Tensor],
    ),
    "product added": (lambda x, y, r: x + y * r, (X, Y, ROWS), [aten.addcmul.default]),
    "added to a product": (lambda x, y, r: y * r + x, (X, Y, ROWS), [aten.addcmul.default]),
    "matrix product added": (lambda x, y, w: x + y @ w, (X, Y, W), [ADDMM]),
    "added to a matrix product": (lambda x, y, w: y @ w + x, (X, Y, W), [ADDMM]),
    "matrix product of another shape added": (lambda c, y, w: c + (y @ w).view(2, 2, 6), (CUBE, Y, W), [V, ADDMM, V]),
    "bias": (lambda y, w, b: (y @ w).view(2, 2, 6) + b, (Y, W, BIAS), [ADDMM, V]),
    "matrix products": (
        lambda x, y, w: (x @ w).view(2, 2, 6) + (y @ w).view(2, 2, 6) + (y @ w.t()).view(2, 2, 6),
        (X, Y, W),
        [MM, ADDMM, T, ADDMM, V],
    ),
    "halves": (
        lambda x, y: (
            aten.slice_backward(y[:, :2].sin(), [4, 6], 1, 4, 6, 1) + aten.slice_backward(x[:, :4].sin(), [4, 6], 1, 0, 4, 1)
        ),
        (X, Y),
        [aten.slice.Tensor, aten.sin.default, aten.slice.Tensor, aten.sin.default, aten.cat.default],
    ),
    "three parts": (
        lambda x: (
            aten.slice_backward(x[:1], [4, 6], 0, 0, 1, 1)
            + aten.slice_backward(x[1:3], [4, 6], 0, 1, 3, 1)
            + aten.slice_backward(x[3:], [4, 6], 0, 3, 4, 1)
        ),
        (X,),
        [aten.slice.Tensor, aten.slice.Tensor, aten.slice.Tensor, aten.cat.default],
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewrites(name: str) -> None:
    function, inputs, expected = REWRITTEN[name]
    check(function, inputs, expected)


LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "another power": (lambda x: aten.pow.Tensor_Scalar(x, 2.0), (X,)),
    "t of another transpose": (lambda x: x.view(2, 2, 6).transpose(0, 2).transpose(0, 1).sin(), (X,)),
    "a product used twice": (lambda x, y: (lambda p: (x + p, p))(x * y), (X, Y)),
    "a matrix product used twice": (lambda x, y, w: (lambda p: (x + p, p))(y @ w), (X, Y, W)),
    "a matrix product added to itself": (lambda y, w: (lambda p: p + p)(y @ w), (Y, W)),
    "a matrix product repeated": (lambda c, y, w: c + y @ w, (torch.randn(3, 4, 6, dtype=torch.float64), Y, W)),
    "a bias along another dim": (lambda y, w, b: (y @ w).view(2, 6, 2) + b, (Y, W, torch.randn(2, dtype=torch.float64))),
    "a column added": (lambda r, y, w: r + y @ w, (ROWS, Y, W)),
    "a matrix product made before what it is added to": (lambda x, y, w: (lambda p: p + x.sin())(y @ w), (X, Y, W)),
    "a matrix product in another type": (lambda x, y, w: x + y.float() @ w.float(), (X, Y, W)),
    "a scaled matrix product": (lambda x, y, w: torch.add(x, y @ w, alpha=2), (X, Y, W)),
    "sum in another type": (lambda x, y: x + y.float() * y.float(), (X, Y)),
    "a scaled sum": (lambda x, y: torch.add(x, y * y, alpha=2), (X, Y)),
    "slices of a scaled sum": (
        lambda x: torch.add(
            aten.slice_backward(x[:, :3], [4, 6], 1, 0, 3, 1), aten.slice_backward(x[:, 3:], [4, 6], 1, 3, 6, 1), alpha=2
        ),
        (X,),
    ),
    "slices of a scaled sum within": (
        lambda x: (
            torch.add(aten.slice_backward(x[:, :2], [4, 6], 1, 0, 2, 1), aten.slice_backward(x[:, :2], [4, 6], 1, 2, 4, 1), alpha=2)
            + aten.slice_backward(x[:, :2], [4, 6], 1, 4, 6, 1)
        ),
        (X,),
    ),
    "half precision": (
        lambda x, r: aten.mul.Tensor(r.expand(4, 6), aten.mul.Scalar(x, 2.0)),
        (X.half(), ROWS.half()),
    ),
    "slices that overlap": (
        lambda x: aten.slice_backward(x[:, :4], [4, 6], 1, 0, 4, 1) + aten.slice_backward(x[:, :3], [4, 6], 1, 3, 6, 1),
        (X,),
    ),
    "slices with a gap": (
        lambda x: aten.slice_backward(x[:, :2], [4, 6], 1, 0, 2, 1) + aten.slice_backward(x[:, :3], [4, 6], 1, 3, 6, 1),
        (X,),
    ),
    "an output that would be an input": (lambda x: x.t().t(), (X,)),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_alone(name: str) -> None:
    function, inputs = LEFT[name]
    before = [n.target for n in make_fx(function)(*inputs).graph.nodes if n.op == "call_function"]
    check(function, inputs, before)
