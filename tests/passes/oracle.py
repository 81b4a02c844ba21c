"""spmd_types, a type checker by others, made to look at our sharded graphs: which type it gives a node where we give ours.

It knows the letters I, R, V and P of an axis, not which dim is cut. A graph is gone through node after node: an op of ATen is
called as the function of torch it is (on meta tensors, under its type checking mode; what it cannot call so, as something that is
linear in nothing), a conversion as the collective of its API. What it infers is noted where it differs from `node.meta["types"]`,
with which the next nodes go on, so that each difference is seen by itself.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwright.passes.convert import convert
from shardwright.passes.graph_tools import is_getitem, map_operands
from shardwright.passes.rules.base import Axis
from shardwright.passes.types import Invariant, Partial, Replicate, Type, Varying

spmd: Any = importlib.import_module("spmd_types")  # whose names are not exported as pyright wants it
checker: Any = importlib.import_module("spmd_types.checker")

REFUSED = "refused"


@dataclass(frozen=True, order=True)
class Difference:
    """Where the two do not agree: the op, the letters of its operands, ours and theirs of its result."""

    op: str
    operands: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.op}({self.operands}) is {self.ours}, to spmd_types {self.theirs}"


@contextmanager
def fake_mesh(axis: Axis) -> Iterator[Any]:
    """A process group of one process that plays rank 0 of the axis. Yields the group."""
    dist.init_process_group(backend="fake", rank=0, world_size=axis.size, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (axis.size,), mesh_dim_names=(axis.name,))
        with spmd.set_current_mesh(mesh), checker.typecheck():
            yield mesh.get_group(axis.name)
    finally:
        dist.destroy_process_group()


def letter(type_: Type) -> Any:
    match type_:
        case Invariant():
            return spmd.I
        case Replicate():
            return spmd.R
        case Varying():
            return spmd.V
        case Partial():
            return spmd.P


def differences(gm: fx.GraphModule, axis: Axis) -> Iterator[tuple[fx.Node, Difference]]:
    """All of a typed graph, in order. `fake_mesh` must be there."""
    with fake_mesh(axis) as group:
        oracle = _Oracle(axis, group)
        for node in gm.graph.nodes:
            if node.op == "output":
                yield from ((n, d) for n in node.args[0] if (d := oracle.output(n)) is not None)
            elif node.op == "call_function" and not is_getitem(node):
                found = oracle.node(node)
                if found is not None:
                    yield node, found


class _Oracle:
    def __init__(self, axis: Axis, group: Any) -> None:
        self.axis, self.group = axis, group

    def type_of(self, node: fx.Node) -> Any:
        return node.meta["types"][self.axis.name]

    def node(self, node: fx.Node) -> Difference | None:
        try:
            if node.target is convert and node.args[1] == self.axis.name:
                theirs = self.converted(node)
            else:
                theirs = self.called(node)
        except spmd.SpmdTypeError:
            theirs = {REFUSED}
        mine = self.letters(node)
        if mine == theirs or (not node.meta.get("grad") and mine | theirs <= {"I", "R"}):
            return None  # where no gradient flows nothing tells I from R
        operands = " ".join("".join(sorted(self.letters(n))) for n in node.all_input_nodes)
        return Difference(name_of(node), operands, "/".join(sorted(mine)), "/".join(sorted(theirs)))

    def letters(self, node: fx.Node) -> set[str]:
        found = self.type_of(node)
        return {repr(letter(t)) for t in (found if isinstance(found, tuple) else (found,))}

    def probe(self, node: fx.Node, type_: Type) -> Tensor:
        """A small value of the type of `node`."""
        grad = bool(node.meta.get("grad"))
        return self.typed(torch.empty(self.axis.size, self.axis.size).requires_grad_(grad), type_)

    def typed(self, x: Tensor, type_: Type) -> Tensor:
        return spmd.assert_type(x, {self.group: letter(type_)})

    def read(self, x: Any) -> str:
        return repr(spmd.get_axis_local_type(x, self.group))

    def converted(self, node: fx.Node) -> set[str]:
        source, _, src, dst = node.args
        have: Any = source
        function, a, b = _conversion(src, dst)  # type: ignore[arg-type]
        try:
            return {self.read(function(self.probe(have, self.type_of(have)), self.group, src=a, dst=b))}
        except ValueError:  # there is no such conversion
            return {REFUSED}

    def called(self, node: fx.Node) -> set[str]:
        def value(n: fx.Node) -> Tensor:
            if is_getitem(n):
                maker, k = n.args
                return self.value_of(n, self.type_of(maker)[k])  # type: ignore[arg-type,index]
            return self.value_of(n, self.type_of(n))

        args, kwargs = map_operands(tuple(node.args), value), map_operands(dict(node.kwargs), value)
        function = _function(node)
        try:
            found = function(*args, **kwargs)
        except (TypeError, RuntimeError, NotImplementedError, ValueError) as error:
            if isinstance(error, spmd.SpmdTypeError):
                raise
            found = stand_in(*map_operands(tuple(node.args), value), **map_operands(dict(node.kwargs), value))
        found = found if isinstance(found, tuple | list) else (found,)
        return {self.read(t) for t in found if isinstance(t, Tensor)}

    def value_of(self, node: fx.Node, type_: Type) -> Tensor:
        value = node.meta["val"]
        made = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return self.typed(made.requires_grad_(bool(node.meta.get("grad"))), type_)

    def output(self, node: fx.Node) -> Difference | None:
        """Only I and P may begin a backward."""
        if node.meta.get("grad") and isinstance(self.type_of(node), Replicate):
            return Difference("output", "R", "R", REFUSED)
        return None


def _conversion(src: Type, dst: Type) -> tuple[Callable[..., Tensor], Any, Any]:
    def shape(t: Type) -> Any:
        return spmd.S(min(t.dim, 1)) if isinstance(t, Varying) else letter(t)

    match src, dst:
        case (Varying(), Varying()):
            return spmd.all_to_all, spmd.S(0), spmd.S(1)
        case (Varying(), _):
            function: Any = spmd.all_gather
        case (Partial(), Varying()):
            function = spmd.reduce_scatter
        case (Partial(), _):
            function = spmd.all_reduce
        case _:
            function = spmd.convert
    return function, shape(src), shape(dst)


def name_of(node: fx.Node) -> str:
    if node.target is convert:
        return "convert"
    return str(node.target).split(".")[1]


RENAMED: dict[str, Callable[..., Any]] = {
    "_to_copy": torch.Tensor.to,
    "slice": lambda x, dim=0, start=0, end=None, step=1: torch.narrow(x, dim, 0, max(1, x.shape[dim] // 2)),
    "split_with_sizes": torch.split,
    "_unsafe_view": torch.Tensor.view,
    "view": torch.Tensor.view,
    "expand": torch.Tensor.expand,
    "reshape": torch.reshape,
    "gelu": F.gelu,
    "linear": F.linear,
}
"""Functions of torch whose name or arguments are not those of the ATen op."""


def _function(node: fx.Node) -> Callable[..., Any]:
    """The function of torch that an op is, `stand_in` for an op of our own."""
    name = name_of(node)
    if not str(node.target).startswith("aten."):
        return stand_in
    return RENAMED.get(name) or getattr(torch, name, None) or getattr(F, name, None) or getattr(torch.Tensor, name, stand_in)


def stand_in(*args: Any, **kwargs: Any) -> Tensor:
    """Something of all its tensors that is linear in none of them."""
    found: list[Tensor] = []

    def note(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            for v in value:
                note(v)

    note((args, tuple(kwargs.values())))
    if not found:
        return torch.zeros(1)
    cells = [torch.sigmoid(x.flatten()[:1].to(torch.float64)) for x in found]
    return functools.reduce(torch.atan2, cells) if len(cells) > 1 else cells[0]
