"""Which ops may write their result over an operand: less memory to hold, and to bring into the cache."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class InPlace:
    """How an op is called with memory for its result.

    callee, keyword     the function, and the argument that takes the memory
    operands            positions of the operands over which it may write
    """

    callee: str
    operands: tuple[int, ...] = (0, 1)
    keyword: str = "out"


def _rows() -> Iterable[tuple[object, InPlace]]:
    for name in ("abs", "cos", "exp", "exp2", "log", "neg", "reciprocal", "rsqrt", "sigmoid", "sin", "sqrt", "tanh"):
        yield getattr(aten, name).default, InPlace(f"torch.{name}", (0,))
    for name in ("add", "div", "mul", "sub"):
        yield getattr(aten, name).Tensor, InPlace(f"torch.{name}")
    yield aten.mul.Scalar, InPlace("torch.mul", (0,))
    yield aten.pow.Tensor_Scalar, InPlace("torch.pow", (0,))
    yield aten.maximum.default, InPlace("torch.maximum")
    yield aten.minimum.default, InPlace("torch.minimum")
    yield aten.addcmul.default, InPlace("torch.addcmul", (0, 1, 2))
    yield aten.addmm.default, InPlace("torch.addmm", (0,))
    for name in ("gelu_backward", "sigmoid_backward", "silu_backward", "tanh_backward"):
        yield getattr(aten, name).default, InPlace(f"torch.ops.aten.{name}.grad_input", keyword="grad_input")


IN_PLACE: Mapping[object, InPlace] = dict(_rows())
"""Ops that read each element of an operand for the last time as they write it."""

_SILENT_VIEWS = frozenset({aten._unsafe_view.default})
"""Views whose schemas do not say so."""


def is_view(target: object) -> bool:
    """Whether an op's result may show the memory of its operands."""
    schema = getattr(target, "_schema", None)
    return schema is None or target in _SILENT_VIEWS or any(r.alias_info is not None for r in schema.returns)


def owner(node: Node) -> Node:
    """The node that made the memory which a value shows; of several results, the op that made them."""
    while node.op == "call_function" and (node.target is operator.getitem or is_view(node.target)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def reused(nodes: Iterable[Node]) -> dict[Node, int]:
    """The position of the operand over which a node of a graph may write its result, for those that may.

    The operand is the last that anyone sees of its memory, which an op of the graph has made, and it lies as the result would.
    """
    nodes = list(nodes)
    owners = {node: owner(node) for node in nodes}
    last: dict[Node, Node] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            last[owners[operand]] = node
    found: dict[Node, int] = {}
    for node in nodes:
        how = IN_PLACE.get(node.target)
        operands = [] if how is None or node.kwargs else [x if isinstance(x, Node) else None for x in node.args]
        for i in how.operands[: len(operands)] if how is not None else ():
            operand = operands[i]
            if operand is None or not _lie_alike(operand, node):
                continue
            memory = owners[operand]
            alone = all(x is None or k == i or owners[x] is not memory for k, x in enumerate(operands))
            if alone and last[memory] is node and memory.op == "call_function" and not is_view(memory.target):
                found[node] = i
                break
    return found


def _lie_alike(operand: Node, result: Node) -> bool:
    a, b = operand.meta.get("val"), result.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
