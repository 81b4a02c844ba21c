"""Ops as the quickest callables that do the same.

A call of an op by its overload passes through boxed values: about a microsecond more than the public function of torch does, of
which a step of a small model has a thousand. The printed graphs name overloads, which say exactly what is meant; run, they call
what stands here. Of the project's own ops it is the kernel: a program runs without gradients, so nothing lies between but the
user's function modes. A kernel therefore says on which device it makes a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..passes.ops.collectives import KERNELS, NAMESPACE

Function = Callable[..., Any]
OpOverload = type(torch.ops.aten.add.Tensor)

_SAME_NAME = """
    abs add addcdiv addcmul addmm amax amin baddbmm bitwise_and bitwise_not bitwise_or bmm cat clamp clone convolution
    cos cumsum div embedding eq erf exp exp2 gather ge gt index_select le log log1p logical_and logical_not logical_or
    lt masked_fill maximum mean minimum mm mul native_layer_norm ne neg permute pow reciprocal relu rsqrt rsub select
    sigmoid sin sqrt stack sub sum t tanh transpose unsqueeze where
""".split()
"""Functions of torch that take the arguments of every overload of the aten op of that name, in its order and by its names."""

_METHODS = {"_unsafe_view": "view", "expand": "expand", "view": "view"}

_FUNCTIONS: dict[str, Function] = {
    "gelu": F.gelu,
    **{name: getattr(torch, name) for name in _SAME_NAME},
    **{name: getattr(torch.Tensor, method) for name, method in _METHODS.items()},
}


def op_path(op: Any) -> tuple[str, str, str]:
    """`aten::add.Tensor` as ("aten", "add", "Tensor")."""
    namespace, _, rest = op.name().partition("::")
    name, _, overload = rest.partition(".")
    return namespace, name, overload or "default"


def direct(op: Any) -> Function:
    """The quickest callable that does what `op` does outside autograd; `op` itself where there is no other."""
    namespace, name, overload = op_path(op)
    known = {"aten": _FUNCTIONS, NAMESPACE: KERNELS}.get(namespace, {})
    return known[name] if name in known and overload != "out" else op


def direct_namespaces(nodes: Iterable[Node]) -> dict[str, SimpleNamespace]:
    """What stands for `torch.ops.NAMESPACE` in the code of a graph of `nodes`."""
    found: dict[str, SimpleNamespace] = {}
    for node in nodes:
        if not isinstance(node.target, OpOverload):
            continue
        namespace, name, overload = op_path(node.target)
        packets = vars(found.setdefault(namespace, SimpleNamespace()))
        setattr(packets.setdefault(name, SimpleNamespace()), overload, direct(node.target))
    return found
