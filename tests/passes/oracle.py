"""spmd_types, a type checker by others, made to look at our sharded graphs: which type it gives a node where we give ours.

It knows the letters I, R, V and P of each axis, not which dim is cut. A graph is gone through node after node: an op of ATen is
called as the function of torch it is (on meta tensors, under its type checking mode; what it cannot call so, as something that is
linear in nothing), a conversion as the collective of its API. What it infers is noted where it differs from `node.meta["types"]`,
with which the next nodes go on, so that each difference is seen by itself.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Where the two do not agree over an axis: the op, the letters of its operands, ours and theirs of its result."""

    op: str
    operands: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.op}({self.operands}) is {self.ours}, to spmd_types {self.theirs}"


@contextmanager
def fake_mesh(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """A process group of one process that plays rank 0 of a mesh. Yields the group of each axis."""
    sizes = tuple(axis.size for axis in axes)
    dist.init_process_group(backend="fake", rank=0, world_size=math.prod(sizes), store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple(axis.name for axis in axes))
        with spmd.set_current_mesh(mesh), checker.typecheck():
            yield {axis.name: mesh.get_group(axis.name) for axis in axes}
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


def differences(gm: fx.GraphModule, *axes: Axis) -> Iterator[tuple[fx.Node, Difference]]:
    """All of a graph that is typed over these axes, in order."""
    with fake_mesh(axes) as groups:
        oracle = _Oracle(axes, groups)
        for node in gm.graph.nodes:
            if node.op == "output":
                yield from ((n, d) for n in node.args[0] for d in oracle.output(n))
            elif node.op == "call_function" and not is_getitem(node):
                yield from ((node, d) for d in oracle.node(node))


class _Oracle:
    def __init__(self, axes: Sequence[Axis], groups: Mapping[str, Any]) -> None:
        self.axes, self.groups = axes, groups

    def types_of(self, node: fx.Node) -> dict[str, Any]:
        if is_getitem(node):
            maker: Any = node.args[0]
            return {name: types[node.args[1]] for name, types in self.types_of(maker).items()}
        return {axis.name: node.meta["types"][axis.name] for axis in self.axes}

    def node(self, node: fx.Node) -> Iterator[Difference]:
        try:
            theirs = self.converted(node) if self.is_seen(node) else self.called(node)
        except spmd.SpmdTypeError:
            theirs = self.refused
        for axis in self.axes:
            mine, found = self.letters(node, axis), theirs[axis.name]
            if mine == found or (not node.meta.get("grad") and mine | found <= {"I", "R"}):
                continue  # where no gradient flows nothing tells I from R
            operands = " ".join("".join(sorted(self.letters(n, axis))) for n in node.all_input_nodes)
            yield Difference(name_of(node), operands, "/".join(sorted(mine)), "/".join(sorted(found)))

    def is_seen(self, node: fx.Node) -> bool:
        """Whether it is a conversion over axes that are typed here."""
        return node.target is convert and {*str(node.args[1]).split("+")} <= self.groups.keys()

    @property
    def refused(self) -> dict[str, set[str]]:
        return {axis.name: {REFUSED} for axis in self.axes}

    def letters(self, node: fx.Node, axis: Axis) -> set[str]:
        found = self.types_of(node)[axis.name]
        return {repr(letter(t)) for t in (found if isinstance(found, tuple) else (found,))}

    def typed(self, x: Tensor, types: Mapping[str, Type]) -> Tensor:
        return spmd.assert_type(x, {self.groups[name]: letter(type_) for name, type_ in types.items()})

    def read(self, values: Sequence[Any]) -> dict[str, set[str]]:
        return {name: {repr(spmd.get_axis_local_type(x, group)) for x in values} for name, group in self.groups.items()}

    def converted(self, node: fx.Node) -> dict[str, set[str]]:
        source, name, src, dst = node.args
        have: Any = source
        function, a, b = _conversion(src, dst)  # type: ignore[arg-type]
        size = math.prod(axis.size for axis in self.axes)
        probe = torch.empty(size, size).requires_grad_(bool(have.meta.get("grad")))
        value = self.typed(probe, self.types_of(have))
        try:
            for axis in str(name).split("+"):  # one collective over several is to the types one over each
                value = function(value, self.groups[axis], src=a, dst=b)
        except ValueError:  # there is no such conversion
            return self.refused
        return self.read([value])

    def called(self, node: fx.Node) -> dict[str, set[str]]:
        value = self.value_of

        args, kwargs = map_operands(tuple(node.args), value), map_operands(dict(node.kwargs), value)
        function = _function(node)
        try:
            found = function(*args, **kwargs)
        except (TypeError, RuntimeError, NotImplementedError, ValueError) as error:
            if isinstance(error, spmd.SpmdTypeError):
                raise
            found = stand_in(*map_operands(tuple(node.args), value), **map_operands(dict(node.kwargs), value))
        found = found if isinstance(found, tuple | list) else (found,)
        return self.read([t for t in found if isinstance(t, Tensor)])

    def value_of(self, node: fx.Node) -> Tensor:
        value = node.meta["val"]
        made = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return self.typed(made.requires_grad_(bool(node.meta.get("grad"))), self.types_of(node))

    def output(self, node: fx.Node) -> Iterator[Difference]:
        """Only I and P may begin a backward."""
        for type_ in self.types_of(node).values():
            if node.meta.get("grad") and isinstance(type_, Replicate):
                yield Difference("output", "R", "R", REFUSED)


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
