"""The tree of a call: tensors by key, everything else as a hashable structure; and an output object rebuilt from tensors."""

from __future__ import annotations

import dataclasses
import enum
import types
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture_error import CaptureError


@dataclass(frozen=True)
class Slot:
    """Stands for the tensor `key`."""

    key: str


@dataclass(frozen=True)
class Constant:
    """A leaf that is no tensor. `token` distinguishes what Python calls equal (1, 1.0 and True)."""

    token: Hashable
    value: Any = dataclasses.field(compare=False)


@dataclass(frozen=True)
class Branch:
    """A container: "list", "tuple", "namedtuple", "mapping" or "dataclass" of `type`, its children named by `names`."""

    kind: str
    type: type
    names: tuple[Hashable, ...]
    children: tuple[Tree, ...]


Tree = Slot | Constant | Branch

PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    enum.Enum,
    range,
)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


def is_plain(value: Any) -> bool:
    """True of values without tensors or state in them, which may stand in a signature."""
    if isinstance(value, slice):
        return all(is_plain(v) for v in (value.start, value.stop, value.step))
    return isinstance(value, (*PLAIN, *FUNCTIONS))


def constant(value: Any) -> Constant:
    return Constant((type(value), repr(value) if isinstance(value, float | complex | slice) else value), value)


def children_of(value: Any) -> tuple[str, list[tuple[Hashable, Any]]] | None:
    """The kind and the named children of a container, or None for a leaf."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "dataclass", [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, torch.Size):
        return None
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        return ("namedtuple", list(zip(names, value, strict=True))) if names else ("tuple", list(enumerate(value)))
    if isinstance(value, list):
        return "list", list(enumerate(value))
    if isinstance(value, Mapping):
        return "mapping", list(value.items())
    return None


def describe(value: Any, path: str, leaf: Callable[[Any, str], Tree]) -> Tree:
    """The tree of `value`; `leaf(value, path)` decides what becomes of tensors and of leaves that are not plain."""
    found = children_of(value)
    if found is not None:
        kind, items = found
        children = tuple(describe(v, f"{path}.{name}" if path else str(name), leaf) for name, v in items)
        return Branch(kind, type(value), tuple(name for name, _ in items), children)
    if isinstance(value, torch.Size):
        return Constant((torch.Size, tuple(value)), value)
    if is_plain(value):
        return constant(value)
    return leaf(value, path)


def build(tree: Tree, values: Mapping[str, Any]) -> Any:
    """The object a tree describes, `values[key]` in place of every slot (None where the key is missing)."""
    if isinstance(tree, Slot):
        return values.get(tree.key)
    if isinstance(tree, Constant):
        return tree.value
    children = [build(child, values) for child in tree.children]
    named: dict[Any, Any] = dict(zip(tree.names, children, strict=True))
    match tree.kind:
        case "list" | "tuple":
            plain = list if tree.kind == "list" else tuple
            return plain(children) if tree.type is plain else tree.type(children)
        case "namedtuple":
            return tree.type(*children)
        case "mapping":
            return named if tree.type is dict else _build_mapping(tree.type, named)
        case _:
            return _build_dataclass(tree.type, named)


def path_of(tree: Tree, key: str) -> str | None:
    """Where a slot stands in a tree, as `past.0.keys`; "" for the whole, None if it is not there."""
    if isinstance(tree, Slot):
        return "" if tree.key == key else None
    if isinstance(tree, Constant):
        return None
    for name, child in zip(tree.names, tree.children, strict=True):
        found = path_of(child, key)
        if found is not None:
            return f"{name}.{found}".rstrip(".")
    return None


def _build_mapping(type_: type, named: dict[Any, Any]) -> Any:
    result = type_()
    for name, value in named.items():
        result[name] = value
    return result


def _build_dataclass(type_: type, named: dict[str, Any]) -> Any:
    fields = dataclasses.fields(type_)
    result = type_(**{f.name: named[f.name] for f in fields if f.init})
    for f in fields:
        if not f.init:
            object.__setattr__(result, f.name, named[f.name])
    return result


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tree, dict[str, Tensor]]:
    """The tree of a call and its tensors by key `input.PATH`; a tensor passed twice stands under both keys.

    Raises TypeError for an argument that is neither a tensor, a plain value nor a container of these.
    """
    tensors: dict[str, Tensor] = {}

    def leaf(value: Any, path: str) -> Tree:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"argument {path!r} is a {type(value).__module__}.{type(value).__qualname__}, "
                "whose value cannot be compared from call to call; "
                "pass tensors, numbers, strings, None, or lists, tuples, dicts and dataclasses of these"
            )
        key = f"input.{path}"
        while key in tensors:
            key += "_"
        tensors[key] = value
        return Slot(key)

    positional = describe(tuple(args), "", leaf)
    named = describe(dict(sorted(kwargs.items())), "", leaf)
    return Branch("tuple", tuple, (0, 1), (positional, named)), tensors


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for two calls exactly when one captured graph serves both: structure, constants, shapes, dtypes, requires_grad."""
    tree, tensors = flatten_call(args, kwargs)
    facts = tuple((key, tuple(t.shape), t.dtype, t.requires_grad) for key, t in tensors.items())
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return (tree, facts, autocast)


@dataclass(frozen=True)
class CallStructure:
    """How one captured call takes its inputs and gives its outputs.

    tree        the (args, kwargs) of the call, tensors as slots `input.PATH`
    keys        its tensors' keys in order
    signature   what `signature(args, kwargs)` was for the call
    output      the model's output, tensors as slots `out.K`
    """

    tree: Tree
    keys: tuple[str, ...]
    signature: Hashable
    output: Tree

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The call's tensors by key. Raises ValueError when the call is of another structure than the captured one."""
        tree, tensors = flatten_call(args, kwargs)
        if tree != self.tree:
            raise ValueError("the call has another structure, or other constants, than the captured one; capture it anew")
        return tensors

    def rebuild(self, values: Mapping[str, Any]) -> Any:
        """The model's output object from `out.K` values; a key that is missing gives None."""
        return build(self.output, values)

    def place_of(self, key: str) -> str:
        """Where an output stands in what the model returns."""
        return path_of(self.output, key) or key


def split_target(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The model's arguments and the target of the loss_fn. Raises CaptureError when the call has no target."""
    rest = dict(kwargs)
    if "target" in rest:
        return args, rest, rest.pop("target")
    if not args:
        raise CaptureError(
            "a loss_fn was given, but the call has no target", None, "pass target=..., or the target as last positional argument"
        )
    return args[:-1], rest, args[-1]


def describe_output(result: Any, warn: bool = True) -> tuple[Tree, list[Tensor]]:
    """The tree of an output object and its tensors, `out.K` in order. What is no tensor becomes None, with one warning."""
    found: list[Tensor] = []
    lost: list[str] = []

    def leaf(value: Any, path: str) -> Tree:
        if isinstance(value, Tensor):
            found.append(value)
            return Slot(f"out.{len(found) - 1}")
        lost.append(f"{path or 'output'} ({type(value).__name__})")
        return describe(None, path, leaf)

    tree = describe(result, "", leaf)
    if lost and warn:
        warnings.warn(f"outputs that are not tensors come back as None: {', '.join(lost)}", stacklevel=2)
    return tree, found
