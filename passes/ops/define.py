"""One call to define an op: its schema, its kernel for every device, its shape function and its gradient."""

from __future__ import annotations

from typing import Any

import torch

from .collectives import NAMESPACE, Kernel, define_kernel, library


def define(schema: str, kernel: Kernel, fake: Kernel, backward: Kernel | None = None, save: Kernel | None = None) -> None:
    """Define the op of `schema` in the project's namespace.

    kernel      computes it, on any device
    fake        gives empty results of the right shape, dtype and strides, from fake tensors
    backward    `(ctx, *grad_outputs) -> gradients of all arguments`; None for an op that refuses to be differentiated
    save        `(ctx, inputs, output)`: keeps what `backward` needs. Named as torch.library.register_autograd calls it.
    """
    name = schema.split("(")[0]
    define_kernel(schema, kernel)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward or _no_gradient, setup_context=save, lib=library)


def _no_gradient(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(f"this op of {NAMESPACE!r} has no gradient: a model may be differentiated once, its gradient may not")


def chunk_elements(device: torch.device) -> int:
    """How many elements to process at a time, so that what one step leaves is still in the cache for the next one."""
    if device.type != "cpu":
        return 1 << 25
    return max(1 << 17, (1 << 15) * torch.get_num_threads())  # ATen gives a thread no less than 2^15
