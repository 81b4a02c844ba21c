"""The regions of an exported program: no_grad and autocast blocks, which torch.export keeps as calls of subgraphs.

`run_decompositions` would inline them and forget what they were: so a region without gradients becomes plain nodes here,
behind a `detach` of whatever enters it. Enabled autocast regions stay calls, and leave their casts when they are inlined.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .capture_error import CaptureError
from .fidelity import line_of_stack_trace
from .hidden_writes import HIDDEN_WRITES, SELDOM, show_writes
from .torch_compat import OpOverload

aten = torch.ops.aten
SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def settle_regions(graph: fx.GraphModule) -> None:
    """Inline the no_grad regions of an exported graph, in place, and those within its other regions, and show hidden writes.

    Raises CaptureError for an autocast region of another device than the CPU, on which everything is captured, and for writes that
    cannot be shown.
    """
    for node in list(graph.graph.nodes):
        if node.target is aten.detach_.default and node.args[0].target is aten.lift_fresh_copy.default:
            node.replace_all_uses_with(node.args[0])  # a constant just made by torch.tensor(...)
            graph.graph.erase_node(node)
        if node.target in SELDOM:
            show_writes(graph, node, _inline)
        if node.target not in (SET_GRAD, AUTOCAST):
            continue
        position = next(k for k, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        region: fx.GraphModule = getattr(graph, str(node.args[position].target))
        settle_regions(region)
        operands = node.args[position + 1 :]
        if node.target is SET_GRAD:
            if node.args[0] is False:
                _detach_inputs(region)
            _inline(graph, node, region, operands)
        else:
            _check_autocast(node, region)
            if not node.args[2]:
                _inline(graph, node, region, operands)
            else:
                node.meta.setdefault("stack_trace", _first_stack(region))
    graph.graph.eliminate_dead_code(lambda n: n.op != "get_attr")
    graph.recompile()


def is_functional(graph: fx.GraphModule) -> bool:
    """Whether a graph with settled regions writes nothing: then functionalizing it, a second trace, would change nothing."""
    calls = [n for n in graph.graph.nodes if n.op != "placeholder" and n.op != "output"]
    return all(
        isinstance(n.target, OpOverload)
        and not n.target._schema.is_mutable
        and n.target not in HIDDEN_WRITES
        or n.target is operator.getitem
        for n in calls
    )


def _check_autocast(node: fx.Node, region: fx.GraphModule) -> None:
    device, dtype, enabled = node.args[:3]
    if enabled and device != "cpu":
        raise CaptureError(
            f"the forward enables torch.autocast({device!r}, {dtype}), whose casts depend on the device",
            line_of_stack_trace(_first_stack(region)),
            "convert the model instead (model.to(torch.bfloat16)), or disable autocast inside",
        )


def _first_stack(region: fx.GraphModule) -> str | None:
    return next((n.meta["stack_trace"] for n in region.graph.nodes if n.meta.get("stack_trace")), None)


def _detach_inputs(region: fx.GraphModule) -> None:
    placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
    written = _written(region.graph)
    for placeholder in placeholders:
        value = placeholder.meta.get("val")
        floating = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        if floating and placeholder.users and placeholder not in written:
            user = next(iter(placeholder.users))
            with region.graph.inserting_after(placeholders[-1]):
                cut = region.graph.call_function(aten.detach.default, (placeholder,))
            cut.meta = {**user.meta, "val": value}
            placeholder.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Placeholders that the region writes to, directly or through views. `fidelity.Watch` saw that they carry no gradient."""
    found = set()
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            root = node.args[0]
            while isinstance(root, fx.Node) and root.op == "call_function" and root.args:
                root = root.args[0]
            if isinstance(root, fx.Node):
                found.add(root)
    return found


def _inline(graph: fx.GraphModule, node: fx.Node, region: fx.GraphModule, operands: tuple[Any, ...]) -> None:
    """Replace the call `node` of `region` by the region's nodes."""
    given = iter(operands)
    copies: dict[fx.Node, Any] = {}
    outputs: Any = None
    for inner in region.graph.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(given)
        elif inner.op == "output":
            outputs = map_arg(inner.args[0], lambda n: copies[n])
        else:
            with graph.graph.inserting_before(node):
                copies[inner] = graph.graph.node_copy(inner, lambda n: copies[n])
            if inner.op == "get_attr":
                _adopt(graph, region, copies[inner])
    if isinstance(outputs, fx.Node):
        node.replace_all_uses_with(outputs)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _adopt(graph: fx.GraphModule, region: fx.GraphModule, node: fx.Node) -> None:
    """Move what a get_attr node names from the region to the graph, under a name that is free there."""
    name = str(node.target)
    free = name
    while hasattr(graph, free):
        free += "_"
    setattr(graph, free, getattr(region, name))
    node.target = free
