"""What every pass needs of fx graphs: op calls of nodes, values of new nodes, copying with facts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx.node
from torch import fx

from ..compiler.torch_compat import FakeTensor, OpOverload, fake_mode
from ..runtime.program import value_bytes
from .convert import convert
from .ops.collectives import NAMESPACE, StaticCommunicator, current_communicator
from .rules.base import OpCall, Operand, TensorMeta, has_derivatives

aten = torch.ops.aten

COPIED_FACTS = ("source", "module", "block", "stage", "key", "grad", "parameter", "of")


class LazyGraphModule(fx.GraphModule):
    """A graph module whose Python code is made when it is first run or printed: most graphs are steps on the way to others."""

    def recompile(self) -> Any:
        if "forward" in vars(type(self)):  # torch.fx makes a class for each instance
            del type(self).forward

    def forward(self, *args: Any) -> Any:
        super().recompile()
        return self(*args)

    @property
    def code(self) -> str:
        super().recompile()
        return super().code

    def __reduce__(self) -> Any:
        return fx.GraphModule(self, self.graph).__reduce__()


def is_tensor_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def metas(node: fx.Node) -> tuple[TensorMeta, ...]:
    """The tensors a node gives: one, or several for a tuple."""
    value = node.meta["val"]
    grad = bool(node.meta.get("grad", False))
    if isinstance(value, tuple | list):
        return tuple(_meta(v, grad) for v in value)
    return (_meta(value, grad),)


def _meta(value: torch.Tensor, grad: bool) -> TensorMeta:
    dtype = value.dtype
    return TensorMeta(tuple(value.shape), dtype, grad and has_derivatives(dtype))


def map_operands(value: Any, visit: Callable[[Any], Any]) -> Any:
    """`value` with every fx.Node or Operand in it replaced by visit(it)."""
    if isinstance(value, fx.Node | Operand):
        return visit(value)
    if isinstance(value, tuple | list):
        return type(value)(map_operands(v, visit) for v in value)
    if isinstance(value, dict):
        return {k: map_operands(v, visit) for k, v in value.items()}
    return value


VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.detach.default,
        aten.alias.default,
        aten.as_strided.default,
    }
)


OF_PARAMETERS = VIEWS | {aten._to_copy.default, aten.reshape.default}
"""What leaves a parameter one: views and casts."""


def is_parameter(node: fx.Node, through: Collection[Any] = ()) -> bool:
    """Whether a value is a parameter, or a view or a cast of one; or what calls of `through` make of these."""
    while (
        node.op == "call_function" and len(node.all_input_nodes) == 1 and (node.target in OF_PARAMETERS or node.target in through)
    ):
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and node.meta["key"].startswith("param.")


def op_call(node: fx.Node) -> tuple[OpCall, tuple[fx.Node, ...]]:
    """A call_function node as the rules see it, and the nodes behind its operands (a node used twice comes twice)."""
    found: list[fx.Node] = []

    def visit(n: fx.Node) -> Operand:
        found.append(n)
        return Operand(len(found) - 1)

    args = map_operands(tuple(node.args), visit)
    kwargs = map_operands(dict(node.kwargs), visit)
    operands = tuple(metas(n)[0] if not isinstance(n.meta["val"], tuple | list) else None for n in found)
    call = OpCall(node.target, args, kwargs, operands, metas(node))  # type: ignore[arg-type]
    return call, tuple(found)


Calls = Mapping[fx.Node, tuple[OpCall, tuple[fx.Node, ...]]]


def op_calls(gm: fx.GraphModule) -> Calls:
    """`op_call` of every call of an op but getitem. Equal calls at the same place of identical blocks (gm.meta["twins"]) are one
    `OpCall` object, so that what follows from a call alone need be found out once."""
    twins: Mapping[str, str] = gm.meta.get("twins", {})
    first: dict[str, fx.Node] = {}
    found: dict[fx.Node, tuple[OpCall, tuple[fx.Node, ...]]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        twin = first.setdefault(twins.get(node.name, node.name), node)
        sources = None if twin is node else _same_call(found[twin][0], twin, node)
        found[node] = op_call(node) if sources is None else (found[twin][0], sources)
    return found


def _same_call(call: OpCall, twin: fx.Node, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The operands of `node` if it is the same call as `twin`'s, `call`; else None."""
    own: list[fx.Node] = []
    others: list[fx.Node] = []
    if node.target is not twin.target or not _same((twin.args, twin.kwargs), (node.args, node.kwargs), others, own):
        return None
    return tuple(own) if _alike(twin, node) and all(map(_alike, others, own)) else None


def _same(one: Any, two: Any, ones: list[fx.Node], twos: list[fx.Node]) -> bool:
    """Whether arguments differ in nothing but their nodes, which are appended in order."""
    if isinstance(one, fx.Node):
        ones.append(one)
        twos.append(two)
        return isinstance(two, fx.Node)
    if isinstance(one, tuple | list):
        return (
            isinstance(two, tuple | list)
            and len(one) == len(two)
            and all(_same(a, b, ones, twos) for a, b in zip(one, two, strict=True))
        )
    if isinstance(one, dict):
        return isinstance(two, dict) and [*one] == [*two] and all(_same(v, two[k], ones, twos) for k, v in one.items())
    return type(one) is type(two) and one == two


def _alike(one: fx.Node, two: fx.Node) -> bool:
    """Whether rules see the same tensors in two nodes."""
    if one is two:
        return True
    same_value = one.meta["val"] is two.meta["val"] and one.meta.get("grad") == two.meta.get("grad")
    return same_value or metas(one) == metas(two)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments, of which the op says what each is."""
    return node.args


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def result_of(node: fx.Node) -> tuple[fx.Node, int]:
    """The node that makes a value, and which of its results it is."""
    return (node.args[0], int(node.args[1])) if is_getitem(node) else (node, 0)  # type: ignore[arg-type,return-value]


def place_operands(value: Any, nodes: tuple[fx.Node, ...]) -> Any:
    return map_operands(value, lambda o: nodes[o.index] if isinstance(o, Operand) else o)


class Values:
    """Values of nodes as fake tensors, each distinct op call computed once."""

    def __init__(self) -> None:
        self.mode = fake_mode()
        self._known: dict[Any, Any] = {}

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        key = ("tensor", tuple(shape), dtype)
        if key not in self._known:
            with self.mode:
                self._known[key] = torch.empty(shape, dtype=dtype)
        return self._known[key]

    def fresh(self, value: torch.Tensor, *, contiguous: bool = False) -> torch.Tensor:
        """A tensor like `value` that is no other node's: tracing tells tensors apart by identity."""
        with self.mode:
            if contiguous:
                return torch.empty(value.shape, dtype=value.dtype)
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    def like(self, value: Any) -> Any:
        """The same tensor (or tuple of them) in this object's mode."""
        if isinstance(value, tuple | list):
            return tuple(self.like(v) for v in value)
        key = ("like", tuple(value.shape), tuple(value.stride()), value.dtype)
        if key not in self._known:
            with self.mode:
                self._known[key] = torch.empty_strided(key[1], key[2], dtype=value.dtype)
        return self._known[key]

    def of(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The value of calling `target`; nodes among the arguments stand for their meta["val"]."""
        if target is operator.getitem:
            return args[0].meta["val"][args[1]]
        key = (target, describe(args), describe(dict(kwargs)), standing(target))
        if key not in self._known:
            real = map_operands((args, dict(kwargs)), lambda n: n.meta["val"])
            with self.mode, torch.no_grad():
                result = target(*real[0], **real[1])
            self._known[key] = tuple(result) if isinstance(result, tuple | list) else result
        return self._known[key]


def standing(target: Any) -> Any:
    """The rank's coordinates, for ops whose result depends on them; None for the others."""
    if target is convert or (isinstance(target, OpOverload) and target.namespace == NAMESPACE):
        here = current_communicator()
        if isinstance(here, StaticCommunicator):
            return tuple(here.sizes.items()), tuple(here.indices.items())
    return None


def describe(value: Any) -> Any:
    """A hashable description of arguments: nodes by the shape, strides and dtype of their value."""
    if isinstance(value, fx.Node):
        return describe(value.meta["val"])
    if isinstance(value, torch.Tensor | FakeTensor):
        return ("t", tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(describe(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, describe(v)) for k, v in sorted(value.items()))
    return (type(value).__name__, value)


def copy_facts(source: fx.Node, target: fx.Node) -> fx.Node:
    for fact in COPIED_FACTS:
        if fact in source.meta:
            target.meta[fact] = source.meta[fact]
    target.meta["types"] = dict(source.meta.get("types", {}))
    target.meta["calls"] = dict(source.meta.get("calls", {}))
    return target


def new_call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, name: str | None = None
) -> fx.Node:
    """A new call_function node. Its arguments are set last: `create_node` would look through them for symbolic sizes."""
    node = graph.create_node("call_function", target, name=name)
    node.args = args
    if kwargs:
        node.kwargs = dict(kwargs)
    return node


def copy_call(graph: fx.Graph, node: fx.Node, new: Mapping[fx.Node, Any]) -> fx.Node:
    """A call_function node of another graph, without its facts; `new` has the nodes to stand for its operands."""
    kwargs = torch.fx.node.map_arg(node.kwargs, new.__getitem__) if node.kwargs else None
    return new_call(graph, node.target, torch.fx.node.map_arg(node.args, new.__getitem__), kwargs, node.name)


def call(
    graph: fx.Graph,
    values: Values,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> fx.Node:
    """A new call_function node with its value."""
    node = new_call(graph, target, args, kwargs, name)
    node.meta["val"] = values.of(target, node.args, node.kwargs)
    return node


def where(node: fx.Node) -> str:
    """A node's place, for error messages."""
    source = node.meta.get("source")
    module = node.meta.get("module")
    place = f"node {node.name!r} ({node.target})"
    if module:
        place += f" in module {module!r}"
    return f"{place}, {source}" if source else place


def extract(gm: fx.GraphModule, results: Sequence[tuple[str, fx.Node]], given: Mapping[fx.Node, str]) -> fx.GraphModule:
    """The part of a graph that computes `results` (key, node), taking the nodes in `given` as placeholders of the given keys."""
    needed: set[fx.Node] = set()
    stack = [n for _, n in results]
    while stack:
        n = stack.pop()
        if n not in needed:
            needed.add(n)
            if n not in given:
                stack.extend(n.all_input_nodes)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for n in gm.graph.nodes:
        if n in needed and (n.op == "placeholder" or n in given):
            new[n] = graph.placeholder(n.name)
            new[n].meta.update(n.meta)
            new[n].meta["key"] = given.get(n) or n.meta["key"]
    for n in gm.graph.nodes:
        if n in needed and n not in new:
            new[n] = copy_call(graph, n, new)
            new[n].meta.update(n.meta)
    graph.output(tuple(new[n] for _, n in results))
    made = LazyGraphModule(torch.nn.Module(), graph)
    made.meta.update(gm.meta)
    made.meta["outputs"] = tuple(key for key, _ in results)
    return made


def node_bytes(node: fx.Node) -> int:
    """Bytes of what a node gives, 0 for what is no tensor."""
    return value_bytes(node.meta.get("val"))


def output_node(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "output")


def named_results(gm: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    """(key, node) of every output."""
    return list(zip(gm.meta["outputs"], output_node(gm).args[0], strict=True))  # type: ignore[arg-type]
