"""Which values carry a gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

CUTS = frozenset(
    {
        aten.detach.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
    }
)
"""Ops with floating results that autograd takes for constants. (A derivative of zero, as of sign, is a gradient all the same.)"""


def mark_gradients(graph: fx.Graph, roots: Collection[str] | None = None) -> None:
    """Set meta["grad"] on every node: whether it is floating and depends, differentiably, on a root.

    `roots` are keys of placeholders; None takes the placeholders' present meta["grad"].
    """
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["grad"] = node.meta.get("key") in roots if roots is not None else bool(node.meta.get("grad"))
        elif node.op == "output":
            continue
        else:
            depends = node.target not in CUTS and any(n.meta.get("grad") for n in node.all_input_nodes)
            node.meta["grad"] = depends and _has_floating(node.meta.get("val"))


def _has_floating(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_floating(v) for v in value)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
