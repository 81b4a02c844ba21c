"""Find the repeated blocks of a model in its graph, by structure alone.

A run is a piece of the node order that repeats m >= 2 times with period p: instance j holds the nodes
[start + j p, start + (j + 1) p). The instances are isomorphic: position by position the same op, static arguments, result
shapes and dtypes, and every operand is of one kind in all instances:

    internal    the same position of the same instance
    carried     the same position of the instance before (for the first instance: any value from outside, one per position)
    shared      one and the same value from before the run (a mask, rotary tables, an encoder's output)
    leaf        a placeholder or get_attr, each instance its own or a common one, tied within an instance in the same way

Of all rotations of a period, the one whose borders are crossed by the fewest bytes is taken: ideally the residual stream
alone. A first block that differs from the others stays outside the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from .graph_tools import node_bytes
from .ops.random import ops

_TRIES = 64
SITES: Mapping[Any, Sequence[int | str]] = {
    ops.chunked_attention.default: (9, "site"),
    ops.dropout.default: (3, "site"),
    ops.uniform.default: (1, "site"),
}
"""The number of a random op, by op: what may differ between instances."""


@dataclass(frozen=True)
class Run:
    """Isomorphic consecutive instances; all tuples are aligned position by position over instances.

    instances   per instance its nodes in order
    leaves      per instance the placeholders and get_attr nodes (parameters, buffers, inputs) it reads, by first use
    inputs      per instance the values computed outside it that it reads, by first use
    outputs     per instance its nodes that are read outside it, for the last instance at the positions of the others
    """

    instances: tuple[tuple[fx.Node, ...], ...]
    leaves: tuple[tuple[fx.Node, ...], ...]
    inputs: tuple[tuple[fx.Node, ...], ...]
    outputs: tuple[tuple[fx.Node, ...], ...]


@dataclass(frozen=True)
class Place:
    """Where a node stands: `Blocks.runs[run].instances[instance][position]`."""

    run: int
    instance: int
    position: int


@dataclass(frozen=True)
class Blocks:
    """Runs in node order, and the place of every node that is in one."""

    runs: tuple[Run, ...]
    instance_of: Mapping[fx.Node, Place] = field(repr=False)

    @property
    def count(self) -> int:
        return sum(len(run.instances) for run in self.runs)


def find_blocks(graph: fx.Graph, free_arguments: Mapping[Any, Sequence[int | str]] = SITES) -> Blocks:
    """The repeated blocks of `graph`, which is not changed.

    Requires `meta["val"]` on every node. `free_arguments` names, by op, static arguments (position or keyword) that may
    differ between instances.
    """
    table = _Table(graph, free_arguments)
    runs = [_describe(table, *found) for found in sorted(_search(table, 0, len(table.nodes)))]
    places = {
        node: Place(r, j, k)
        for r, run in enumerate(runs)
        for j, instance in enumerate(run.instances)
        for k, node in enumerate(instance)
    }
    return Blocks(tuple(runs), places)


def mark_blocks(gm: fx.GraphModule, free_arguments: Mapping[Any, Sequence[int | str]] = SITES) -> Blocks:
    """Set `meta["block"]` of every node to the running number of its block instance over the whole graph, or None."""
    blocks = find_blocks(gm.graph, free_arguments)
    first = np.cumsum([0, *(len(run.instances) for run in blocks.runs)])
    for node in gm.graph.nodes:
        place = blocks.instance_of.get(node)
        node.meta["block"] = None if place is None else int(first[place.run]) + place.instance
    return blocks


class _Table:
    """The graph as arrays over its computing nodes, in order.

    kind        [n] signature id: op, static arguments, metadata of result and operands
    refs        [n, k] operand's index; below 0 for placeholders and get_attr: first the leaves, then inputs, which count as
                values computed before everything; NONE beyond the last operand
    size        [n] bytes of the result        last_use    [n] index of the last reader (n: an output of the graph)
    """

    NONE = -(2**62)

    def __init__(self, graph: fx.Graph, free_arguments: Mapping[Any, Sequence[int | str]]):
        self.nodes = [node for node in graph.nodes if node.op in ("call_function", "call_method", "call_module")]
        self.leaves = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        self.leaves.sort(key=_is_value)
        self.leaf_count = sum(not _is_value(node) for node in self.leaves)
        index = {node: i for i, node in enumerate(self.nodes)} | {node: -1 - i for i, node in enumerate(self.leaves)}
        metas = {node: _meta(node) for node in graph.nodes}
        ids: dict[Any, int] = {}
        kinds, operands = [], []
        for node in self.nodes:
            free = free_arguments.get(node.target, ())
            found: list[fx.Node] = []
            args = tuple(None if i in free else _static(a, found) for i, a in enumerate(node.args))
            kwargs = tuple((k, None if k in free else _static(v, found)) for k, v in node.kwargs.items())
            signature = (node.op, node.target, args, kwargs, metas[node], tuple(metas[operand] for operand in found))
            kinds.append(ids.setdefault(signature, len(ids)))
            operands.append([index[operand] for operand in found])
        n, width = len(self.nodes), max(map(len, operands), default=0)
        self.kind = np.array(kinds, dtype=np.int64)
        self.refs = np.full((n, max(width, 1)), self.NONE, dtype=np.int64)
        for i, row in enumerate(operands):
            self.refs[i, : len(row)] = row
        self.size = np.array([node_bytes(node) for node in self.nodes], dtype=np.int64)
        self.last_use = np.array(
            [max((index.get(user, n) for user in node.users), default=-1) for node in self.nodes], dtype=np.int64
        )

    def is_leaf(self, refs: Any) -> Any:
        return (refs < 0) & (refs >= -self.leaf_count)

    def leaf(self, ref: int) -> fx.Node:
        return self.leaves[-1 - ref]


def _is_value(leaf: fx.Node) -> bool:
    """Whether a placeholder is computed or given anew each time, as opposed to a parameter, buffer or constant."""
    return str(leaf.meta.get("key", "")).split(".")[0] in ("input", "prologue", "act")


def _static(argument: Any, operands: list[fx.Node]) -> Any:
    """The argument, hashable, with nodes collected in `operands` and left out."""
    if isinstance(argument, fx.Node):
        operands.append(argument)
        return fx.Node
    if isinstance(argument, (list, tuple)):
        return tuple(_static(a, operands) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _static(v, operands)) for k, v in argument.items())
    if isinstance(argument, slice):
        return ("slice", *(_static(a, operands) for a in (argument.start, argument.stop, argument.step)))
    # 1, 1.0 and True are equal and hash alike, but not the same argument
    return (type(argument), str(argument) if isinstance(argument, float) else argument)


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    value = node.meta.get("val")
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, torch.Tensor):
            yield item


def _meta(node: fx.Node) -> tuple[Any, ...]:
    role = (
        str(node.meta.get("key", "")).split(".")[0] if node.op == "placeholder" and not _is_value(node) else node.op == "get_attr"
    )
    return (role, bool(node.meta.get("grad")), *((tuple(t.shape), t.dtype) for t in _tensors(node)))


def _search(table: _Table, low: int, high: int) -> list[tuple[int, int, int]]:
    """Disjoint runs (start, period, instances) among the nodes [low, high): the one that covers most, then both sides of it."""
    best: tuple[int, int, int] | None = None
    covered = 0
    for period in range(1, (high - low) // 2 + 1):
        same = table.kind[low + period : high] == table.kind[low : high - period]
        least = max(period, covered + 1 - period)
        if np.count_nonzero(same) < least:
            continue
        for begin, length in _stretches(same, least):
            if (length + period) // period * period <= covered:
                continue
            found = _best_rotation(table, low + begin, low + begin + length + period, period)
            if found is not None and found[2] * period > covered:
                best, covered = found, found[2] * period
    if best is None:
        return []
    start, period, count = best
    return [*_search(table, low, start), best, *_search(table, start + period * count, high)]


def _stretches(flags: np.ndarray, least: int) -> list[tuple[int, int]]:
    """(begin, length) of the stretches of True at least `least` long."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))).reshape(-1, 2)
    long = edges[edges[:, 1] - edges[:, 0] >= least]
    return [(begin, end - begin) for begin, end in long.tolist()]


def _best_rotation(table: _Table, begin: int, end: int, period: int) -> tuple[int, int, int] | None:
    """The best run of `period` among the nodes [begin, end), whose kinds repeat with it."""
    pairs = end - begin - period  # node i is paired with node i + period
    one, two = table.refs[begin : begin + pairs], table.refs[begin + period : end]
    broken = ~((two - one == period) | (two == one) | (table.is_leaf(one) & table.is_leaf(two))).all(1)
    next_broken = np.append(np.where(broken, np.arange(pairs), pairs), pairs)
    next_broken = np.minimum.accumulate(next_broken[::-1])[::-1]
    # The first instance may read its carried values from anywhere: its pairs may be broken, and `_is_run` decides.
    starts = np.arange(pairs - period + 1)
    before = np.cumsum(np.append(0, broken))
    starts = starts[(before[starts + period] == before[starts]) | (starts <= 2 * period)]
    counts = (next_broken[starts + period] + period - starts) // period
    starts += begin
    windows = starts[:, None] + np.arange(period)
    leaves_block = table.last_use[windows] >= starts[:, None] + period
    crossing = (table.size[windows] * leaves_block).sum(1)
    similar = np.round(np.log(crossing + 1.0) / np.log(1.1))  # an instance more is worth about 10 % more bytes
    for k in np.lexsort((-starts, ~leaves_block[:, -1], crossing, -counts, similar))[:_TRIES]:
        if _is_run(table, int(starts[k]), period, int(counts[k])):
            return int(starts[k]), period, int(counts[k])
    return None


def _is_run(table: _Table, start: int, period: int, count: int) -> bool:
    """Whether the instances are isomorphic, chained, and read a leaf: see the head of this file."""
    refs = table.refs[start : start + period * count].reshape(count, period, -1)
    base = start + period * np.arange(count)[:, None, None]
    first, second, leaf = refs[0], refs[1], table.is_leaf(refs[1])
    internal, shared = ~leaf & (second >= start + period), ~leaf & (second < start)
    carried = ~leaf & ~internal & ~shared
    aligned = refs - base == second - start - period
    if not (aligned[:, internal].all() and aligned[1:, carried].all() and (refs[:, shared] == second[shared]).all()):
        return False
    if not (carried.any() and leaf.any() and (first[carried] < start).all()):
        return False
    entries = set(zip(second[carried].tolist(), first[carried].tolist(), strict=True))
    if len(entries) != len({position for position, _ in entries}):
        return False
    if not _is_chained(second - start - period, internal, carried, {position - start for position, _ in entries}):
        return False
    ties = []
    for own in refs:
        _, index, inverse = np.unique(own[leaf], return_index=True, return_inverse=True)
        ties.append(index[inverse])
    return all(np.array_equal(tie, ties[0]) for tie in ties)


def _is_chained(local: np.ndarray, internal: np.ndarray, carried: np.ndarray, entries: set[int]) -> bool:
    """Whether something handed to the next instance depends on what came from the one before: not so for parallel branches.

    `local` [period, operands] are positions in the instance where `internal`; `entries` the positions handed on.
    """
    depends = np.asarray(carried.any(1))
    for i in np.flatnonzero(internal.any(1)):
        depends[i] |= depends[local[i][internal[i]]].any()
    return any(depends[position] for position in entries)


def _describe(table: _Table, start: int, period: int, count: int) -> Run:
    instances = [tuple(table.nodes[start + j * period : start + (j + 1) * period]) for j in range(count)]
    last_use = table.last_use[start : start + period * count].reshape(count, period)
    leaving = np.asarray((last_use >= start + period * np.arange(1, count + 1)[:, None]).any(0))
    leaves, inputs = [], []
    for j in range(count):
        refs = table.refs[start + j * period : start + (j + 1) * period].reshape(-1)
        own = dict.fromkeys(refs[(refs > table.NONE) & (refs < start + j * period)].tolist())
        leaves.append(tuple(table.leaf(ref) for ref in own if table.is_leaf(ref)))
        inputs.append(tuple(table.nodes[ref] if ref >= 0 else table.leaf(ref) for ref in own if not table.is_leaf(ref)))
    outputs = [tuple(node for node, leaves_it in zip(instance, leaving, strict=True) if leaves_it) for instance in instances]
    return Run(tuple(instances), tuple(leaves), tuple(inputs), tuple(outputs))
