"""For checks in float64: what a model casts to float32 stays in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...compiler.torch_compat import OpOverload
from .cleanup import nothing, to_copy
from .gradients import mark_gradients
from .rewrite import Builder, map_leaves, rewrite

aten = torch.ops.aten

ASSERTIONS = {aten._assert_tensor_metadata.default: nothing}
"""They speak of the dtypes that there were."""


def double(x: torch.Tensor) -> torch.Tensor:
    """In float64, where it has a floating dtype."""
    return x.double() if x.is_floating_point() else x


def promote_casts(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with every float32 that its ops name, in casts and constants, replaced by float64. Inputs keep their dtypes, and so does
    what is made in torch's default dtype: numbers drawn in float64 would be others.

    Requires: a functional ATen graph with meta["val"]; it is to be given its constants in float64. Ensures: the same function, in
    float64 where the inputs are.
    """
    narrow = _widened(gm, lambda node: node.meta["key"].startswith("const.") and node.meta["val"].dtype is torch.float32)
    result = rewrite(narrow, {**ASSERTIONS, aten._to_copy.default: _cast, None: _call})
    mark_gradients(result.graph)
    return result


def _widened(gm: fx.GraphModule, chosen: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """A copy of `gm` in which the placeholders that are `chosen` are float64. The values after them are still what they were."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(gm.graph, {}))
    for node in copy.nodes:
        if node.op == "placeholder" and chosen(node):
            narrow = node.meta["val"]
            with narrow.fake_mode:
                node.meta["val"] = torch.empty_strided(narrow.shape, narrow.stride(), dtype=torch.float64)
    double = fx.GraphModule(gm, copy)
    double.meta.update(gm.meta)
    return double


def _wide(value: Any) -> Any:
    """Dtypes stand in the text of a loop's steps, too."""
    if isinstance(value, str):
        return value.replace("torch.float32", "torch.float64")
    return torch.float64 if value is torch.float32 else value


def _cast(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return to_copy(b, x, dtype=_wide(dtype))


def _call(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return b.emit(target, *map_leaves(args, _wide), **map_leaves(kwargs, _wide))


NARROW = frozenset({torch.float32, torch.bfloat16, torch.float16})


def widen(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` as if the model and its floating inputs were float64: the same function of wider numbers."""
    double = _widened(gm, lambda node: node.meta["val"].dtype in NARROW)
    result = rewrite(double, {**ASSERTIONS, aten._to_copy.default: _wide_cast, None: _wide_call})
    mark_gradients(result.graph)
    result.meta.update({k: v for k, v in gm.meta.items() if k not in result.meta})
    return result


def _widest(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub("|".join(map(str, NARROW)), "torch.float64", value)
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def _wide_cast(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return to_copy(b, x, dtype=_widest(dtype))


def _implied(b: Builder, target: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The floating dtype of a tensor made from numbers alone (`eye`, `linspace`), where its call leaves it to torch's default."""
    names = {a.name for a in target._schema.arguments} if isinstance(target, OpOverload) else ()
    if "dtype" not in names or kwargs.get("dtype") is not None or b.origin is None or b.origin.all_input_nodes:
        return {}
    dtype = b.origin.meta["val"].dtype
    return {"dtype": dtype} if dtype.is_floating_point else {}


def _wide_call(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs = {**kwargs, **_implied(b, target, kwargs)}
    return b.emit(target, *map_leaves(args, _widest), **map_leaves(kwargs, _widest))
