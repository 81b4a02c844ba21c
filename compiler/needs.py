"""Which values the backward of a captured op needs, before it is traced.

An op needs either the values of its operands (a product), or its results (a softmax), or neither (a sum).
"""

from __future__ import annotations

import torch
from torch import fx

from ..passes.convert import makes_whole
from ..passes.graph_tools import VIEWS, Calls, is_parameter, result_of
from ..passes.rules.base import OpCall, TensorMeta
from ..passes.types import Type
from .cost import FREE, op_name

aten = torch.ops.aten

VALUE_FREE = frozenset(
    """add add_ sub rsub neg cat stack sum mean clone _to_copy to where masked_fill dropout embedding embedding_shard select
    index_select slice pick pad constant_pad_nd gather index_add scatter_add unfold""".split()
)
"""Ops whose backward needs the value of no operand that takes a gradient."""

NEEDS_RESULT = frozenset(
    """attention chunked_attention softmax _softmax log_softmax _log_softmax logsumexp tanh sigmoid exp rsqrt sqrt reciprocal relu
    topk max_pool2d""".split()
)

CASTS = frozenset({"_to_copy", "to"})


def is_view(node: fx.Node) -> bool:
    return node.target in VIEWS or node.target is aten.reshape.default


def needs_value(node: fx.Node, call: OpCall, i: int) -> bool:
    """Whether the backward of a call needs the value of operand i: products need it for the gradient of the others alone."""
    name = op_name(call.target)
    if name in VALUE_FREE or name in FREE or is_view(node):
        return False
    if name in ("mul", "div", "mm", "bmm", "linear", "matmul", "addmm", "baddbmm", "convolution"):
        return any(o.grad for k, o in enumerate(call.operands) if k != i) or (name == "div" and i == 1)
    if name == "with_slope":
        return i == 2
    return name not in NEEDS_RESULT or name in ("attention", "chunked_attention", "logsumexp")


def read_again(parameter: fx.Node, calls: Calls) -> bool:
    """Whether the backward needs the parameter's value: some user, views and casts looked through, multiplies by it."""

    def needed_by(user: fx.Node) -> bool:
        if is_view(user) or op_name(user.target) in CASTS:
            return read_again(user, calls)
        call, sources = calls[user]
        return any(o.grad for o in call.operands) and any(
            needs_value(user, call, i) for i, source in enumerate(sources) if source is parameter
        )

    return any(needed_by(user) for user in parameter.users if user in calls)


def gathered_again(source: fx.Node, have: Type, needed: Type, calls: Calls) -> bool:
    """Whether a value is a parameter that is gathered for an op and once more for its backward, instead of kept whole."""
    return makes_whole(have, needed) and is_parameter(source) and read_again(source, calls)


def held_by(node: fx.Node) -> tuple[fx.Node, int]:
    """The value that a value is a view of."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return result_of(node)


def passes_on(call: OpCall, operand: TensorMeta) -> bool:
    """Whether an operand's gradient is that of the result itself."""
    return op_name(call.target) == "add" and operand.shape == call.results[0].shape
