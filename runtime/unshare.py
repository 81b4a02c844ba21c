"""Gradients that share memory with nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .program import Key


def unshare(gradients: dict[Key, Tensor], lent: Iterable[Tensor]) -> dict[Key, Tensor]:
    """The gradients, none sharing memory with another or with what was `lent`: callers scale and clip them in place."""
    lent_spans = [(*_span(x), "") for x in lent]
    spans = [(*_span(x), key) for key, x in gradients.items()]
    shared = {key for start, end, key in spans if end - start < gradients[key].nbytes}
    reach, reaching = 0, ""
    for start, end, key in sorted(lent_spans + spans):
        if start < min(reach, end) and (key or reaching):
            shared.add(key or reaching)
        if end > reach and key not in shared:  # else it is no longer there
            reach, reaching = end, key
    for key in shared:
        gradients[key] = gradients[key].clone(memory_format=torch.contiguous_format)
    return gradients


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses, first and after the last, among which the elements of a tensor lie."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    reach = sum((int(n) - 1) * int(stride) for n, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (reach + 1) * x.element_size() if x.numel() else start
