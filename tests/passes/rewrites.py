"""Changes of a typed graph that leave what it computes, and its gradients, as they were: the check must accept them.

Each is a function of a graph, the same for the graphs of all ranks, as `mutations.py` has those that break it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from shardwright.passes.convert import convert, exists, is_free
from shardwright.passes.graph_tools import Values, call, copy_facts, extract, is_getitem, named_results, op_call, place_operands
from shardwright.passes.rules.base import Axis, OpCall, Strategy, localize, strategies
from shardwright.passes.types import I, P, R, Type, Varying, shard

Change = Callable[["_Editor", fx.Node], None]


@dataclass(frozen=True)
class Rewrite:
    kind: str
    node: str
    what: str
    change: Change

    def __call__(self, gm: fx.GraphModule, axis: Axis, index: int, values: Values) -> fx.GraphModule:
        made = extract(gm, named_results(gm), {})
        self.change(_Editor(made, axis, index, values), next(n for n in made.graph.nodes if n.name == self.node))
        made.recompile()
        return made

    def __str__(self) -> str:
        return f"{self.kind} at {self.node}: {self.what}"


class _Editor:
    def __init__(self, gm: fx.GraphModule, axis: Axis, index: int, values: Values) -> None:
        self.gm, self.axis, self.index, self.values = gm, axis, index, values

    def type_of(self, node: fx.Node) -> Any:
        return node.meta["types"][self.axis.name]

    def convert(self, node: fx.Node, dst: Type) -> fx.Node:
        """A new conversion of `node`, where the graph is being added to."""
        made = call(self.gm.graph, self.values, convert, (node, self.axis.name, self.type_of(node), dst))
        copy_facts(node, made).meta.pop("key", None)
        made.meta["calls"] = {}
        made.meta["types"][self.axis.name] = dst
        return made

    def as_type(self, node: fx.Node, dst: Type) -> fx.Node:
        return node if is_free(self.type_of(node), dst, bool(node.meta.get("grad"))) else self.convert(node, dst)


def rewrites(gm: fx.GraphModule, axis: Axis) -> Iterator[Rewrite]:
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_getitem(node):
            continue
        if node.target is convert:
            yield from _of_conversion(node, axis)
        else:
            yield from _detours(node, axis)
            yield from _other_strategies(node, axis)
        yield from _moves(node)


def _types(node: fx.Node, axis: Axis) -> Iterator[Type]:
    yield from (I, R, P)
    shape = [*node.meta["val"].shape]
    own = node.meta["types"][axis.name]
    if isinstance(own, Varying):
        shape[own.dim] = own.global_size
    for dim, size in enumerate(shape):
        if size >= axis.size:
            yield shard(dim, size, axis.size)
            yield Varying(dim, ((size - axis.size + 1, *[1] * (axis.size - 1)),))


def _of_conversion(node: fx.Node, axis: Axis) -> Iterator[Rewrite]:
    """src -> dst by way of a third type; a conversion that serves several made once for each."""
    source, _, src, dst = node.args
    grad = bool(source.meta.get("grad"))

    def through(edit: _Editor, n: fx.Node, between: Type) -> None:
        with edit.gm.graph.inserting_before(n):
            n.replace_all_uses_with(edit.convert(edit.convert(n.args[0], between), n.args[3]))
        edit.gm.graph.erase_node(n)

    for between in _types(node, axis):
        if between not in (src, dst) and exists(src, between, grad) and exists(between, dst, grad):
            yield Rewrite(
                "convert in two steps", node.name, f"{src} -> {between} -> {dst}", lambda e, n, t=between: through(e, n, t)
            )

    def twice(edit: _Editor, n: fx.Node) -> None:
        users = [*n.users][1:]
        with edit.gm.graph.inserting_after(n):
            again = edit.convert(n.args[0], n.args[3])
        n.replace_all_uses_with(again, lambda user: user in users)

    if len(node.users) > 1:
        yield Rewrite("convert twice", node.name, f"{src} -> {dst}", twice)

    def late(edit: _Editor, n: fx.Node) -> None:
        """A node of its own before each use, the source converted anew."""
        for user in [*n.users]:
            with edit.gm.graph.inserting_before(user):
                user.replace_input_with(n, edit.convert(n.args[0], n.args[3]))
        edit.gm.graph.erase_node(n)

    yield Rewrite("convert at each use", node.name, f"{src} -> {dst}", late)


def _detours(node: fx.Node, axis: Axis) -> Iterator[Rewrite]:
    """A value taken to another type and back before it is used."""
    if isinstance(node.meta["val"], tuple):
        return
    have, grad = node.meta["types"][axis.name], bool(node.meta.get("grad"))

    def there_and_back(edit: _Editor, n: fx.Node, other: Type) -> None:
        users = [*n.users]
        with edit.gm.graph.inserting_after(n):
            there = edit.convert(n, other)
        with edit.gm.graph.inserting_after(there):
            back = edit.convert(there, edit.type_of(n))
        n.replace_all_uses_with(back, lambda user: user in users)

    for other in _types(node, axis):
        if not is_free(have, other, grad) and exists(have, other, grad) and exists(other, have, grad):
            yield Rewrite(
                "there and back", node.name, f"{have} -> {other} -> {have}", lambda e, n, t=other: there_and_back(e, n, t)
            )


def _other_strategies(node: fx.Node, axis: Axis) -> Iterator[Rewrite]:
    """An op run under another strategy, its operands and result converted: a conversion moves across it."""
    if isinstance(node.meta["val"], tuple):
        return
    whole, taken = node.meta["calls"][axis.name]
    grads = [o.grad for o in whole.operands]

    def reachable(a: Type, b: Type, grad: bool) -> bool:
        return is_free(a, b, grad) or exists(a, b, grad)

    def run(edit: _Editor, n: fx.Node, other: Strategy, whole: OpCall) -> None:
        _, sources = op_call(n)
        with edit.gm.graph.inserting_before(n):
            operands = tuple(edit.as_type(s, t) for s, t in zip(sources, other.ins, strict=True))
            target, args, kwargs = localize(whole, other, edit.index)
            made = call(edit.gm.graph, edit.values, target, place_operands(args, operands), place_operands(kwargs, operands))
            copy_facts(n, made)
            made.meta["types"] = {**n.meta["types"], edit.axis.name: other.outs[0]}
            made.meta["calls"] = {**n.meta["calls"], edit.axis.name: (whole, other)}
            n.replace_all_uses_with(edit.as_type(made, edit.type_of(n)))
        edit.gm.graph.erase_node(n)

    for other in strategies(whole, axis):
        different = (other.ins, other.outs) != (taken.ins, taken.outs)
        ins = all(reachable(a, b, g) for a, b, g in zip(taken.ins, other.ins, grads, strict=True))
        if different and ins and reachable(other.outs[0], taken.outs[0], whole.results[0].grad):
            what = f"{node.target} by {other.label} for {taken.label}"
            yield Rewrite("another strategy", node.name, what, lambda e, n, s=other: run(e, n, s, whole))


def _moves(node: fx.Node) -> Iterator[Rewrite]:
    """A node computed later, or earlier, than it was."""

    def later(edit: _Editor, n: fx.Node) -> None:
        first = min(n.users, key=[*edit.gm.graph.nodes].index)
        first.prepend(n)

    def earlier(edit: _Editor, n: fx.Node) -> None:
        order = [*edit.gm.graph.nodes].index
        last_placeholder = [m for m in edit.gm.graph.nodes if m.op == "placeholder"][-1]
        max([*n.all_input_nodes, last_placeholder], key=order).append(n)

    if node.users and node.next not in node.users:
        yield Rewrite("compute later", node.name, "before its first use", later)
    if node.prev not in node.all_input_nodes and node.prev.op != "placeholder":
        yield Rewrite("compute earlier", node.name, "after its last operand", earlier)
