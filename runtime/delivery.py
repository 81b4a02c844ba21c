"""Gradients that a step has already computed, handed out when the user calls `backward()` on its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..compiler.torch_compat import foreach_add_, foreach_scale_
from .errors import ShardwrightError
from .parameters import ParameterStore, Slot
from .program import Key
from .sharded import ShardedTensor

Gradients = Mapping[Key, Tensor]
PREFIX = "grad.param."


class Reducer(Protocol):
    def reduce(self, gradients: Gradients) -> dict[Key, Tensor]: ...


class Delivery:
    """The gradients of one call, `raw` (before the schedule's reductions) or reduced; delivered at most once.

    synchronize   for raw ones: reduce them at delivery, together with what no_sync() left before; else leave them with it
    refused       why there are none to deliver, "" if there are
    """

    def __init__(
        self,
        store: ParameterStore,
        gradients: Gradients,
        *,
        reducer: Reducer | None = None,
        raw: bool = False,
        synchronize: bool = True,
        refused: str = "",
    ) -> None:
        self._store, self._reducer, self._raw, self._synchronize, self._refused = store, reducer, raw, synchronize, refused
        self._gradients: dict[Key, Tensor] | None = dict(gradients)

    def deliver(self, scale: Tensor | None = None) -> None:
        """Add `scale` times the gradients to the parameters' `.grad`. Raises ShardwrightError the second time."""
        if self._refused:
            raise ShardwrightError(self._refused)
        if self._gradients is None:
            raise ShardwrightError(
                "backward() was called a second time on one loss: a step computes its gradients once, and they have been added "
                "already. Call the model again for new ones, or scale the loss once (backward() of a sum of losses adds each once)"
            )
        gradients, self._gradients = self._gradients, None
        if scale is not None:
            _scale(list(gradients.values()), scale)
        if not self._raw:
            add_gradients(self._store, gradients)
        elif not self._synchronize:
            keep_unreduced(self._store, gradients)
        else:
            assert self._reducer is not None
            gradients = _with_pending(take_pending(self._store), gradients)
            add_gradients(self._store, self._reducer.reduce(gradients))


def _scale(tensors: list[Tensor], scale: Tensor) -> None:
    if not tensors or (scale.device.type == "cpu" and scale.item() == 1.0):
        return
    with torch.no_grad():
        foreach_scale_(tensors, scale)


def _trainable(store: ParameterStore, gradients: Gradients) -> list[tuple[Key, Slot, Tensor]]:
    """(key, slot, gradient) of the parameters whose gradient is wanted: not of those frozen since."""
    found = []
    for key, gradient in gradients.items():
        slot = store.slots.get(key.removeprefix(PREFIX))
        if slot is not None and slot.parameter.requires_grad:
            found.append((key, slot, gradient.contiguous()))
    return found


def add_gradients(store: ParameterStore, gradients: Gradients) -> None:
    """Add shards of gradients to the parameters' `.grad`."""
    held: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for _, slot, gradient in _trainable(store, gradients):
        p = slot.parameter
        if p.grad is None:
            p.grad = gradient if store.is_whole else ShardedTensor(gradient, slot.layout, slot.spec.shape)
        elif isinstance(p.grad, ShardedTensor):
            _add_to_sharded(p.grad, gradient, held)
        else:
            held.setdefault(gradient.dtype, ([], []))
            held[gradient.dtype][0].append(p.grad)
            held[gradient.dtype][1].append(gradient)
    with torch.no_grad():
        for targets, others in held.values():
            foreach_add_(targets, others)


def _add_to_sharded(grad: ShardedTensor, gradient: Tensor, held: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]) -> None:
    if grad.unreduced is not None:
        grad.add_reduced(gradient)
        return
    lists = held.setdefault(gradient.dtype, ([], []))
    lists[0].append(grad.to_local())
    lists[1].append(gradient)


def keep_unreduced(store: ParameterStore, gradients: Gradients) -> None:
    """Leave gradients with the parameters, to be reduced with a later step's. They stand in `.grad`, so that zero_grad()
    drops them and an optimizer that would step without them raises."""
    for _, slot, gradient in _trainable(store, gradients):
        p = slot.parameter
        if isinstance(p.grad, ShardedTensor) and p.grad.unreduced is not None:
            p.grad.unreduced.add_(gradient)
            continue
        base = p.grad.to_local() if isinstance(p.grad, ShardedTensor) else p.grad
        if base is None:
            base = torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(slot.levels[-1].shape)
        waiting = ShardedTensor(base, slot.layout, slot.spec.shape)
        waiting.unreduced = gradient
        p.grad = waiting


def _is_placeholder(base: Tensor) -> bool:
    """Whether this is the one number, expanded, that `keep_unreduced` puts where nothing was reduced before."""
    return base.dim() > 0 and base.numel() > 0 and not any(base.stride())


def has_pending(store: ParameterStore) -> bool:
    """Whether no_sync() left gradients that are still to be reduced."""
    return any(isinstance(p.grad, ShardedTensor) and p.grad.unreduced is not None for p in store.parameters.values())


def take_pending(store: ParameterStore) -> dict[Key, Tensor]:
    """What no_sync() left, taken off the parameters, whose `.grad` is then what was reduced before (None if nothing)."""
    found: dict[Key, Tensor] = {}
    for name, slot in store.slots.items():
        grad = slot.parameter.grad
        if not isinstance(grad, ShardedTensor) or grad.unreduced is None:
            continue
        found[PREFIX + name] = grad.unreduced
        base = grad.to_local()
        if _is_placeholder(base):
            slot.parameter.grad = None
        else:
            slot.parameter.grad = base if store.is_whole else ShardedTensor(base, slot.layout, slot.spec.shape)
    return found


def _with_pending(pending: Gradients, gradients: Gradients) -> dict[Key, Tensor]:
    total = dict(gradients)
    for key, waiting in pending.items():
        total[key] = waiting.add_(total[key]) if key in total else waiting
    return total


class _Deliver(torch.autograd.Function):
    """Ties a step's outputs to its gradients. The first output is the loss."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, delivery: Delivery, names: tuple[str, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.delivery, ctx.names = delivery, names
        return tuple(x.detach() for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:  # type: ignore[override]
        for name, grad in zip(ctx.names[1:], grads[1:], strict=True):
            if grad is not None:
                raise ShardwrightError(
                    f"a gradient was sent into the output {name!r}: only the loss that the model returns is differentiable here, "
                    "because its gradients are computed with the outputs. Compute the loss inside the model, or give "
                    "auto_parallelize a loss_fn"
                )
        if torch.is_grad_enabled():
            raise ShardwrightError(
                "create_graph=True: gradients of gradients are not computed; the backward of a step is a fixed program"
            )
        scale = grads[0]
        if scale is not None:
            ctx.delivery.deliver(scale.detach())
        return (None, None, None, *(None for _ in grads))


def attach(delivery: Delivery, loss: Key | None, outputs: Mapping[Key, Any], describe: Callable[[Key], str]) -> dict[Key, Any]:
    """`outputs` with every floating-point tensor tied to `delivery`: through `loss` its gradients flow, the others refuse."""
    floating = [k for k, x in outputs.items() if isinstance(x, Tensor) and x.is_floating_point() and k != loss]
    keys: Sequence[Key] = ([loss] if loss is not None and loss in outputs else []) + floating
    if not keys:
        return dict(outputs)
    anchor = torch.zeros((), requires_grad=True)
    first = [outputs[loss]] if keys[0] == loss and loss is not None else [torch.zeros(())]
    names = ("loss", *(describe(k) for k in floating))
    results = _Deliver.apply(anchor, delivery, names, *first, *(outputs[k] for k in floating))
    found = dict(outputs)
    if loss is not None and loss in outputs:
        found[loss] = results[0]
    found.update(zip(floating, results[1:], strict=True))
    return found
