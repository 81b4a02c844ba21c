"""For checks in float64: what a model casts to float32 stays in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .cleanup import to_copy
from .gradients import mark_gradients
from .rewrite import Builder, map_leaves, rewrite

aten = torch.ops.aten


def promote_casts(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with every float32 that its ops name, in casts and constants, replaced by float64. Inputs keep their dtypes.

    Requires: a functional ATen graph with meta["val"]. Ensures: the same function, in float64 where the inputs are.
    """
    result = rewrite(gm, {aten._to_copy.default: _cast, None: _call})
    mark_gradients(result.graph)
    return result


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _cast(b: Builder, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return to_copy(b, x, dtype=_wide(dtype))


def _call(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return b.emit(target, *map_leaves(args, _wide), **map_leaves(kwargs, _wide))
