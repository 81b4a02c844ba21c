"""Every way in which a typed graph is made wrong on purpose: conversions removed, swapped and retargeted, offsets and tables moved.

A mutation is a function on a copy of the graph, the same on every rank. Those that change nothing (an I where R would do, with
no gradient to tell them apart) are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardwright.passes.convert import convert, is_free
from shardwright.passes.graph_tools import extract, named_results
from shardwright.passes.rules.base import Axis
from shardwright.passes.types import I, P, R, Type, Varying, shard

aten = torch.ops.aten
ours = torch.ops.shardwright

Change = Callable[[fx.Graph, fx.Node], None]


@dataclass(frozen=True)
class Mutation:
    kind: str
    node: str
    what: str
    change: Change

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A changed copy of `gm`."""
        made = extract(gm, named_results(gm), {})
        self.change(made.graph, next(n for n in made.graph.nodes if n.name == self.node))
        made.recompile()
        return made

    def __str__(self) -> str:
        return f"{self.kind} at {self.node}: {self.what}"


def mutations(gm: fx.GraphModule, axis: Axis) -> Iterator[Mutation]:
    """All of them for the typed graph of one index of `axis`."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            if node.op == "placeholder":
                yield from _placeholder_mutations(node, axis)
        elif node.target is convert:
            yield from _conversion_mutations(node, axis)
        else:
            yield from _argument_mutations(node)
            yield from _operand_mutations(node)


def _conversion_mutations(node: fx.Node, axis: Axis) -> Iterator[Mutation]:
    source, name, src, dst = node.args
    grad, value = bool(source.meta.get("grad")), source.meta["val"]
    yield Mutation("remove conversion", node.name, f"{src} -> {dst}", lambda _, n: _bypass(n))
    yield Mutation("remove conversion and mark", node.name, f"the {src} operand as {dst}", lambda _, n: _bypass(n, marked=True))
    yield Mutation("swap types", node.name, f"{dst} -> {src}", lambda _, n: _retype(n, n.args[3], n.args[2], axis.name))
    yield Mutation("retarget axis", node.name, "another axis", lambda _, n: n.update_arg(1, f"other_{n.args[1]}"))
    whole = [*value.shape]
    if isinstance(src, Varying):
        whole[src.dim] = src.global_size
    for type_ in _other_types(whole, axis.size):
        if type_ != dst and not is_free(dst, type_, grad):
            yield Mutation(
                "retarget result", node.name, f"{src} -> {type_}", lambda _, n, t=type_: _retype(n, n.args[2], t, axis.name)
            )
        if type_ != src and not is_free(src, type_, grad):
            yield Mutation(
                "retarget source", node.name, f"{type_} -> {dst}", lambda _, n, t=type_: _retype(n, t, n.args[3], axis.name)
            )


def _other_types(shape: list[int], n: int) -> list[Type]:
    types: list[Type] = [I, R, P]
    for dim, size in enumerate(shape):
        if size >= n:
            types.append(shard(dim, size, n))
            types.append(Varying(dim, ((1,) * (n - 1) + (size - n + 1,),)))
        if size >= 2 * n and size % 2 == 0:
            types.append(Varying(dim, shard(dim, size // 2, n).sections * 2))
    return types


def _bypass(node: fx.Node, *, marked: bool = False) -> None:
    source = node.args[0]
    if marked:
        source.meta["types"] = node.meta["types"]
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _retype(node: fx.Node, src: Type, dst: Type, axis: str) -> None:
    node.args = (*node.args[:2], src, dst)
    node.meta["types"] = {**node.meta["types"], axis: dst}


def _placeholder_mutations(node: fx.Node, axis: Axis) -> Iterator[Mutation]:
    type_ = node.meta["types"][axis.name]
    for other in (I, R):
        if node.users and type_ in (I, R) and not is_free(type_, other, bool(node.meta.get("grad"))):
            yield Mutation("mark input", node.name, f"{other} for {type_}", lambda _, n, t=other: _mark(n, t, axis.name))


def _mark(node: fx.Node, type_: Type, axis: str) -> None:
    node.meta["types"] = {**node.meta["types"], axis: type_}


OFFSETS: dict[Any, tuple[str, tuple[int, ...]]] = {
    aten.slice.Tensor: ("slice bounds", (2, 3)),
    aten.select.int: ("selected index", (2,)),
    aten.arange.start: ("position offset", (0, 1)),
    ours.arange_shard.default: ("position offset", (0,)),
}
SIZES: dict[Any, int] = {
    ours.embedding_shard.default: 4,
    ours.gather_shard.default: 4,
    ours.grouped_linear_shard.default: 4,
    ours.pick_shard.default: 3,
    ours.arange_shard.default: 3,
    aten.split_with_sizes.default: 1,
}
SHAPES = {aten.reshape.default, aten.view.default, aten.expand.default}


def _argument_mutations(node: fx.Node) -> Iterator[Mutation]:
    args: Any = node.args
    target: Any = node.target
    if target in OFFSETS:
        kind, positions = OFFSETS[target]
        by = 1 if args[positions[0]] == 0 else -1
        moved = {k: args[k] + by for k in positions if isinstance(args[k], int)}
        yield Mutation(f"shift {kind}", node.name, f"by {by}", lambda _, n: _update(n, moved))
    if target in SIZES and len(set(args[SIZES[target]])) > 1:
        first, *rest = args[SIZES[target]]
        turned = {SIZES[target]: [*rest, first]}
        yield Mutation("turn shard sizes", node.name, "by one rank", lambda _, n: _update(n, turned))
    if target in SIZES and "axis" in str(target._schema):
        yield Mutation("retarget op's axis", node.name, "another axis", lambda _, n: _update(n, {SIZES[target] - 1: "other"}))
    if target in SHAPES:
        sizes = list(args[1])
        k = next((k for k in range(1, len(sizes)) if 1 < sizes[k - 1] != sizes[k] > 1), None)
        if k is not None:
            swapped = [*sizes[: k - 1], sizes[k], sizes[k - 1], *sizes[k + 1 :]]
            yield Mutation("turn local shape", node.name, f"{swapped} for {sizes}", lambda _, n: _update(n, {1: swapped}))
    if target is ours.attention.default:
        mask, causal, scale = args[3:6]
        yield Mutation("flip causal mask", node.name, f"{not causal}", lambda _, n: _update(n, {4: not causal}))
        yield Mutation("change attention scale", node.name, "by 1 %", lambda _, n: _update(n, {5: scale * 1.01}))
        if mask is not None:
            yield Mutation("drop mask", node.name, mask.name, lambda _, n: _update(n, {3: None}))


def _update(node: fx.Node, changes: Mapping[int, Any]) -> None:
    for k, value in changes.items():
        node.update_arg(k, value)


def _operand_mutations(node: fx.Node) -> Iterator[Mutation]:
    """A mask, a position table or ids that enter the differentiable part: another one of that shape taken, or turned around."""
    for k, operand in enumerate(node.args):
        if not isinstance(operand, fx.Node) or operand.meta.get("grad") or not node.meta.get("grad"):
            continue
        value = operand.meta["val"]
        if not value.is_floating_point() and value.dtype != torch.bool and "embedding" not in str(node.target):
            continue  # labels: what is not counted may point anywhere
        for other in node.graph.nodes:
            if other is node or other.op == "output":
                break
            if other in operand.all_input_nodes:
                continue  # half of a guard against labels that no test has
            if other is not operand and not other.meta.get("grad") and _alike(other.meta["val"], value) and other.users:
                what = f"{other.name} for {operand.name}"
                yield Mutation("take another table", node.name, what, lambda _, n, k=k, name=other.name: _take(n, k, name))
        if value.dim() and max(value.shape) > 1:
            yield Mutation("shift a table", node.name, f"{operand.name} by one position", lambda _, n, k=k: _roll(n, k))


def _alike(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _take(node: fx.Node, k: int, name: str) -> None:
    node.update_arg(k, next(n for n in node.graph.nodes if n.name == name))


def _roll(node: fx.Node, k: int) -> None:
    operand = node.args[k]
    dim = max(range(operand.meta["val"].dim()), key=lambda d: operand.meta["val"].shape[d])
    with node.graph.inserting_before(node):
        rolled = node.graph.call_function(aten.roll.default, (operand, [1], [dim]))
    rolled.meta = {k: v for k, v in operand.meta.items() if k != "key"}
    node.update_arg(k, rolled)
