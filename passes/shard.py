"""Lower a graph along one mesh axis: from what all ranks compute together to what one index of the axis runs.

Requires  every node's value in meta["val"]; a strategy for every call of an op; types for the placeholders.
Ensures   the new graph runs on local tensors; where the type a value has is not the one a use needs there is a
          `convert` node, one for each (value, type); meta["types"][axis] and meta["calls"][axis] say what was done,
          for the checker; local shapes agree with the types; meta["of"] names the value of the whole model that a node is a
          part of, on whichever rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from .convert import convert, exists, is_free, makes_whole
from .graph_tools import (
    Calls,
    LazyGraphModule,
    Values,
    call,
    copy_facts,
    is_getitem,
    is_parameter,
    metas,
    new_call,
    op_calls,
    place_operands,
    where,
)
from .reshard import Ways, ways_by_bytes
from .rules.base import Axis, LocalCall, Strategy, TensorMeta, localize, unsharded
from .types import I, Type, Varying, local_shape


class ShardingError(ValueError):
    """A strategy that cannot be applied: names the node, its source line, the axis and the types."""


def shard(
    gm: fx.GraphModule,
    axis: Axis,
    index: int,
    choice: Mapping[str, Strategy],
    placeholders: Mapping[str, Type],
    outputs: Mapping[int, Type],
    values: Values,
    calls: Calls | None = None,
    ways: Ways | None = None,
    twins: Mapping[str, str] | None = None,
) -> fx.GraphModule:
    """The graph of rank `index` of `axis`.

    choice          node name -> strategy, for every call_function but getitem
    placeholders    program key -> type; Invariant where absent
    outputs         position among the outputs -> the type it must leave with; as it comes where absent
    calls           `op_calls(gm)`, where the caller has it
    ways            how a value changes its type; by the fewest bytes where None
    twins           nodes that are placed alike, where these are fewer than gm.meta["twins"]
    """
    lowering = _Lowering(axis, index, values, op_calls(gm) if calls is None else calls, ways or ways_by_bytes(axis))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            lowering.placeholder(node, placeholders.get(node.meta["key"], I))
        elif node.op == "output":
            lowering.output(node, outputs)
        elif is_getitem(node):
            lowering.getitem(node)
        else:
            lowering.op(node, choice[node.name])
    result = LazyGraphModule(gm, lowering.graph)
    result.meta.update(gm.meta)
    alike: Mapping[str, str] = gm.meta.get("twins", {}) if twins is None else twins
    result.meta["twins"] = {**alike, **lowering.twins(alike)}
    return result


class _Lowering:
    def __init__(self, axis: Axis, index: int, values: Values, calls: Calls, ways: Ways) -> None:
        self.axis, self.index, self.values, self.calls, self.ways = axis, index, values, calls, ways
        self.graph = fx.Graph()
        # By identity: identical blocks share calls and strategies.
        self.local: dict[tuple[int, int], LocalCall] = {}
        self.local_values: dict[tuple[int, ...], Any] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.converted: dict[tuple[fx.Node, Type], fx.Node] = {}
        self.names: dict[str, list[tuple[str, str]]] = {}

    def type_of(self, node: fx.Node) -> Any:
        return node.meta["types"][self.axis.name]

    def part_of(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """A new node with the facts of the one it is of: meta["of"] stays the name of what was there before any axis."""
        copy_facts(node, made).meta.setdefault("of", node.name)
        return made

    def placeholder(self, node: fx.Node, type_: Type) -> None:
        made = self.part_of(node, self.graph.placeholder(node.name))
        (meta,) = metas(node)
        shape = local_shape(meta.shape, type_, self.index)
        made.meta["val"] = self.values.like(node.meta["val"]) if shape == meta.shape else self.values.tensor(shape, meta.dtype)
        made.meta["types"][self.axis.name] = type_
        self.new[node] = made

    def getitem(self, node: fx.Node) -> None:
        source, k = node.args
        made = self.part_of(node, call(self.graph, self.values, node.target, (self.new[source], k), name=node.name))  # type: ignore[index]
        made.meta["types"][self.axis.name] = self.type_of(self.new[source])[k]  # type: ignore[index]
        self.new[node] = made

    def op(self, node: fx.Node, strategy: Strategy) -> None:
        op, sources = self.calls[node]
        operands = tuple(self.as_type(self.new[s], t, node) for s, t in zip(sources, strategy.ins, strict=True))
        key = id(op), id(strategy)
        if key not in self.local:
            self.local[key] = localize(op, strategy, self.index)
        target, args, kwargs = self.local[key]
        args, kwargs = place_operands(args, operands), place_operands(kwargs, operands)
        made = new_call(self.graph, target, args, kwargs, node.name)
        full_key = *key, *(id(o.meta["val"]) for o in operands)
        if full_key not in self.local_values:
            made.meta["val"] = self.values.of(target, made.args, made.kwargs)
            self.check_shapes(node, made, strategy)
            self.local_values[full_key] = made.meta["val"]
        made.meta["val"] = self.local_values[full_key]
        self.part_of(node, made)
        made.meta["types"][self.axis.name] = strategy.outs if isinstance(node.meta["val"], tuple | list) else strategy.outs[0]
        made.meta["calls"][self.axis.name] = (op, strategy)
        self.new[node] = made

    def check_shapes(self, node: fx.Node, made: fx.Node, strategy: Strategy) -> None:
        for before, after, type_ in zip(metas(node), metas(made), strategy.outs, strict=True):
            expected = local_shape(before.shape, type_, self.index)
            if after.shape != expected:
                raise ShardingError(
                    f"{where(node)}: under strategy {strategy.label!r} over axis {self.axis.name!r} the local result has shape "
                    f"{after.shape}, where {type_} of {before.shape} is {expected}; the sharding rule of the op is wrong"
                )

    def as_type(self, node: fx.Node, needed: Type, user: fx.Node) -> fx.Node:
        """`node`, converted where its type is another."""
        have = self.type_of(node)
        grad = bool(node.meta.get("grad"))
        if is_free(have, needed, grad):
            return node
        if not exists(have, needed, grad):
            raise ShardingError(
                f"{where(user)} needs {needed} over axis {self.axis.name!r} of a value that is {have} ({where(node)}): "
                f"there is no conversion {have} -> {needed}"
            )
        source = node
        meta = unsharded(TensorMeta(tuple(node.meta["val"].shape), node.meta["val"].dtype, grad), have)
        for type_ in self.ways(have, needed, meta):
            source = self.converted_from(source, node, type_, user)
        return source

    def converted_from(self, source: fx.Node, node: fx.Node, needed: Type, user: fx.Node) -> fx.Node:
        """`node` as `needed`, by one conversion of `source`, which is itself on the way there."""
        if (node, needed) not in self.converted:
            name = f"{node.name}_{self.axis.name}_{str(needed)[0]}{needed.dim if isinstance(needed, Varying) else ''}"
            made = call(self.graph, self.values, convert, (source, self.axis.name, self.type_of(source), needed), name=name)
            self.names.setdefault(node.name, []).append((name, made.name))
            copy_facts(node, made)
            made.meta.pop("key", None)
            made.meta["types"][self.axis.name] = needed
            made.meta["calls"] = {}
            if node.meta.get("block") != user.meta.get("block") and node.op == "placeholder":
                made.meta["block"] = user.meta.get("block")
                made.meta["module"] = user.meta.get("module")
            if is_parameter(source) and makes_whole(self.type_of(source), needed):
                made.meta["parameter"] = True  # gathered: the backward gathers it again (passes/partition.py)
            self.converted[node, needed] = made
        return self.converted[node, needed]

    def twins(self, known: Mapping[str, str]) -> dict[str, str]:
        """Conversions of values at the same place of identical blocks stand at the same place themselves."""
        made = {own for pairs in self.names.values() for _, own in pairs}
        found = {}
        for source, pairs in self.names.items():
            for wished, own in pairs:
                twin = known.get(source, source) + wished.removeprefix(source)
                if twin != own and twin in made:
                    found[own] = twin
        return found

    def output(self, node: fx.Node, needed: Mapping[int, Type]) -> None:
        results = [self.new[n] for n in node.args[0]]  # type: ignore[union-attr]
        for k, type_ in needed.items():
            results[k] = self.as_type(results[k], type_, node)
        made = self.graph.output(tuple(results))
        made.meta.update(node.meta)
