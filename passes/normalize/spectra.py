"""Short-time Fourier transforms as what they are: frames of the signal, times a window, transformed. So samples may be cut."""

from __future__ import annotations

from typing import Any

import torch

from .rewrite import Builder, Rules, dtype_of, shape_of

aten = torch.ops.aten
UNSCALED, BY_ROOT = 0, 1
"""Norms of torch's transforms: none, or a division by the root of the length."""


def stft(
    b: Builder,
    x: Any,
    length: int,
    hop: int | None,
    width: int | None,
    window: Any,
    normalized: bool,
    onesided: bool | None,
    as_complex: bool | None,
    align: bool | None = None,
) -> Any:
    """x[..., t] as frames of `length`, one every `hop`, times a window of `width` in their middle: [..., frequency, frame]."""
    if align:
        return NotImplemented
    hop, width = hop or length // 4, width or length
    real = not dtype_of(x).is_complex and (window is None or not dtype_of(window).is_complex)
    onesided = real if onesided is None else onesided
    last = len(shape_of(x)) - 1
    frames = b(aten.unfold.default, x, last, length, hop)
    if window is not None or width < length:
        window = window if window is not None else b(aten.full.default, [width], 1.0, dtype=dtype_of(x))
        before = (length - width) // 2
        frames = b(aten.mul.Tensor, frames, b(aten.constant_pad_nd.default, window, [before, length - width - before], 0))
    norm = BY_ROOT if normalized else UNSCALED
    if real:
        spectrum = b(aten._fft_r2c.default, frames, [last + 1], norm, onesided)
    else:
        spectrum = b(aten._fft_c2c.default, frames, [last + 1], norm, True)
    turned = b(aten.transpose.int, spectrum, last, last + 1)
    return turned if as_complex or (as_complex is None and not real) else b(aten.view_as_real.default, turned)


def centered(
    b: Builder,
    x: Any,
    length: int,
    hop: int | None,
    width: int | None,
    window: Any,
    center: bool,
    mode: str,
    *rest: Any,
) -> Any:
    """Frames begin half of one earlier, the signal being padded."""
    if center:
        shape = shape_of(x)
        deep = b(aten.reshape.default, x, [*[1] * (3 - len(shape)), *shape])
        padded = b(aten.pad.default, deep, [length // 2, length // 2], mode, None)
        x = b(aten.reshape.default, padded, [*shape[:-1], shape_of(padded)[-1]])
    return b(aten.stft.default, x, length, hop, width, window, *rest)


RULES: Rules = {aten.stft.default: stft, aten.stft.center: centered}
