"""Loops whose number of steps depends on data: while a model is traced one step is, between two marks, and becomes one op.

The ops of the step are written down as text, and so is the gradient of a step, which is traced like that of any op
(passes/ops/loops.py). What a step computes of nothing that is carried is the same in all, and stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ..passes.graph_tools import is_getitem
from ..passes.ops.collectives import ops
from ..passes.ops.loops import floating, written
from .capture_error import CaptureError
from .torch_compat import OpOverload, lazy_graph_modules

aten = torch.ops.aten


def fold_loops(graph: fx.GraphModule) -> None:
    """Put one op in place of every marked step, in place.

    Raises CaptureError where a step draws random numbers, and where a value of it is read outside.
    """
    for end in graph.graph.find_nodes(op="call_function", target=ops.loop_end.default):  # those inside of others come first
        _fold(graph.graph, end)


def _fold(graph: fx.Graph, end: fx.Node) -> None:
    condition, begun, results = end.args
    (begin,) = {item.args[0] for item in begun}  # type: ignore[union-attr]
    step = _between(begin, end)
    for node in step:
        if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise CaptureError(
                "a step of torch.while_loop draws random numbers, whose steps cannot be told apart",
                node.meta.get("source"),
                "draw them before the loop, a row for each step that it may take",
            )
    inside = {begin}
    for node in step:
        if not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    for node in inside:
        if outside := next((user for user in node.users if user not in inside and user is not end), None):
            raise CaptureError(
                "a value of a step of torch.while_loop is read outside of it",
                outside.meta.get("source"),
                "carry it",
            )
    given: list[fx.Node] = [*begun]  # type: ignore[misc]
    others = list(dict.fromkeys(n for node in (*step, end) if node in inside or node is end for n in node.all_input_nodes))
    others = [n for n in others if n not in inside and n is not begin]
    steps = _text("while", [*given, *others], [condition]) + _text("carry", [*given, *others], results)
    steps += _gradient(given, others, results)
    with graph.inserting_before(end):
        made = graph.call_function(ops.loop.default, ("\n".join(steps), list(begin.args[0]), others))  # type: ignore[arg-type]
    made.meta.update(end.meta)
    end.replace_all_uses_with(made)
    graph.erase_node(end)
    for node in reversed(step):
        if node in inside:
            graph.erase_node(node)
    graph.erase_node(begin)


def _between(begin: fx.Node, end: fx.Node) -> list[fx.Node]:
    """In the order of the graph, which is that of the calls."""
    found, node = [], begin.next
    while node is not end:
        found.append(node)
        node = node.next
    return found


def _text(word: str, inputs: Sequence[fx.Node], results: Any) -> list[str]:
    """The lines of a part that computes `results` from `inputs`."""
    names = {node: f"v{k}" for k, node in enumerate(inputs)}
    lines: list[str] = []

    def name(node: Any) -> str:
        if node not in names:
            if is_getitem(node):
                names[node] = f"{name(node.args[0])}[{node.args[1]}]"
            else:
                names[node] = _line(node, name, lines, len(inputs))
        return names[node]

    for node in _needed(results, names):
        name(node)
    return [*lines, f"{word} {', '.join(map(name, results))}"]


def _needed(results: Iterable[fx.Node], given: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that make `results`, in the order of the graph."""
    found, stack = set(given), [*results]
    known = set(found)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(found - known)


def _line(node: fx.Node, name: Callable[[Any], str], lines: list[str], first: int) -> str:
    """Write a call down; gives the name of its result."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        raise CaptureError(
            f"a step of torch.while_loop calls {node.target}, which is no op of torch",
            node.meta.get("source"),
            "write it out in ordinary operations",
        )
    args = [written(a, name) for a in node.args]
    kwargs = [f"{k}={written(v, name)}" for k, v in node.kwargs.items() if k not in ("device", "pin_memory")]
    # The strides that fakes have need not be those of what will run.
    target = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
    namespace, _, rest = target.name().partition("::")
    path = rest if "." in rest else f"{rest}.default"
    lines.append(f"v{first + len(lines)} = {namespace}.{path}({', '.join([*args, *kwargs])})")
    return f"v{first + len(lines) - 1}"


def _gradient(carried: Sequence[fx.Node], others: Sequence[fx.Node], results: Any) -> list[str]:
    """The lines of the gradient of a step."""
    inputs = [*carried, *others]
    values = [n.meta["val"] for n in inputs]
    floats = floating([n.meta["val"] for n in results])
    if not floats:
        return []

    def run(values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(bool(floating([x]))) for x in values]
            known: dict[fx.Node, Any] = dict(zip(inputs, leaves, strict=True))
            for node in _needed(results, inputs):
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            outs = floating([known[n] for n in results])
            pairs = [(o, g) for o, g in zip(outs, gradients, strict=True) if o.requires_grad]
            wanted = floating(leaves)
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if pairs:
                roots, seeds = zip(*pairs, strict=True)
                found = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in zip(wanted, found, strict=True)]

    mode = values[0].fake_mode
    with mode, torch.no_grad(), lazy_graph_modules():
        fresh = [torch.empty(x.shape, dtype=x.dtype) for x in values]
        seeds = [torch.empty(x.shape, dtype=x.dtype) for x in floats]
        traced = make_fx(run)(fresh, seeds)
        if any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in traced.graph.nodes):
            traced = make_fx(functionalize(traced, remove="mutations"))(fresh, seeds)
    for node in list(traced.graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    return _text("give", placeholders, traced.graph.output_node().args[0])
