"""Graphs lowered by chance, along one or two axes, and run on all ranks: any valid strategy for an op, any type for a parameter.

Where `compiler.place` chooses what is cheap, this chooses what is possible, so that every rule and conversion meets every other.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from random_graphs import LOSS, Drawn
from torch import Tensor, fx
from typed_execution import Interpreter

from shardwright.compiler.check_rule import deal, join, suggested_cuts
from shardwright.passes.check import check
from shardwright.passes.convert import exists, is_free
from shardwright.passes.differentiate import Templates, differentiate
from shardwright.passes.graph_tools import Values, is_getitem, metas, named_results, op_calls
from shardwright.passes.ops import StaticCommunicator
from shardwright.passes.ops.collectives import use_communicator
from shardwright.passes.rules.base import Axis, Strategy, strategies
from shardwright.passes.shard import shard
from shardwright.passes.types import I, P, R, Type, Varying, even_sections, gradient_type
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.program import Mesh

Coordinates = tuple[int, ...]


@dataclass(frozen=True)
class Sharded:
    """A graph lowered along `axes`, at every coordinate of their mesh."""

    drawn: Drawn
    axes: tuple[Axis, ...]
    graphs: Mapping[Coordinates, fx.GraphModule]
    values: Values

    @property
    def mesh(self) -> Mesh:
        return Mesh(tuple(a.name for a in self.axes), tuple(a.size for a in self.axes))

    def at(self, coordinates: Coordinates) -> StaticCommunicator:
        names = [a.name for a in self.axes]
        return StaticCommunicator({a.name: a.size for a in self.axes}, dict(zip(names, coordinates, strict=True)))

    def changed(self, change: Callable[[fx.GraphModule, int], fx.GraphModule]) -> Sharded:
        """With `change(graph, index)` for the graph of each rank of a single axis."""
        made = {}
        for at, gm in self.graphs.items():
            with use_communicator(self.at(at)):
                made[at] = change(gm, at[0])
        return replace(self, graphs=made)

    def check(self, placeholders: Mapping[str, Type] | None = None) -> None:
        """Raises TypeCheckError. Of the last axis: those before were checked when graphs were lowered along them alone."""
        for at, gm in self.graphs.items():
            with use_communicator(self.at(at)):
                check(gm, self.axes[-1], at[-1], placeholders)


def lowered_at_random(drawn: Drawn, axes: Sequence[Axis], choose: random.Random) -> Sharded:
    """Each axis checked. What is chosen along a later axis is the same at all coordinates of those before."""
    graphs: dict[Coordinates, fx.GraphModule] = {(): drawn.graph}
    values = Values()
    for k, axis in enumerate(axes):
        picks = _picks(graphs, axis, choose, uneven=len(axes) == 1)
        made = {}
        for at, gm in graphs.items():
            for i in range(axis.size):
                sizes, here = {a.name: a.size for a in axes[: k + 1]}, (*at, i)
                with use_communicator(StaticCommunicator(sizes, dict(zip(sizes, here, strict=True)))):
                    made[here] = shard(gm, axis, i, picks.choice[at], picks.placeholders[at], picks.outputs[at], values)
                    check(made[here], axis, i, picks.placeholders[at])
        graphs = made
    return Sharded(drawn, tuple(axes), graphs, values)


class _Stuck(Exception):
    """An op that runs on Invariant values alone was given a Replicate one, which no conversion takes back."""


def _picks(graphs: Mapping[Coordinates, fx.GraphModule], axis: Axis, choose: random.Random, uneven: bool) -> _Picks:
    while True:
        try:
            return _Picks(graphs, axis, choose, uneven)
        except _Stuck:
            continue


class _Picks:
    """Strategies by chance along one axis, for the graphs at all coordinates of the axes before."""

    def __init__(self, graphs: Mapping[Coordinates, fx.GraphModule], axis: Axis, choose: random.Random, uneven: bool) -> None:
        self.axis, self.choose, self.uneven = axis, choose, uneven
        self.all = [*graphs]
        self.choice: dict[Coordinates, dict[str, Strategy]] = {at: {} for at in graphs}
        self.placeholders: dict[Coordinates, dict[str, Type]] = {at: {} for at in graphs}
        self.outputs: dict[Coordinates, dict[int, Type]] = {at: {} for at in graphs}
        self.types: dict[Coordinates, dict[str, tuple[Type, ...]]] = {at: {} for at in graphs}
        self.calls = {at: {n.name: c for n, c in op_calls(gm).items()} for at, gm in graphs.items()}
        for nodes in zip(*(gm.graph.nodes for gm in graphs.values()), strict=True):
            if nodes[0].op == "placeholder":
                self.placeholder(nodes)
            elif nodes[0].op == "output":
                self.output(nodes)
            elif not is_getitem(nodes[0]):
                self.op(nodes)

    def have(self, at: Coordinates, node: fx.Node) -> Type:
        source, k = (node.args[0], node.args[1]) if is_getitem(node) else (node, 0)
        return self.types[at][source.name][k]  # type: ignore[union-attr,index]

    def placeholder(self, nodes: Sequence[fx.Node]) -> None:
        n, grad = self.axis.size, bool(nodes[0].meta.get("grad"))
        offered: list[list[Type]] = [[I] * len(nodes), *([[R] * len(nodes)] if grad else [])]
        for dim in range(len(metas(nodes[0])[0].shape)):
            sizes = [metas(node)[0].shape[dim] for node in nodes]
            if min(sizes) >= n:
                offered.append([Varying(dim, even_sections(s, n)) for s in sizes])
            if self.uneven and len(set(sizes)) == 1:
                offered += [[Varying(dim, cut)] * len(nodes) for cut in suggested_cuts([sizes[0]], n)[0]]
        for at, node, type_ in zip(self.all, nodes, self.choose.choice(offered), strict=True):
            self.placeholders[at][node.meta["key"]] = type_
            self.types[at][node.name] = (type_,)

    def op(self, nodes: Sequence[fx.Node]) -> None:
        found = [self.possible(at, node) for at, node in zip(self.all, nodes, strict=True)]
        labels = [label for label in found[0] if all(label in other for other in found)]
        if not labels:
            raise _Stuck()
        sharded = [label for label in labels if label not in ("I'1", "R'1")]
        label = self.choose.choice(sharded if sharded and self.choose.random() < 0.75 else labels)
        partial = [label for label in labels if label.startswith("P'")]
        if partial and self.choose.random() < 0.4:
            label = self.choose.choice(partial)  # what is Partial once stays so for a while
        for at, node, options in zip(self.all, nodes, found, strict=True):
            self.choice[at][node.name] = options[label]
            self.types[at][node.name] = options[label].outs

    def possible(self, at: Coordinates, node: fx.Node) -> dict[str, Strategy]:
        """By label, the strategies whose operands can be had."""
        call, sources = self.calls[at][node.name]
        have = [self.have(at, s) for s in sources]
        splits: dict[tuple[str, int, int], list[Any]] = {}
        for i, type_ in enumerate(have):
            if isinstance(type_, Varying):
                splits["in", i, type_.dim] = [type_.sections]
        found: dict[str, Strategy] = {}
        labels: Counter[str] = Counter()
        for s in strategies(call, self.axis, splits):
            labels[s.label] += 1
            if all(_converts(a, b, m.grad) for a, b, m in zip(have, s.ins, call.operands, strict=True)):
                found[f"{s.label}'{labels[s.label]}"] = s  # an op that is linear in each operand has a "P" for each
        return found

    def output(self, nodes: Sequence[fx.Node]) -> None:
        for at, node in zip(self.all, nodes, strict=True):
            for k, result in enumerate(node.args[0]):  # type: ignore[arg-type]
                have, grad = self.have(at, result), bool(result.meta.get("grad"))  # type: ignore[arg-type,union-attr]
                if have == R and grad:
                    self.outputs[at][k] = P
                elif have == P and len(self.all) % 2:
                    self.outputs[at][k] = I


def _converts(have: Type, need: Type, grad: bool) -> bool:
    return is_free(have, need, grad) or exists(have, need, grad)


RELATIVE, OF_LARGEST = 1e-9, 1e-12


def error_of(sharded: Sharded, joint: bool = False) -> float:
    """How far the ranks are from one device in results and gradients: 1.0 is as far as rounding may take them.

    joint    run the forward and backward that the compiler emits, in place of autograd over the typed graph
    """
    drawn, generator = sharded.drawn, torch.Generator().manual_seed(3)
    held = {key: _dealt(sharded, key, whole, generator) for key, whole in drawn.inputs.items()}
    graphs = {at: _differentiated(sharded, at) for at in sharded.graphs} if joint else sharded.graphs
    ranks, run = [*sharded.graphs], _run_joint if joint else _run_typed

    def body(rank: int, world: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with use_communicator(world.communicator(sharded.mesh, rank)):
            gm = graphs[ranks[rank]]
            keys = [n.meta["key"] for n in gm.graph.nodes if n.op == "placeholder"]
            return run(gm, keys, [held[key][ranks[rank]] for key in keys])

    found = dict(zip(ranks, run_ranks(len(ranks), body), strict=True))
    worst = 0.0
    for key, expected in drawn.results.items():
        parts = {at: results[key] for at, (results, _) in found.items()}
        worst = max(worst, _far(_joined(sharded, parts, lambda gm, key=key: dict(named_results(gm))[key], _same), expected, 1.0))
    largest = max((float(g.abs().max()) for g in drawn.gradients.values()), default=0.0)
    for key, expected in drawn.gradients.items():
        parts = {at: gradients[key] for at, (_, gradients) in found.items() if key in gradients}
        if not parts:
            worst = max(worst, _far(torch.zeros_like(expected), expected, largest))
            continue
        got = _joined(sharded, parts, lambda gm, key=key: _placeholder(gm, key), gradient_type)
        worst = max(worst, _far(got, expected, largest))
    return worst


def _same(type_: Type) -> Type:
    return type_


def _far(got: Tensor, expected: Tensor, largest: float) -> float:
    if got.shape != expected.shape:
        return float("inf")
    bound = max(RELATIVE * float(expected.abs().max()), OF_LARGEST * largest, 1e-300) if expected.numel() else 1.0
    return float((got - expected).abs().max()) / bound if expected.numel() else 0.0


def _placeholder(gm: fx.GraphModule, key: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "placeholder" and n.meta["key"] == key)


def _dealt(sharded: Sharded, key: str, whole: Tensor, generator: torch.Generator) -> dict[Coordinates, Tensor]:
    held: dict[Coordinates, Tensor] = {(): whole}
    for k, axis in enumerate(sharded.axes):
        parts = {}
        for at, x in held.items():
            gm = next(g for c, g in sharded.graphs.items() if c[:k] == at)
            for i, part in enumerate(deal(x, _placeholder(gm, key).meta["types"][axis.name], axis.size, generator)):
                parts[*at, i] = part
        held = parts
    return held


def _joined(
    sharded: Sharded,
    parts: Mapping[Coordinates, Tensor],
    node_of: Callable[[fx.GraphModule], fx.Node],
    as_: Callable[[Type], Type],
) -> Tensor:
    for axis in reversed(sharded.axes):
        before = dict.fromkeys(at[:-1] for at in parts)
        joined = {}
        for at in before:
            gm = next(g for c, g in sharded.graphs.items() if c[: len(at)] == at)
            type_ = as_(node_of(gm).meta["types"][axis.name])
            joined[at] = join([parts[*at, i] for i in range(axis.size)], type_)
        parts = joined
    return parts[()]


def _run_typed(gm: fx.GraphModule, keys: Sequence[str], args: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    wants = [bool(n.meta.get("grad")) for n in gm.graph.nodes if n.op == "placeholder"]
    leaves = [x.clone().requires_grad_(w) for x, w in zip(args, wants, strict=True)]
    results = dict(zip(gm.meta["outputs"], Interpreter(gm).run(*leaves), strict=True))
    wanted = {k: x for k, x in zip(keys, leaves, strict=True) if x.requires_grad}
    found = torch.autograd.grad(results[LOSS], [*wanted.values()], allow_unused=True, materialize_grads=True)
    return {k: r.detach() for k, r in results.items()}, dict(zip(wanted, found, strict=True))


def _differentiated(sharded: Sharded, at: Coordinates) -> fx.GraphModule:
    with use_communicator(sharded.at(at)):
        return differentiate(sharded.graphs[at], {LOSS: "one"}, Templates(sharded.values))


def _run_joint(gm: fx.GraphModule, keys: Sequence[str], args: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.no_grad():
        found = dict(zip(gm.meta["outputs"], gm(*args), strict=True))
    gradients = {k.removeprefix("grad."): g for k, g in found.items() if k.startswith("grad.")}
    return {k: r for k, r in found.items() if not k.startswith("grad.")}, gradients
