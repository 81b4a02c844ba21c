"""One call of a model as a problem: captured at the shapes of the global batch, normalized, its batch dims known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..passes.types import balanced_sizes
from .call_structure import build, flatten_call
from .capture import Captured, capture
from .collector import without_collection
from .emit import Problem
from .prepare import prepare

BatchMode = Literal["local", "global"]
Shapes = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Bound:
    """A captured call and the problem that plans are made for."""

    captured: Captured
    problem: Problem


def batch_size(shapes: Shapes) -> int:
    """Samples of a call: dim 0 of its first tensor that has dims."""
    for shape, _ in shapes.values():
        if shape:
            return shape[0]
    return 1


def batch_keys(shapes: Sequence[Shapes]) -> tuple[str, ...]:
    """Tensors whose dim 0 is the batch on every rank."""
    keys = [key for key, (shape, _) in shapes[0].items() if shape]
    return tuple(k for k in keys if all(s[k][0] and s[k][0][0] == batch_size(s) for s in shapes))


def local_batches(shapes: Sequence[Shapes], first_ranks: Sequence[int], mode: BatchMode) -> tuple[int, ...]:
    """Samples of each data rank. `first_ranks`: a rank of each data rank's group, in order."""
    if mode == "global":
        return balanced_sizes(batch_size(shapes[0]), len(first_ranks))
    return tuple(batch_size(shapes[r]) for r in first_ranks)


@without_collection()
def bind(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batches: Sequence[int],
    batch_inputs: Sequence[str],
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    training: bool = True,
    differentiate: bool = True,
    precision: torch.dtype | None = None,
) -> Bound:
    """Capture the call as if it held the whole batch, `sum(batches)` samples."""
    tree, tensors = flatten_call(args, kwargs)
    total = sum(batches)

    def whole(key: str, x: Tensor) -> Tensor:
        shape = (total, *x.shape[1:]) if key in batch_inputs else tuple(x.shape)
        return torch.empty(shape, dtype=x.dtype, device="meta", requires_grad=x.requires_grad)

    call_args, call_kwargs = build(tree, {key: whole(key, x) for key, x in tensors.items()})
    cast = torch.autocast("cpu", dtype=precision) if precision is not None else nullcontext()
    with cast:
        captured = capture(model, call_args, call_kwargs, loss_fn=loss_fn, training=training)
    gm = prepare(captured)
    problem = Problem(
        graph=gm,
        loss=captured.loss,
        batch_inputs=tuple(batch_inputs),
        local_batches=tuple(batches),
        aliases=captured.aliases,
        constants=captured.constants,
        training=differentiate and captured.loss is not None,
        persistent=frozenset(model.state_dict()),
        trainable=captured.trainable,
        buffers={f"buffer.{n}": b for n, b in model.named_buffers() if not (b.is_floating_point() or b.is_meta)},
    )
    return Bound(captured, problem)
