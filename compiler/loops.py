"""Loops whose number of steps depends on data: while a model is traced one step is, between two marks, and becomes one op.

The ops of the step are written down as text, in normal form, and so is the gradient of a step, which is traced like that of any op
(passes/ops/loops.py). What a step computes of nothing that is carried is the same in all, and stays outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.differentiate import NOTHING, trace
from ..passes.graph_tools import extract, is_getitem
from ..passes.normalize import normalize
from ..passes.normalize.gradients import CUTS, mark_gradients
from ..passes.ops.collectives import ops
from ..passes.ops.loops import floating, written
from .capture_error import CaptureError
from .torch_compat import OpOverload

aten = torch.ops.aten
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})


def fold_loops(gm: fx.GraphModule) -> None:
    """Put one op in place of every marked step of a captured graph, in place. Requires meta["val"] and meta["grad"].

    Raises CaptureError where a step draws random numbers, and where a value of it is read outside.
    """
    begun: list[fx.Node] = []
    graded = _graded(gm)
    for node in list(gm.graph.nodes):
        if node.target is ops.loop_begin.default:
            begun.append(node)
        elif node.target is ops.loop_end.default:  # of the innermost loop that is open
            _fold(gm, begun.pop(), node, graded)


def _graded(gm: fx.GraphModule) -> set[fx.Node]:
    """The values that may carry a gradient in some step: what is carried need not in the first."""
    found = set[fx.Node]()
    for node in gm.graph.nodes:
        passes = node.target is ops.loop_begin.default or (node.target not in CUTS and not found.isdisjoint(node.all_input_nodes))
        if passes or node.meta.get("grad"):
            found.add(node)
    return found


def _fold(gm: fx.GraphModule, begin: fx.Node, end: fx.Node, graded: set[fx.Node]) -> None:
    condition, results = end.args
    step, inside = _between(begin, end), {begin}
    for node in step:
        if not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    _check(step, inside, end)
    carried: Any = begin.args[0]
    keys = {node: f"v{node.args[1]}" for node in begin.users if is_getitem(node)}
    read = dict.fromkeys(n for node in (*step, end) if node in inside or node is end for n in node.all_input_nodes)
    others = [n for n in read if n not in inside]
    keys |= {node: f"v{k}" for k, node in enumerate(others, len(carried))}
    until, body = (_normal(extract(gm, [(f"r{k}", n) for k, n in enumerate(made)], keys)) for made in ([condition], results))  # type: ignore[arg-type]
    count = len(carried) + len(others)
    text = _text("while", until, count) + _text("carry", body, count)
    values = [*begin.meta["val"], *(n.meta["val"] for n in others)]
    if floats := floating(begin.meta["val"]):
        wanted = [True] * len(carried) + [n in graded for n in others]
        text += _text("give", _gradient(body, values, wanted, floats), count + len(floats))
    with gm.graph.inserting_before(end):
        made = gm.graph.call_function(ops.loop.default, ("\n".join(text), list(carried), others))
    made.meta.update(end.meta)
    if end in graded:
        graded.add(made)
    end.replace_all_uses_with(made)
    gm.graph.erase_node(end)
    for node in reversed([begin, *(n for n in step if n in inside)]):
        gm.graph.erase_node(node)


def _normal(part: fx.GraphModule) -> fx.GraphModule:
    """Of all that is floating there may be gradients: what is carried need have none in the first step."""
    for node in part.graph.find_nodes(op="placeholder"):
        node.meta["grad"] = bool(floating([node.meta["val"]]))
    mark_gradients(part.graph)
    return normalize(part)


def _between(begin: fx.Node, end: fx.Node) -> list[fx.Node]:
    """In the order of the graph, which is that of the calls."""
    found, node = [], begin.next
    while node is not end:
        found.append(node)
        node = node.next
    return found


def _check(step: Sequence[fx.Node], inside: set[fx.Node], end: fx.Node) -> None:
    for node in step:
        if _draws(node):
            raise CaptureError(
                "a step of torch.while_loop draws random numbers, whose steps cannot be told apart",
                node.meta.get("source"),
                "draw them before the loop, a row for each step that it may take",
            )
    for node in inside:
        if outside := next((user for user in node.users if user not in inside and user is not end), None):
            raise CaptureError(
                "a value of a step of torch.while_loop is read outside of it", outside.meta.get("source"), "carry it"
            )


def _draws(node: fx.Node) -> bool:
    """Whether an op draws random numbers: not where it drops out nothing."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given: Mapping[str, Any] = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
    given = {**given, **dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)), **node.kwargs}
    trains = [given[name] for name in ("train", "training") if name in given]
    shares = [given[name] for name in ("p", "dropout_p", "dropout") if name in given]
    return False not in trains and 0.0 not in shares


def _text(word: str, gm: fx.GraphModule, first: int) -> list[str]:
    """The lines of a part: what the graph computes, whose placeholders have the keys v0, v1, and so on, `first` at most."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = node.meta["key"]
        elif node.op == "output":
            lines.append(f"{word} {', '.join(names[n] for n in node.args[0])}")
        elif is_getitem(node):
            names[node] = f"{names[node.args[0]]}[{node.args[1]}]"
        else:
            names[node] = f"v{first + len(lines)}"
            lines.append(f"{names[node]} = {_call(node, names)}")
    return lines


def _call(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if not isinstance(node.target, OpOverload):
        raise CaptureError(
            f"a step of torch.while_loop calls {node.target}, which is no op of torch",
            node.meta.get("source"),
            "write it out in ordinary operations",
        )
    # The strides that fakes have need not be those of what will run.
    target = aten.reshape.default if node.target in VIEWS else node.target
    args = [written(a, names.__getitem__) for a in node.args]
    kwargs = [f"{k}={written(v, names.__getitem__)}" for k, v in node.kwargs.items() if k != "pin_memory"]
    namespace, _, rest = target.name().partition("::")
    return f"{namespace}.{rest if '.' in rest else f'{rest}.default'}({', '.join([*args, *kwargs])})"


def _gradient(body: fx.GraphModule, values: Sequence[Tensor], wanted: Sequence[bool], floats: Sequence[Tensor]) -> fx.GraphModule:
    """The gradients of a step's floating inputs from those of its floating results; zeros where none is wanted."""
    keys = [int(n.meta["key"].removeprefix("v")) for n in body.graph.find_nodes(op="placeholder")]

    def run(values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            needs = [w and bool(floating([x])) for x, w in zip(values, wanted, strict=True)]
            leaves = [x.detach().requires_grad_(True) if need else x for x, need in zip(values, needs, strict=True)]
            outs = floating(fx.Interpreter(body).run(*(leaves[k] for k in keys)))
            pairs = [(o, g) for o, g in zip(outs, gradients, strict=True) if o.requires_grad]
            roots, seeds = zip(*pairs, strict=True) if pairs else ((), ())
            asked = [x for x, need in zip(leaves, needs, strict=True) if need]
            found = iter(torch.autograd.grad(roots, asked, seeds, allow_unused=True) if pairs else [None] * len(asked))
        given = [next(found) if need else None for need in needs]
        return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in zip(values, given, strict=True) if floating([x])]

    mode: Any = values[0].fake_mode  # type: ignore[attr-defined]
    with mode:
        fresh = [torch.empty(x.shape, dtype=x.dtype) for x in values]
        seeds = [torch.empty(x.shape, dtype=x.dtype) for x in floats]
        traced = trace(run, fresh, seeds)
    for node in list(traced.graph.nodes):
        if node.target in NOTHING:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    for k, node in enumerate(traced.graph.find_nodes(op="placeholder")):
        node.meta["key"] = f"v{k}"
    return traced
