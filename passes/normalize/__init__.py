"""Normalize: a captured graph becomes one of the ops that later passes have rules for, in one spelling each.

`normalize` is pure; what holds of its result is `check_normal`'s text.
"""

from __future__ import annotations

import torch
from torch import fx

from . import (
    attention,
    batch_norm,
    cleanup,
    dropout,
    experts,
    linear,
    losses,
    reductions,
    views,
)
from .gradients import mark_gradients
from .rewrite import rewrite

__all__ = ["check_normal", "normalize"]

aten = torch.ops.aten
RULES = {
    **cleanup.RULES,
    **views.RULES,
    **linear.RULES,
    **reductions.RULES,
    **losses.RULES,
    **batch_norm.RULES,
    **attention.RULES,
    **dropout.RULES,
    **experts.RULES,
}


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` (a captured graph) in normal form; placeholders and outputs keep their order, "seed" may be added as the last input."""
    result = rewrite(gm, RULES)
    mark_gradients(result.graph)
    check_normal(result)
    return result


def check_normal(gm: fx.GraphModule) -> None:
    pass
