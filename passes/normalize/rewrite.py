"""The engine of normalization: one walk over a graph, each op call rewritten by the rule of its op into calls of others.

A rule is `rule(b, *arguments, **keyword_only) -> result`: it gets every argument of the op's schema, defaults filled in and
dims non-negative, and builds its result with `b(op, ...)`, which is itself rewritten by the rules. It returns
NotImplemented to leave the call as it is. A result is a node, or a tuple of them for an op with several results.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...compiler.torch_compat import OpOverload
from ..graph_tools import LazyGraphModule, new_call
from .gradients import CUTS

aten = torch.ops.aten
FACTS = ("source", "module", "block", "stage")
Rule = Callable[..., Any]
Rules = Mapping[Any, Rule]


class Lazy:
    """A value that is known in another form than a node; `node(b)` computes it, for an op that wants the value itself.

    Calls with such a value among their arguments go to the rule under the key `Lazy` first.
    """

    @property
    def value(self) -> Any:
        """The fake tensor of the value."""
        raise TypeError(f"{type(self).__name__} has no value")

    def node(self, b: Builder) -> fx.Node:
        raise TypeError(f"{type(self).__name__} has no node")


class Builder:
    """Appends rewritten calls to `graph`, with the facts of the node `origin` that is being rewritten."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.graph = fx.Graph()
        self.origin: fx.Node | None = None
        self.mode: Any = None
        self.sites = 0
        self._values: dict[Any, Any] = {}
        self._computed: dict[Lazy, fx.Node] = {}
        self._seed: fx.Node | None = None

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """The call `target(*args, **kwargs)` in normal form: what its rule makes of it, or the call itself."""
        if target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple | list) else self.emit(target, *args)
        full_args, full_kwargs = bind(target, args, kwargs)
        full_args = wrap_dims(target, full_args)
        if any(isinstance(a, Lazy) for a in leaves((full_args, full_kwargs))):
            result = self.rules[Lazy](self, target, full_args, full_kwargs)
            if result is not NotImplemented:
                return result
            full_args, full_kwargs = map_leaves((full_args, full_kwargs), self.plain)
        rule = self.rules.get(target)
        if rule is None:
            rule = self.rules.get(None)
            result = rule(self, target, full_args, full_kwargs) if rule else NotImplemented
        else:
            result = rule(self, *full_args, **full_kwargs)
        return self.emit(target, *full_args, **full_kwargs) if result is NotImplemented else result

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The call itself, trailing default arguments left out, as a new node with its value."""
        args, kwargs = trim(target, args, kwargs)
        args = map_leaves(args, self.plain)
        kwargs = {k: map_leaves(v, self.plain) for k, v in kwargs.items()}
        name = target._schema.name.split("::")[1] if isinstance(target, OpOverload) else None
        node = new_call(self.graph, target, args, kwargs, name)
        node.meta["val"] = self._value(target, node)
        if self.origin is not None:
            node.meta.update({k: self.origin.meta[k] for k in FACTS if k in self.origin.meta})
        depends = target not in CUTS and any(n.meta.get("grad") for n in node.all_input_nodes)
        node.meta["grad"] = depends and is_floating(node.meta["val"])
        return node

    def plain(self, value: Any) -> Any:
        """A lazy value as a node, computed once; anything else as it is."""
        if not isinstance(value, Lazy):
            return value
        if value not in self._computed:
            self._computed[value] = value.node(self)
        return self._computed[value]

    def _value(self, target: Any, node: fx.Node) -> Any:
        if target is operator.getitem:
            return node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
        key = (target, _describe(node.args), _describe(node.kwargs))
        if key not in self._values:
            args, kwargs = map_leaves((node.args, node.kwargs), lambda n: n.meta["val"] if isinstance(n, fx.Node) else n)
            if self.mode is None:
                raise RuntimeError("a graph without inputs cannot be normalized")
            with self.mode, torch.no_grad():
                result = target(*args, **kwargs)
            self._values[key] = tuple(result) if isinstance(result, tuple | list) else result
        return self._values[key]

    def placeholder(self, node: fx.Node) -> fx.Node:
        copy = self.graph.placeholder(str(node.target))
        copy.name = node.name
        copy.meta = dict(node.meta)
        if self.mode is None:
            self.mode = getattr(node.meta["val"], "fake_mode", None)
        if node.meta.get("key") == "seed":
            self._seed = copy
        return copy

    def seed(self) -> fx.Node:
        """The graph's placeholder with key "seed", int64 []; added when there is none."""
        if self._seed is None:
            last = self.graph.find_nodes(op="placeholder")[-1]
            with self.graph.inserting_after(last), self.mode:
                self._seed = self.graph.placeholder("seed")
                self._seed.meta = {"key": "seed", "val": torch.empty((), dtype=torch.int64), "grad": False}
        return self._seed

    def site(self) -> int:
        """A number of its own for each random op."""
        self.sites += 1
        return self.sites - 1

    def scalar(self, value: float | bool, dtype: torch.dtype) -> fx.Node:
        """A 0-dim constant."""
        return self(aten.full.default, [], value, dtype=dtype)


def rewrite(gm: fx.GraphModule, rules: Rules) -> fx.GraphModule:
    """A new graph in which every call went through `rules` (None -> the rule of ops that have none). `gm` is not changed.

    Calls, and constants of the model (keys "const.*"), that are not used any more are dropped.
    """
    b = Builder(rules)
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        b.origin = node
        if node.op == "placeholder":
            env[node] = b.placeholder(node)
        elif node.op == "output":
            b.graph.output(map_leaves(node.args[0], lambda n: b.plain(env[n]) if isinstance(n, fx.Node) else n))
        elif node.op == "call_function":
            args, kwargs = map_leaves((node.args, node.kwargs), lambda n: env[n] if isinstance(n, fx.Node) else n)
            env[node] = b(node.target, *args, **kwargs)
        else:
            raise RuntimeError(f"a captured graph has calls of functions alone, not {node.op} ({node.name})")
    b.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    for node in b.graph.find_nodes(op="placeholder"):
        if not node.users and str(node.meta.get("key")).startswith("const."):
            b.graph.erase_node(node)
    return LazyGraphModule(torch.nn.Module(), b.graph)


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All arguments of the op's schema in order, and its keyword-only ones, defaults filled in."""
    if not isinstance(target, OpOverload):
        return tuple(args), dict(kwargs)
    positional, named = [], {}
    for k, argument in enumerate(target._schema.arguments):
        if not argument.kwarg_only and k < len(args):
            value = args[k]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            value = argument.default_value
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            positional.append(value)
    return tuple(positional), named


def trim(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inverse of `bind`: trailing positional defaults, and keywords at their default, left out."""
    if not isinstance(target, OpOverload):
        return tuple(args), dict(kwargs)
    arguments = [a for a in target._schema.arguments if not a.kwarg_only]
    args = list(args)
    while args and arguments[len(args) - 1].has_default_value() and _same(args[-1], arguments[len(args) - 1].default_value):
        args.pop()
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.kwarg_only and a.has_default_value()}
    return tuple(args), {k: v for k, v in kwargs.items() if not (k in defaults and _same(v, defaults[k]))}


def wrap_dims(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Negative `dim`, `dims`, `dim0`, `dim1` arguments made non-negative."""
    if not isinstance(target, OpOverload) or target is aten.tile.default:  # the `dims` of tile are repeats
        return args
    rank = next((len(shape_of(a)) for a in _tensors(args)), None)
    if rank is None:
        return args
    extra = 1 if target in (aten.unsqueeze.default, aten.unsqueeze_copy.default, aten.stack.default) else 0
    result = list(args)
    for k, argument in enumerate(target._schema.arguments[: len(args)]):
        if argument.name in ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "axis0", "axis1"):
            result[k] = _wrap(args[k], max(rank + extra, 1))
    return tuple(result)


def _wrap(dim: Any, rank: int) -> Any:
    if isinstance(dim, tuple | list):
        return [_wrap(d, rank) for d in dim]
    return dim % rank if isinstance(dim, int) and not isinstance(dim, bool) else dim


def _tensors(args: Sequence[Any]) -> list[Any]:
    found = []
    for a in args:
        if isinstance(a, fx.Node | Lazy):
            found.append(a)
        elif isinstance(a, tuple | list):
            found += [t for t in a if isinstance(t, fx.Node | Lazy)]
    return found


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Lazy) else x.meta["val"]


def shape_of(x: Any) -> tuple[int, ...]:
    value = value_of(x)
    return tuple(value.shape) if isinstance(value, Tensor) else tuple(value[0].shape)


def dtype_of(x: Any) -> torch.dtype:
    return value_of(x).dtype


def is_floating(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(is_floating(v) for v in value)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def made_by(x: Any, *targets: Any) -> bool:
    """Whether `x` is a node that calls one of `targets`."""
    return isinstance(x, fx.Node) and x.op == "call_function" and x.target in targets


def arguments(x: fx.Node) -> tuple[Any, ...]:
    """All positional arguments of a node's call, defaults filled in."""
    return bind(x.target, x.args, x.kwargs)[0]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node | Lazy) or type(a) is not type(b):
        return isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b) == 0
    return a == b


def map_leaves(value: Any, visit: Callable[[Any], Any]) -> Any:
    """A tree of tuples, lists and dicts with each leaf replaced by visit(it)."""
    if isinstance(value, tuple | list):
        return (
            type(value)(map_leaves(v, visit) for v in value)
            if type(value) in (tuple, list)
            else [map_leaves(v, visit) for v in value]
        )
    if isinstance(value, dict):
        return {k: map_leaves(v, visit) for k, v in value.items()}
    return visit(value)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, dict):
        yield from leaves(tuple(value.values()))
    else:
        yield value


def _describe(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _describe(value.meta["val"])
    if isinstance(value, Tensor):
        return ("t", tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, tuple | list):
        return (len(value), *(_describe(v) for v in value))
    if isinstance(value, Mapping):
        return tuple((k, _describe(v)) for k, v in sorted(value.items()))
    return (type(value), value)
