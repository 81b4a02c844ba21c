"""Loops as one op: what their text says, with its gradient, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.passes.ops.collectives import ops
from shardwright.passes.ops.loops import Name, read, written

HALVES = """\
v2 = aten.abs.default(v0)
v3 = aten.amax.default(v2)
v4 = aten.gt.Scalar(v3, 1.0)
while v4
v2 = aten.mul.Tensor(v0, v1)
carry v2
v3 = aten.mul.Tensor(v2, v1)
v4 = aten.mul.Tensor(v2, v0)
v5 = aten.sum.default(v4)
give v3, v5"""
"""y times s, until none of y is over 1."""


def halved(y: Tensor, s: Tensor) -> Tensor:
    while y.abs().amax() > 1.0:
        y = y * s
    return y


@pytest.mark.parametrize("start", [10.0, 1.5, 0.1])
def test_a_loop_and_its_gradient(start: float) -> None:
    y = torch.linspace(-start, start, 7, dtype=torch.float64).requires_grad_(True)
    s, seed = torch.tensor(0.6, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    (found,), wanted = ops.loop(HALVES, [y], [s]), halved(y, s)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    expected = torch.autograd.grad(wanted, (y, s), seed, allow_unused=True)
    for own, other in zip(torch.autograd.grad(found, (y, s), seed), expected, strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other, rtol=1e-13, atol=1e-13)


def test_results_are_new_tensors() -> None:
    y = torch.zeros(3)
    (found,) = ops.loop(HALVES, [y], [torch.tensor(0.5)])
    assert found.data_ptr() != y.data_ptr()


@pytest.mark.parametrize(
    "value",
    [1, -2, 2.5, -math.inf, math.nan, True, None, "mean", "a\nb", 1 + 2j, torch.float32, torch.contiguous_format, [1, [-3], []]],
)
def test_arguments_are_read_as_they_were_written(value: Any) -> None:
    text = f"v1 = aten.add.Tensor(v0, {written(value, str)}, alpha={written([value, Name(0)], lambda n: f'v{n.number}')})\ncarry v1"
    (call,) = read(text)["carry"].calls
    for found, expected in ((call.args[1], value), (call.kwargs["alpha"], [value, Name(0)])):
        assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    "line",
    [
        "v1 = os.system.default('true')",
        "v1 = load_library.__call__.default('x.so')",
        "v1 = aten.__class__.default(v0)",
        "v1 = print('x')",
        "v1 = aten.add.Tensor(v0, __import__('os'))",
        "v1 = aten.add.Tensor(v0, torch.load)",
        "v1 = aten.add.Tensor(v0, (lambda: 1)())",
        "import os",
        "v1, v2 = aten.add.Tensor(v0, 1)",
        "v1 = aten.add.Tensor(v0, 1)\nv3 = aten.add.Tensor(v1, 1)",
    ],
)
def test_text_that_is_no_calls_of_ops_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="is no |comes out of order"):
        read(f"{line}\ncarry v1")
