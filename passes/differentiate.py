"""The forward and backward of a typed local graph, as one joint graph.

Requires  a graph whose `convert` nodes carry types, checked (passes/check.py); meta["grad"] on placeholders.
Ensures   no convert node is left: each became its forward collectives, and in reverse its conjugate ones (passes/convert.py);
          every other node became the ATen and shardwright ops that run, and the backward of each op follows in reverse order;
          meta["phase"] is "forward" or "backward"; a gradient leaves as output `grad.KEY` for each placeholder that needs it.

The backward of an op is traced once per distinct signature (op, shapes, strides, dtypes, static arguments, which operands
need gradients), by make_fx over autograd.grad of the op alone; every other instance is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiler.torch_compat import OpOverload, lazy_graph_modules
from .convert import backward_ops, convert, forward_ops
from .graph_tools import (
    LazyGraphModule,
    Values,
    call,
    copy_call,
    copy_facts,
    describe,
    is_getitem,
    map_operands,
    op_call,
    op_calls,
    result_of,
    standing,
    where,
)
from .rules.base import has_derivatives
from .types import Type, gradient_type

Seed = Literal["one", "input"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Template:
    """An op's forward and backward, traced alone: `results` and `grads` are nodes of `graph` (None: no gradient flows).

    forward     the calls that the results need, in order
    backward    the calls that only the gradients need
    """

    graph: fx.Graph
    tensors: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]
    results: tuple[fx.Node | None, ...]
    grads: tuple[fx.Node | None, ...]
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]


class Templates:
    """Templates by signature. `traced` counts how many were made: it grows with distinct ops, not with layers."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.known: dict[Any, Template] = {}

    @property
    def traced(self) -> int:
        return len(self.known)

    def of(self, node: fx.Node, inputs: Sequence[Any], wants: tuple[bool, ...], tangents: Sequence[Any]) -> Template:
        """The template of a node's op.

        inputs      values of its operands as they stand in the graph being made (their strides decide what a view becomes)
        wants       which operands need a gradient
        tangents    per result the value of its cotangent, or None where none flows
        """
        key = (
            node.target,
            tuple(describe(v) for v in inputs),
            describe(_without_nodes(node)),
            standing(node.target),
            wants,
            tuple(None if t is None else describe(t) for t in tangents),
        )
        if key not in self.known:
            self.known[key] = self._trace(node, inputs, wants, tangents)
        return self.known[key]

    def _trace(self, node: fx.Node, operands: Sequence[Any], wants: tuple[bool, ...], cotangents: Sequence[Any]) -> Template:
        op, _ = op_call(node)
        inputs = [self.values.fresh(v) for v in operands]
        tangents = [t is not None for t in cotangents]
        seeds = [self.values.fresh(t) for t in cotangents if t is not None]

        def run(tensors: list[Any], cotangents: list[Any]) -> tuple[list[Any], list[Any]]:
            with torch.enable_grad():
                xs = [x.detach().requires_grad_(True) if w else x for x, w in zip(tensors, wants, strict=True)]

                def fill(o: Any) -> Any:
                    return xs[o.index].contiguous() if node.target in _READ_AS_THEY_LIE and o.index == 0 else xs[o.index]

                outs = node.target(*map_operands(op.args, fill), **map_operands(dict(op.kwargs), fill))  # type: ignore[operator]
                outs = list(outs) if isinstance(outs, tuple | list) else [outs]
                roots = [o for o, t in zip(outs, tangents, strict=True) if t]
                wanted = [x for x, w in zip(xs, wants, strict=True) if w]
                found = iter(torch.autograd.grad(roots, wanted, cotangents, allow_unused=True) if roots and wanted else ())
                return outs, [next(found, None) if w and any(tangents) else None for w in wants]

        try:
            with self.values.mode:
                traced = trace(run, inputs, seeds)
        except Exception as error:
            raise RuntimeError(f"the backward of {where(node)} could not be traced: {error}") from error
        return _read_template(traced.graph, len(inputs), len(seeds), len(cotangents))


def trace(run: Callable[..., Any], inputs: list[Any], seeds: list[Any]) -> fx.GraphModule:
    """What `run(inputs, seeds)` calls, its gradients included, with no writes."""
    with torch.no_grad(), lazy_graph_modules():
        traced = make_fx(run)(inputs, seeds)
        if any(_writes(n) for n in traced.graph.nodes):
            traced = make_fx(functionalize(traced, remove="mutations"))(inputs, seeds)
    return traced


def _without_nodes(node: fx.Node) -> Any:
    """The static arguments of a call, and where its operands stand among them."""
    op, _ = op_call(node)
    return map_operands((op.args, dict(op.kwargs)), lambda o: f"operand {o.index}")


NOTHING = frozenset({aten.detach.default, aten.alias.default})
_LAZY = {aten._conj.default: aten._conj_physical.default, aten._neg_view.default: aten.neg.default}
"""Views that are computed when they are read, which not every op does."""


_READ_AS_THEY_LIE = frozenset({aten.group_norm.default, aten.native_group_norm.default})
"""Ops whose kernels go over the memory of their first operand in the order that its strides suggest: those of dims of size 1 may be
others than its fake has, and then it is another order."""


def _writes(node: fx.Node) -> bool:
    """Whether a node's effect is what it writes: `_read_template` goes by results alone."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _contiguous(node: Any) -> bool:
    """Whether a value lies as a new one would, dims of size 1 included. Any other strides a kernel may choose otherwise than its
    fake, and what is a view of the one is none of the other."""
    value = node.meta["val"]
    return value.stride() == torch.empty(value.shape, device="meta").stride()


def _read_template(graph: fx.Graph, inputs: int, seeds: int, results: int) -> Template:
    """Drop detach nodes, find the outputs, and split nodes by what the results need."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _writes(node):
            raise RuntimeError(f"{node.target} writes to an operand")
        elif node.target is aten.view.default and not _contiguous(node.args[0]):
            node.target = aten.reshape.default
        node.target = _LAZY.get(node.target, node.target)
    graph.eliminate_dead_code()
    nodes = list(graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    graph.owning_module = None  # which has a class of its own: torch.fx sets attributes of all modules' classes whenever it traces
    flat = list(nodes[-1].args[0]) if isinstance(nodes[-1].args[0], tuple | list) else [nodes[-1].args[0]]
    outs, grads = flat[:results], flat[results:]
    calls = [n for n in nodes if n.op == "call_function"]
    forward = _closure(outs, calls)
    backward = _closure(grads, [n for n in calls if n not in forward])
    return Template(
        graph,
        tuple(placeholders[:inputs]),
        tuple(placeholders[inputs : inputs + seeds]),
        tuple(outs),
        tuple(grads),
        tuple(n for n in calls if n in forward),
        tuple(n for n in calls if n in backward),
    )


def differentiate(
    gm: fx.GraphModule, roots: Mapping[str, Seed], templates: Templates, *, wanted: Iterable[str] | None = None
) -> fx.GraphModule:
    """The joint graph of `gm`.

    gm.meta["outputs"]  the keys of its outputs
    roots               output keys to start from: seeded with 1 ("one": a scalar loss), or with a placeholder `grad.KEY`
                        that the graph gets for it ("input"). Empty: the forward alone.
    wanted              keys of placeholders to give gradients of; every one with meta["grad"] when left out
    """
    joint = _Joint(gm, templates)
    for node in gm.graph.nodes:
        joint.forward(node)
    joint.seed(roots)
    if roots:
        for node in reversed(gm.graph.nodes):
            joint.backward(node)
    return joint.finish(None if wanted is None else set(wanted))


class _Joint:
    def __init__(self, gm: fx.GraphModule, templates: Templates) -> None:
        self.gm, self.templates, self.values = gm, templates, templates.values
        self.keys: tuple[str, ...] = gm.meta["outputs"]
        self.calls = op_calls(gm)
        self.found: dict[Any, Template] = {}  # by identity: identical blocks share calls and values
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}
        self.inner: dict[fx.Node, tuple[Any, ...]] = {}
        self.cotangents: dict[tuple[fx.Node, int], fx.Node] = {}
        self.gradients: list[tuple[str, fx.Node]] = []
        self.flows: set[fx.Node] = set()
        self.live = self._useful()

    def _useful(self) -> set[fx.Node]:
        """Nodes that the outputs need."""
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        found: set[fx.Node] = set()
        stack = list(output.all_input_nodes)
        while stack:
            n = stack.pop()
            if n not in found:
                found.add(n)
                stack.extend(n.all_input_nodes)
        return found

    def mark(self, made: fx.Node, origin: fx.Node, phase: str) -> fx.Node:
        types = made.meta.get("types")
        copy_facts(origin, made)
        made.meta.pop("key", None)
        made.meta["phase"] = phase
        if phase == "backward" or types is not None:
            made.meta["types"] = types or {}
        made.meta["calls"] = {}
        return made

    def forward(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            made = copy_facts(node, self.graph.placeholder(node.name))
            made.meta["val"], made.meta["phase"] = node.meta["val"], "forward"
            self.new[node] = made
            if node.meta.get("grad"):
                self.flows.add(node)
        elif node.op == "output" or node not in self.live:
            return
        elif is_getitem(node):
            source, k = node.args
            self.new[node] = self.new[source][k]  # type: ignore[index]
            self._flow(node)
        elif node.target is convert:
            source, axis, src, dst = node.args
            made = self.new[source]  # type: ignore[index]
            for op, args in forward_ops(axis, src, dst):  # type: ignore[arg-type]
                made = self.mark(call(self.graph, self.values, op, (made, *args)), node, "forward")
            self.new[node] = made
            self._flow(node)
        else:
            self._flow(node)
            self._forward_op(node)

    def _flow(self, node: fx.Node) -> None:
        if node.meta.get("grad", True) and any(n in self.flows for n in node.all_input_nodes):
            self.flows.add(node)

    def _forward_op(self, node: fx.Node) -> None:
        _, sources = self.calls[node]
        results = node.meta["val"]
        several = isinstance(results, tuple | list)
        results = results if several else (results,)
        flows = node in self.flows
        wants = tuple(flows and s in self.flows and has_derivatives(s.meta["val"].dtype) for s in sources)
        used = {int(str(u.args[1])) for u in node.users if is_getitem(u) and u in self.live} if several else {0}
        tangents = tuple(any(wants) and k in used and has_derivatives(r.dtype) for k, r in enumerate(results))
        # A cotangent is taken to be contiguous until it is known; `_backward_op` looks again.
        assumed = [self.values.tensor(tuple(r.shape), r.dtype) if t else None for r, t in zip(results, tangents, strict=True)]
        inputs = [self.new[s].meta["val"] for s in sources]
        template = self._template(node, inputs, wants, assumed)
        place: dict[fx.Node, Any] = dict(zip(template.tensors, (self.new[s] for s in sources), strict=True))
        self._copy(template.forward, place, node, "forward")
        made = tuple(place[r] if isinstance(r, fx.Node) else r for r in template.results)
        self.inner[node] = (template, place, wants, assumed)
        self.new[node] = made if several else made[0]
        types = node.meta.get("types", {})
        for k, (r, m) in enumerate(zip(template.results, made, strict=True)):
            if isinstance(m, fx.Node) and r in template.forward:
                m.meta["types"] = {axis: t[k] if isinstance(t, tuple) else t for axis, t in types.items()}

    def _template(self, node: fx.Node, inputs: Sequence[Any], wants: tuple[bool, ...], tangents: Sequence[Any]) -> Template:
        key = (id(self.calls[node][0]), *map(id, inputs), wants, *map(id, tangents))
        if key not in self.found:
            self.found[key] = self.templates.of(node, inputs, wants, tangents)
        return self.found[key]

    def _copy(self, nodes: Iterable[fx.Node], place: dict[fx.Node, Any], origin: fx.Node, phase: str) -> None:
        for n in nodes:
            source = place[n.args[0]] if is_getitem(n) else None  # type: ignore[index]
            taken = source is not None and source.meta["phase"] == "forward"  # there: the forward keeps it, and not all results
            with self.graph.inserting_after(source) if taken else nullcontext():
                made = copy_call(self.graph, n, place)
            made.meta.update(val=n.meta.get("val"), types={})  # the call's types are those of its results alone
            place[n] = self.mark(made, origin, "forward" if taken else phase)

    def seed(self, roots: Mapping[str, Seed]) -> None:
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        for key, result in zip(self.keys, output.args[0], strict=True):  # type: ignore[arg-type]
            if key not in roots or not result.meta.get("grad") or (roots[key] == "one" and result not in self.flows):
                continue
            if roots[key] == "one":
                value = result.meta["val"]
                made = call(self.graph, self.values, aten.ones.default, (list(value.shape),), {"dtype": value.dtype})
            else:
                first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
                with self.graph.inserting_before(first) if first is not None else nullcontext():
                    made = self.graph.placeholder("grad_" + result.name)
                made.meta["val"] = self.values.tensor(tuple(result.meta["val"].shape), result.meta["val"].dtype)
            self.mark(made, result, "backward")
            made.meta["types"] = _gradient_types(result, 0)
            if roots[key] == "input":
                made.meta["key"] = f"grad.{key}"
            self.add_cotangent(result, made)

    def add_cotangent(self, node: fx.Node, made: fx.Node) -> None:
        """What flows into a value is added to what did before: nothing waits."""
        maker, k = result_of(node)
        before = self.cotangents.get((maker, k))
        if before is not None:
            made = self.mark(call(self.graph, self.values, aten.add.Tensor, (before, made)), maker, "backward")
            made.meta["types"] = _gradient_types(maker, k)
        self.cotangents[maker, k] = made

    def cotangent(self, node: fx.Node, k: int = 0) -> fx.Node | None:
        """The sum of what flowed into result k of a node."""
        return self.cotangents.get((node, k))

    def backward(self, node: fx.Node) -> None:
        if node not in self.flows or is_getitem(node) or (node.op != "placeholder" and node not in self.live):
            return
        if node.op == "placeholder":
            total = self.cotangent(node)
            if total is None and node.meta["key"].startswith("act."):
                # The stage before waits for a gradient of every differentiable activation it sent.
                total = self.mark(call(self.graph, self.values, aten.zeros_like.default, (self.new[node],)), node, "backward")
            if total is not None:
                self.gradients.append((f"grad.{node.meta['key']}", total))
        elif node.target is convert:
            total = self.cotangent(node)
            if total is None:
                return
            source, axis, src, dst = node.args
            for op, args in backward_ops(axis, src, dst):  # type: ignore[arg-type]
                total = self.mark(call(self.graph, self.values, op, (total, *args)), node, "backward")
            if total.meta.get("phase") == "backward" and backward_ops(axis, src, dst):  # type: ignore[arg-type]
                total.meta["types"] = _gradient_types(source, 0)  # type: ignore[arg-type]
            self.add_cotangent(source, total)  # type: ignore[arg-type]
        else:
            self._backward_op(node)

    def _backward_op(self, node: fx.Node) -> None:
        template, place, wants, assumed = self.inner[node]
        cotangents = [self.cotangent(node, k) for k in range(len(assumed))]
        if not any(c is not None for c in cotangents):
            return
        here = [None if c is None else c.meta["val"] for c in cotangents]
        if any(a is not b for a, b in zip(here, assumed, strict=True)) and describe(here) != describe(assumed):
            # Some results got no gradient, or one with other strides: the same forward, another backward.
            template, place = self._again(node, wants, here, template, place)
        place = dict(place)
        for tangent, c in zip(template.tangents, (c for c in cotangents if c is not None), strict=True):
            place[tangent] = c
        self._copy(template.backward, place, node, "backward")
        for source, grad in zip(self.calls[node][1], template.grads, strict=True):
            if isinstance(grad, fx.Node):
                made = place[grad]
                if made.op != "placeholder" and not made.meta.get("types"):
                    made.meta["types"] = _gradient_types(source, 0)
                self.add_cotangent(source, made)

    def _again(
        self, node: fx.Node, wants: tuple[bool, ...], cotangents: Sequence[Any], old: Template, place: dict[fx.Node, Any]
    ) -> tuple[Template, dict[fx.Node, Any]]:
        inputs = [self.new[s].meta["val"] for s in self.calls[node][1]]
        template = self._template(node, inputs, wants, cotangents)
        matched = dict(zip(template.tensors, (place[t] for t in old.tensors), strict=True))
        if [n.target for n in old.forward] != [n.target for n in template.forward]:
            raise RuntimeError(f"{where(node)}: its forward depends on which of its results are differentiated")
        matched.update(zip(template.forward, (place[n] for n in old.forward), strict=True))
        return template, matched

    def finish(self, wanted: set[str] | None) -> fx.GraphModule:
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        gradients = [(k, n) for k, n in reversed(self.gradients) if wanted is None or k.removeprefix("grad.") in wanted]
        results = [self.new[n] for n in output.args[0]]  # type: ignore[union-attr]
        self.graph.output((*results, *(n for _, n in gradients)))
        joint = LazyGraphModule(torch.nn.Module(), self.graph)
        joint.meta["outputs"] = (*self.keys, *(k for k, _ in gradients))
        return joint


def _closure(results: Iterable[fx.Node | None], within: list[fx.Node]) -> set[fx.Node]:
    inside, found = set(within), set()
    stack = [r for r in results if isinstance(r, fx.Node)]
    while stack:
        n = stack.pop()
        if n in inside and n not in found:
            found.add(n)
            stack.extend(n.all_input_nodes)
    return found


def _gradient_types(node: fx.Node, k: int) -> dict[str, Type]:
    return {
        axis: gradient_type(t[k] if isinstance(t, tuple) else t) for axis, t in node.meta.get("types", {}).items() if t is not None
    }


__all__ = ["Seed", "Template", "Templates", "differentiate"]
