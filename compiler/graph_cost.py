"""What a captured graph costs on one rank of a tensor axis, before anything is emitted: seconds, bytes held, bytes received."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..passes.convert import is_free
from ..passes.graph_tools import Calls, is_getitem, metas
from ..passes.partition import VIEWS
from ..passes.reshard import Ways, steps
from ..passes.rules.base import Axis, TensorMeta
from ..passes.rules.base import Strategy as NodeStrategy
from ..passes.types import I, R, Type
from ..runtime.program import Mesh
from .cost import Seconds, conversion_bytes, op_name, size_of
from .emit import Problem
from .keeping import Keeping, keeping, kept_bytes, largest_backward_bytes
from .place import Barred, Placement, Policy, place
from .prices import held, tensor_prices
from .topology import Topology, collective_bytes

VALUE_FREE = frozenset("add add_ sub rsub embedding embedding_shard select index_select".split())
"""Ops whose backward needs the value of no operand: a parameter that only they use is not gathered again for it."""

CASTS = frozenset({"_to_copy", "to"})


@dataclass(frozen=True)
class GraphCost:
    """A graph on one rank of a tensor axis, for one data rank's whole batch, forward and backward.

    compute, traffic        seconds
    activations             bytes that the forward keeps
    temporaries             bytes that the backward of the largest op holds beside these
    parameters              bytes held of all parameters; of these `trainable` have gradients, `read_again` are used in the backward
    received                bytes received over the tensor axis: of the batch, and of gradients summed once a step
    ops                     kernels of a forward and backward
    gap                     of the placement, see `Placement.gap`
    """

    compute: float
    traffic: float
    activations: float
    temporaries: float
    parameters: float
    trainable: float
    read_again: float
    received: float
    received_once: float
    ops: int
    gap: float = 0.0


def graph_cost(problem: Problem, mesh: Mesh, sequence: bool, topology: Topology, calls: Calls, kept: Keeping) -> GraphCost:
    """Place the graph over tp as emission would, and add up what every rank then does.

    mesh      of one axis, "tp", or none       calls, kept     `op_calls` of the graph, and `keeping` of these
    """
    placement = tensor_placement(problem, mesh, sequence, calls) if mesh.size("tp") > 1 else None
    return placed_cost(problem, mesh, placement, topology, calls, kept)


def tensor_placement(problem: Problem, mesh: Mesh, sequence: bool, calls: Calls, barred: Barred | None = None) -> Placement:
    """The placement over tp that emission makes; `barred` as `place` takes it."""
    policy = Policy("tensor", {}, problem.loss, scatter=sequence)
    return place(problem.graph, Axis("tp", mesh.size("tp")), policy, tensor_prices(sequence), calls, barred)


def placed_cost(
    problem: Problem, mesh: Mesh, placement: Placement | None, topology: Topology, calls: Calls, kept: Keeping | None = None
) -> GraphCost:
    """What every rank does under a placement over tp; None where there is no such axis.

    kept    `keeping(calls)`, where the caller has it
    """
    axis = Axis("tp", mesh.size("tp"))
    seconds = Seconds(topology, mesh)
    compute = 0.0
    known: dict[tuple[int, int], float] = {}
    for node, (call, _) in calls.items():
        strategy = placement.choice[node.name] if placement else None
        key = id(call), id(strategy)  # identical blocks share both objects
        if key not in known:
            strategy = strategy or NodeStrategy("whole", (I,) * len(call.operands), (I,) * len(call.results))
            known[key] = seconds.node(call, strategy, axis, ())
        compute += known[key]
    parameters = trainable = again = traffic = once = 0.0
    for node in problem.graph.graph.nodes:
        if node.op == "placeholder" and node.meta["key"].startswith("param."):
            meta, type_ = metas(node)[0], placement.placeholders[node.meta["key"]] if placement else I
            size = size_of(meta) * held(type_, axis)
            parameters += size
            trainable += size if meta.grad else 0.0
            again += size if read_again(node) else 0.0
            if placement and type_ == R and meta.grad:
                traffic += seconds.placeholder(type_, meta, axis)
                once += collective_bytes("all_reduce", size, axis.size)
    activations = kept_bytes(calls, kept or keeping(calls), placement, axis)
    temporaries = largest_backward_bytes(calls, placement, axis)
    received = 0.0
    if placement is not None:
        ways = seconds.ways(axis)
        traffic += sum(_priced(calls, placement, ways, lambda a, b, m: seconds.conversion(a, b, m, axis)))
        received = sum(_priced(calls, placement, ways, lambda a, b, m: conversion_bytes(a, b, size_of(m), axis.size, m.grad).total))
    ops, gap = 3 * len(calls), placement.gap if placement else 0.0
    return GraphCost(compute, traffic, activations, temporaries, parameters, trainable, again, received, once, ops, gap)


def read_again(parameter: fx.Node) -> bool:
    """Whether the backward needs the parameter's value: some user, views looked through, multiplies by it."""
    return any(
        read_again(user) if user.target in VIEWS or op_name(user.target) in CASTS else op_name(user.target) not in VALUE_FREE
        for user in parameter.users
        if user.op == "call_function"
    )


Price = Callable[[Type, Type, TensorMeta], float]


def _priced(calls: Calls, placement: Placement, ways: Ways, price: Price) -> Iterator[float]:
    """The prices of the conversions that operands need, each made once for a value and a type."""
    made: set[tuple[fx.Node, int, Type]] = set()
    known: dict[tuple[Type, Type, TensorMeta], float] = {}
    for node, (_, sources) in calls.items():
        for source, needed in zip(sources, placement.choice[node.name].ins, strict=True):
            have, k = produced(source, placement)
            if have is needed or (source, k, needed) in made:
                continue
            (meta,) = metas(source)
            if is_free(have, needed, meta.grad):
                continue
            made.add((source, k, needed))
            if (have, needed, meta) not in known:
                known[have, needed, meta] = sum(price(a, b, meta) for a, b in steps(have, needed, meta, ways))
            yield known[have, needed, meta]


def produced(node: fx.Node, placement: Placement) -> tuple[Type, int]:
    """The type of a value, and which of its node's results it is."""
    place: Any = node.args if is_getitem(node) else (node, 0)
    node, k = place
    if node.op == "placeholder":
        return placement.placeholders[node.meta["key"]], k
    return placement.choice[node.name].outs[k], k


def least_crossing(gm: fx.GraphModule) -> float:
    """Bytes of the residual stream: the most common size among differentiable values with the batch in them."""
    sizes = [size_of(metas(n)[0]) for n in gm.graph.nodes if n.op == "call_function" and n.meta.get("grad") and len(metas(n)) == 1]
    return float(max(set(sizes), key=sizes.count)) if sizes else 0.0
