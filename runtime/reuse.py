"""Which ops may write their result over an operand: less memory to hold, and to bring into the cache.

The operand is a value that nothing reads any more, in memory that an op of the graph has made, or that the forward made for this
backward alone (`donated`). What an op of a user's has seen is left alone.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..passes.ops import losses  # noqa: F401  (defines ops of the table)
from ..passes.ops.collectives import NAMESPACE, ops
from .program import GraphSpec, Key, RankProgram, value_bytes

aten = torch.ops.aten


@dataclass(frozen=True)
class InPlace:
    """How an op is called with memory for its result.

    callee, keyword     the function, and the argument that takes the memory
    operands            positions of the operands over which it may write
    """

    callee: str
    operands: tuple[int, ...] = (0, 1)
    keyword: str = "out"


def _rows() -> Iterable[tuple[object, InPlace]]:
    for name in ("abs", "cos", "exp", "exp2", "log", "neg", "reciprocal", "rsqrt", "sigmoid", "sin", "sqrt", "tanh"):
        yield getattr(aten, name).default, InPlace(f"torch.{name}", (0,))
    for name in ("add", "div", "mul", "sub"):
        yield getattr(aten, name).Tensor, InPlace(f"torch.{name}")
    yield aten.mul.Scalar, InPlace("torch.mul", (0,))
    yield aten.pow.Tensor_Scalar, InPlace("torch.pow", (0,))
    yield aten.maximum.default, InPlace("torch.maximum")
    yield aten.minimum.default, InPlace("torch.minimum")
    yield aten.addcmul.default, InPlace("torch.addcmul", (0, 1, 2))
    yield aten.addmm.default, InPlace("torch.addmm", (0,))
    for name in ("gelu_backward", "sigmoid_backward", "silu_backward", "tanh_backward"):
        yield getattr(aten, name).default, InPlace(f"torch.ops.aten.{name}.grad_input", keyword="grad_input")
    for name, operand in (("logsumexp_backward", 1), ("softmax_minus_onehot", 0), ("softmax_minus_onehot_shard", 0)):
        yield getattr(ops, name).default, InPlace(f"{NAMESPACE}.{name}.default", (operand,))  # called directly: our kernels take it


IN_PLACE: Mapping[object, InPlace] = dict(_rows())
"""Ops that read each element of an operand for the last time as they write it."""

_SILENT_VIEWS = frozenset(
    {aten._unsafe_view.default, aten.unsafe_chunk.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default}
)
"""Views whose schemas do not say so."""

_TOGETHER = frozenset({ops.all_gather_bucket.default, ops.reduce_scatter_bucket.default})
"""Ops whose results lie in one memory."""


def is_view(target: object) -> bool:
    """Whether an op says that its result may show the memory of its operands."""
    schema = getattr(target, "_schema", None)
    return schema is None or target in _SILENT_VIEWS or any(r.alias_info is not None for r in schema.returns)


def _is_foreign(target: object) -> bool:
    """Ops of users may give what they were given, whatever their schemas say: torch does not check all of them."""
    return target is not operator.getitem and getattr(target, "namespace", "") not in ("aten", NAMESPACE)


def owner(node: Node) -> Node:
    """The node that gives the memory which a value shows: the op that made it, or what takes it from an op of several results."""
    while node.op == "call_function" and node.all_input_nodes:
        if node.target is operator.getitem:
            if _is_apart(node):
                return _first_taken(node)
        elif not is_view(node.target):
            break
        node = node.all_input_nodes[0]
    return node


def makes_memory(node: Node) -> bool:
    """Whether what a node gives lies in memory of its own."""
    if node.op == "call_function" and node.target is operator.getitem:
        return _is_apart(node) and _first_taken(node) is node
    return node.op == "call_function" and not _is_foreign(node.target) and not is_view(node.target)


def _is_apart(taken: Node) -> bool:
    """Whether a result of several lies in memory that the others do not show."""
    source = taken.args[0]
    return isinstance(source, Node) and source.target not in _TOGETHER and makes_memory(source)


def _first_taken(taken: Node) -> Node:
    """The first node that takes the same result."""
    source, k = taken.args
    return next(user for user in source.users if user.target is operator.getitem and user.args[1] == k)  # type: ignore[union-attr]


def reused(nodes: Iterable[Node], given: Collection[Node] = ()) -> dict[Node, int]:
    """The position of the operand over which a node of a graph may write its result, for those that may.

    The operand is the last that anyone sees of its memory, which an op of the graph has made, or which is that of a placeholder in
    `given`; and it lies as the result would.
    """
    nodes = list(nodes)
    owners = {node: owner(node) for node in nodes}
    last: dict[Node, Node] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            last[owners[operand]] = node
    seen = lent(nodes)
    found: dict[Node, int] = {}
    for node in nodes:
        how = IN_PLACE.get(node.target)
        operands = [] if how is None or node.kwargs else [x if isinstance(x, Node) else None for x in node.args]
        for i in how.operands[: len(operands)] if how is not None else ():
            operand = operands[i]
            if operand is None or not _lie_alike(operand, node):
                continue
            memory = owners[operand]
            alone = all(x is None or k == i or owners[x] is not memory for k, x in enumerate(operands))
            free = memory not in seen and (memory in given or makes_memory(memory))
            if free and alone and last[memory] is node:
                found[node] = i
                break
    return found


def memories(nodes: Iterable[Node], over: Mapping[Node, int]) -> dict[Node, Node]:
    """By value, the node that took the memory in which it lies, where the nodes in `over` write over operands."""
    found: dict[Node, Node] = {}
    for node in nodes:
        source = node.args[over[node]] if node in over else owner(node)
        found[node] = node if source is node else found[source]  # type: ignore[index]
    return found


def last_reads(nodes: Iterable[Node], memory: Mapping[Node, Node]) -> dict[Node, int]:
    """By the node that took it (`memories`), the position of the last node that reads of a memory; none where nobody does."""
    return {memory[operand]: i for i, node in enumerate(nodes) for operand in node.all_input_nodes}


def held_bytes(nodes: Iterable[Node], last: Mapping[Node, int], counted: Collection[Node]) -> list[int]:
    """Bytes held while each node runs, of the memory that the nodes in `counted` took: from there to its last read; of results that
    are taken from an op, from that op on, and at least until all are taken."""
    nodes = list(nodes)
    change = [0] * (len(nodes) + 1)
    made = {node: i for i, node in enumerate(nodes)}
    for i, node in enumerate(nodes):
        if node not in counted:
            continue
        source, size, end = node, value_bytes(node.meta.get("val")), last.get(node, i)
        if node.target is operator.getitem:
            source = node.args[0]
            end = max(end, last.get(source, i))  # type: ignore[call-overload]
        else:  # what is taken counts by itself
            size -= sum(value_bytes(x.meta.get("val")) for x in node.users if x.target is operator.getitem and makes_memory(x))
        change[made[source]] += size  # type: ignore[index]
        change[end + 1] -= size
    return list(accumulate(change[:-1]))


def lent(nodes: Iterable[Node]) -> set[Node]:
    """Owners of memory that ops of users have seen."""
    foreign = (n for n in nodes if n.op == "call_function" and _is_foreign(n.target))
    return {owner(operand) for node in foreign for operand in node.all_input_nodes}


def _lie_alike(operand: Node, result: Node) -> bool:
    a, b = operand.meta.get("val"), result.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    marks = a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg()
    return marks and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def donated(program: RankProgram) -> dict[str, frozenset[int]]:
    """By graph, the positions of the inputs over which it may write: values that one graph saves for it alone, in memory of their
    own, once for each micro-batch."""
    runs = Counter((i.graph, i.microbatch) for i in program.schedule if i.kind == "run")
    readers: Counter[Key] = Counter(key for spec in program.graphs.values() for key in spec.inputs)
    readers.update(key for i in program.schedule for key in i.keys)
    owned = Counter(key for spec in program.graphs.values() for key in _own_outputs(spec))
    made = Counter(key for spec in program.graphs.values() for key in spec.outputs)
    repeated = {graph for (graph, _), count in runs.items() if count > 1}

    def free(key: Key) -> bool:
        return key.startswith("saved.") and owned[key] == made[key] == readers[key] == 1

    found = {name: frozenset(i for i, key in enumerate(spec.inputs) if free(key)) for name, spec in program.graphs.items()}
    return {name: places for name, places in found.items() if places and name not in repeated}


def _own_outputs(spec: GraphSpec) -> list[Key]:
    """Those that lie in memory that the graph has made and that no other output shows."""
    owners = [owner(n) if n is not None else None for n in result_nodes(spec.graph)]
    shown, seen = Counter(owners), lent(spec.graph.graph.nodes)
    return [
        key
        for key, memory in zip(spec.outputs, owners, strict=False)
        if memory is not None and shown[memory] == 1 and memory not in seen and makes_memory(memory)
    ]


def result_nodes(gm: GraphModule) -> list[Node | None]:
    """What a graph returns, None for what is no value of it. Of a saved program, which has its graphs as functions: nothing."""
    results: Any = next((n.args[0] for n in gm.graph.nodes if n.op == "output"), ())
    return [n if isinstance(n, Node) else None for n in results]


def placeholders_at(spec: GraphSpec, places: Collection[int]) -> set[Node]:
    """The placeholders at these positions among a graph's inputs."""
    nodes = (n for n in spec.graph.graph.nodes if n.op == "placeholder")
    return {node for i, node in enumerate(nodes) if i in places}
