"""Ops that are only names for combinations of others, and have no spelling of their own here, are taken apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...compiler.torch_compat import WITHOUT_MKLDNN, OpOverload, is_composite, lazy_graph_modules
from .rewrite import Builder, leaves, map_leaves

aten = torch.ops.aten

WHOLE = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.reshape.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.softmax.int,
        aten.log_softmax.int,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.avg_pool1d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
    }
)
"""Composite ops that later passes have rules for, or differentiate better as one."""

WITHOUT_WRITING = {aten.bernoulli_.float: aten.bernoulli.p, aten.normal_.default: aten.normal_functional.default}
"""Ops that write, whose other form has another name."""


def decompose(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rule of ops without a rule: a composite op becomes what it is made of, each part in normal form."""
    if not isinstance(target, OpOverload) or target in WHOLE or not is_composite(target):
        return NotImplemented
    nodes = [v for v in leaves((args, kwargs)) if isinstance(v, fx.Node)]

    def call(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        filled = map_leaves((args, kwargs), lambda v: next(given) if isinstance(v, fx.Node) else v)
        return target.decompose(*filled[0], **filled[1])

    values = [n.meta["val"].clone() for n in nodes]  # nodes may share one: tracing would take them for one operand
    with torch.no_grad(), lazy_graph_modules(), WITHOUT_MKLDNN:
        traced = make_fx(call)(*values)
    if any(n.target is target for n in traced.graph.nodes) or not _without_writes(traced):
        return NotImplemented
    return splice(b, traced, nodes)


def _without_writes(traced: fx.GraphModule) -> bool:
    """Replace ops that write to an operand by those that give a new value, which later nodes then use. False where another name
    of the same memory would have seen the write."""
    for node in list(traced.graph.nodes):
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        packet = getattr(aten, node.target._schema.name.split("::")[1].removesuffix("_"), None)
        same = WITHOUT_WRITING.get(node.target) or getattr(packet, node.target._overloadname, None)
        written: Any = node.args[0]
        if same is None or same is node.target or _is_view(written) or any(_is_view(user) for user in written.users):
            return False
        node.kwargs = {**node.kwargs, **_defaults(node, node.target, same)}
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        if same(*args, **kwargs).dtype != written.meta["val"].dtype:  # a write keeps the dtype
            return False
        node.target = same
        written.replace_all_uses_with(node, lambda user, node=node: user > node)
    return True


def _defaults(node: fx.Node, target: OpOverload, other: OpOverload) -> dict[str, Any]:
    """The arguments that a call leaves to its op's defaults, and that `other` has not the same default for."""
    wanted = {a.name: a for a in other._schema.arguments}
    left = [a for a in target._schema.arguments[len(node.args) :] if a.name not in node.kwargs and a.has_default_value()]
    return {
        a.name: a.default_value
        for a in left
        if (b := wanted.get(a.name)) is not None and not (b.has_default_value() and b.default_value == a.default_value)
    }


def _is_view(node: fx.Node) -> bool:
    """Whether a node shares memory with another; placeholders are the caller's."""
    if node.op == "placeholder":
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def splice(b: Builder, traced: fx.GraphModule, operands: list[fx.Node]) -> Any:
    """The calls of `traced` on `operands`, through the rules; its result."""
    given = iter(operands)
    env: dict[fx.Node, Any] = {}

    def of(value: Any) -> Any:
        return map_leaves(value, lambda v: env[v] if isinstance(v, fx.Node) else v)

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "output":
            return of(node.args[0])
        elif node.op == "call_function":
            env[node] = b(node.target, *of(node.args), **of(node.kwargs))
        else:
            raise RuntimeError(f"{node.op} {node.target} in the decomposition of an op")
    raise RuntimeError("a decomposition without a result")
