"""The norm of all gradients, over every axis and stage of the mesh, in one reduction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..compiler.torch_compat import foreach_scale_
from .errors import ShardwrightError
from .parameters import ParameterStore
from .sharded import ShardedTensor, local_tensor


def gradients_of(store: ParameterStore) -> dict[str, Tensor]:
    """This rank's shards of the gradients that are there, by name. Raises for gradients that no_sync() left unreduced."""
    found: dict[str, Tensor] = {}
    for name, parameter in store.parameters.items():
        grad = parameter.grad
        if grad is None:
            continue
        if isinstance(grad, ShardedTensor) and grad.unreduced is not None:
            raise ShardwrightError(
                f"the gradient of {name!r} was computed under no_sync() and is not reduced yet; run the last micro-batch of an "
                "accumulation outside no_sync(), then clip"
            )
        found[name] = local_tensor(grad)
    return found


def grad_norm(store: ParameterStore, norm_type: float = 2.0, foreach: bool | None = None) -> Tensor:
    """The p-norm of all gradients of the model seen as one vector, 0-dim and equal on all ranks. A collective over all of them.

    Every element counts once: of the ranks that hold the same shard, and of the stages that share a tied parameter, one
    contributes it.
    """
    if not norm_type > 0:
        raise ShardwrightError(f"norm_type {norm_type}: a norm over sharded gradients needs a positive number or inf")
    dtype = _norm_dtype(store)  # asks the other stages on first use: before what only some ranks come to
    gradients = {name: g for name, g in gradients_of(store).items() if g.numel()}
    counted = [g for name, g in gradients.items() if store.counts(name)]
    total = torch.nn.utils.get_total_norm(counted, norm_type, foreach=foreach).to(store.device, torch.float64)
    axes = "+".join(store.mesh.axes)
    infinite = math.isinf(norm_type)
    power = total if infinite else total**norm_type
    if axes:
        power = store.communicator.all_reduce(power, axes, "max" if infinite else "sum")
    return (power if infinite else power ** (1.0 / norm_type)).to(dtype)


def _norm_dtype(store: ParameterStore) -> torch.dtype:
    """float64 where the model has such parameters, on whatever stage; float32 else."""
    wide = any(fact.dtype == torch.float64 for held in store.directory for fact in held.values())
    return torch.float64 if wide else torch.float32


def clip_grad_norm_(
    store: ParameterStore, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, over the whole model. Returns the norm before clipping."""
    total = grad_norm(store, norm_type, foreach)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped.")
    coefficient = (float(max_norm) / (total + 1e-6)).clamp(max=1.0)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in gradients_of(store).values():
        by_dtype.setdefault(g.dtype, []).append(g)
    for dtype, tensors in by_dtype.items():
        foreach_scale_(tensors, coefficient.to(dtype))
    return total
