"""The static check of a graph that was sharded along an axis, made before the graph is differentiated.

Every node is derived again from the rules: its operands' types must be those of one strategy of the op it stands for, its
own type must be what that strategy gives, and what it runs (target, sizes, offsets, axis) must be what the strategy says.
Every conversion must start from the type its operand has and be one that exists. A graph that passes computes what the
unsharded graph computes, and so do its gradients, as far as the rules are right (they are tested by execution).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from .convert import convert, exists, is_free
from .graph_tools import is_getitem, map_operands, metas, op_call, place_operands, where
from .rules.base import Axis, OpCall, Strategy, localize, strategies
from .types import Partial, Replicate, Type, Varying, local_shape


class TypeCheckError(TypeError):
    """A graph whose types do not hold. Names the node, its source line, the axis and the two types."""


def check(gm: fx.GraphModule, axis: Axis, index: int, placeholders: Mapping[str, Type] | None = None) -> None:
    """Raise TypeCheckError unless the graph is well typed along `axis`.

    placeholders: program key -> the type each input really has; where given, the graph must agree with it.
    """
    passed: set[Any] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            _check_placeholder(node, axis, placeholders)
        elif node.op == "output":
            _check_outputs(node, axis)
        elif is_getitem(node):
            source, k = node.args
            if _type(node, axis) != _type(source, axis)[k]:
                raise TypeCheckError(
                    f"{where(node)} is {_type(node, axis)} over {axis.name!r}, its tuple has {_type(source, axis)[k]}"
                )
        elif node.target is convert and node.args[1] == axis.name:
            _check_convert(node, axis)
        else:
            _check_op(node, axis, index, passed)


def _type(node: Any, axis: Axis) -> Any:
    found = node.meta.get("types", {}).get(axis.name)
    if found is None:
        raise TypeCheckError(f"{where(node)} has no type over axis {axis.name!r}")
    return found


def _check_placeholder(node: fx.Node, axis: Axis, given: Mapping[str, Type] | None) -> None:
    type_ = _type(node, axis)
    if given is not None and node.meta["key"] in given and given[node.meta["key"]] != type_:
        raise TypeCheckError(f"{where(node)} is read as {type_} over {axis.name!r} and given as {given[node.meta['key']]}")
    if isinstance(type_, Partial):
        raise TypeCheckError(f"{where(node)}: an input cannot be {type_} over {axis.name!r}")


def _check_outputs(node: fx.Node, axis: Axis) -> None:
    for result in node.args[0]:  # type: ignore[union-attr]
        type_ = _type(result, axis)
        if isinstance(type_, Replicate) and result.meta.get("grad"):
            raise TypeCheckError(f"output {where(result)} is R over {axis.name!r}: its gradient would be counted once a rank")


def _check_convert(node: fx.Node, axis: Axis) -> None:
    operands: Any = node.args
    source, _, src, dst = operands
    have, own = _type(source, axis), _type(node, axis)
    if have != src:
        raise TypeCheckError(f"{where(node)} converts from {src} over {axis.name!r}, but its operand ({where(source)}) is {have}")
    if own != dst:
        raise TypeCheckError(f"{where(node)} converts to {dst} over {axis.name!r}, but is marked {own}")
    if not exists(src, dst, bool(source.meta.get("grad"))):
        raise TypeCheckError(f"{where(node)}: there is no conversion {src} -> {dst} over {axis.name!r}")


def _check_op(node: fx.Node, axis: Axis, index: int, passed: set[Any]) -> None:
    """`passed` has what was found right already: identical blocks share their calls, types and values."""
    known = node.meta.get("calls", {}).get(axis.name)
    if known is None:
        raise TypeCheckError(f"{where(node)} was not derived from a call over axis {axis.name!r}")
    call: OpCall = known[0]
    sources: dict[fx.Node, int] = {}
    arguments = _numbered((node.args, node.kwargs), sources)
    facts = ((id(_type(s, axis)), bool(s.meta.get("grad"))) for s in sources)
    key = (id(call), node.target, arguments, *facts, id(_type(node, axis)), id(node.meta["val"]))
    if key not in passed:
        _derive(node, call, axis, index)
        passed.add(key)


def _numbered(value: Any, sources: dict[fx.Node, int]) -> Any:
    """Arguments in hashable form, nodes by the order in which they come first: `sources`."""
    if isinstance(value, fx.Node):
        return fx.Node, sources.setdefault(value, len(sources))
    if isinstance(value, tuple | list):
        return tuple(_numbered(v, sources) for v in value)
    if isinstance(value, dict):
        return tuple((k, _numbered(v, sources)) for k, v in value.items())
    return type(value), value


def _derive(node: fx.Node, call: OpCall, axis: Axis, index: int) -> None:
    """Find the strategy of `call` that `node` is the local form of."""
    _, sources = op_call(node)
    have = tuple(_type(s, axis) for s in sources)
    own = _type(node, axis)
    own = own if isinstance(own, tuple) else (own,)
    grads = tuple(bool(s.meta.get("grad")) for s in sources)
    found = [s for s in strategies(call, axis, _hints(have, own)) if s.outs == own and _serves(have, s.ins, grads)]
    if not found:
        raise TypeCheckError(
            f"{where(node)} has operands {_names(have)} over axis {axis.name!r} and is marked {_names(own)}: "
            f"no strategy of {call.target} takes these types to that one"
        )
    if not any(_runs(node, call, s, index, sources) for s in found):
        raise TypeCheckError(
            f"{where(node)} runs {node.target} with arguments that no strategy with the types {_names(have)} -> {_names(own)} over "
            f"axis {axis.name!r} gives; expected {_expected(call, found[0], index, sources)}"
        )
    _check_shapes(node, call, own, index, axis)


def _serves(have: tuple[Type, ...], needed: tuple[Type, ...], grads: tuple[bool, ...]) -> bool:
    return len(have) == len(needed) and all(is_free(a, b, g) for a, b, g in zip(have, needed, grads, strict=True))


def _hints(have: tuple[Type, ...], own: tuple[Type, ...]) -> dict[tuple[str, int, int], list[Any]]:
    """The cuts that the marked types speak of, so that the rules offer them."""
    found: dict[tuple[str, int, int], list[Any]] = {}
    for side, types in (("in", have), ("out", own)):
        for i, t in enumerate(types):
            if isinstance(t, Varying):
                found.setdefault((side, i, t.dim), []).append(t.sections)
    return found


def _runs(node: fx.Node, call: OpCall, strategy: Strategy, index: int, sources: tuple[fx.Node, ...]) -> bool:
    target, args, kwargs = localize(call, strategy, index)
    if node.target != target:
        return False
    return _plain(node.args) == _plain(place_operands(args, sources)) and _plain(dict(node.kwargs)) == _plain(
        place_operands(kwargs, sources)
    )


def _plain(value: Any) -> Any:
    """Arguments in comparable form: lists as tuples, nodes by identity."""
    if isinstance(value, fx.Node):
        return id(value)
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _expected(call: OpCall, strategy: Strategy, index: int, sources: tuple[fx.Node, ...]) -> str:
    target, args, _ = localize(call, strategy, index)
    return f"{target}{map_operands(args, lambda o: sources[o.index].name)}"


def _check_shapes(node: fx.Node, call: OpCall, own: tuple[Type, ...], index: int, axis: Axis) -> None:
    for before, after, type_ in zip(call.results, metas(node), own, strict=True):
        if after.shape != local_shape(before.shape, type_, index):
            raise TypeCheckError(f"{where(node)} holds {after.shape} where {type_} of {before.shape} over {axis.name!r} is meant")


def _names(types: tuple[Type, ...]) -> str:
    return "(" + ", ".join(map(str, types)) + ")"
