"""Sharding rules that users give to ops of their own: read, proven by execution, and only then used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..passes.rules import notation
from ..passes.rules.base import RULES
from .check_rule import check_rule
from .torch_compat import OpOverload

SIZES = (5, 4, 7, 6, 8, 9)
"""Of the dims of operands made for a check: even and uneven over two and three ranks."""


def register_rule(op: Any, text: str, example: Sequence[Any] | None = None) -> None:
    """Say how an op of your own may be sharded: `register_rule(torch.ops.mine.scale, "r c, r -> r c")`. Without a rule it runs
    replicated.

    op         of torch.library: `torch.ops.NAMESPACE.NAME`, or one overload of it
    text       the dims of its tensor operands and of its results (passes/rules/notation.py): a name stands for one loop of the op.
               A dim that a result lacks is summed over; a loop that must not be cut is named after `; block:`
    example    arguments to prove it with, as `check_rule` takes them: the op is run under every strategy that the rule offers,
               forward and backward. None: random float64 operands of the dims that the text names, where the op takes such

    A warning says where the op could not be run, and the rule is not proven. Raises ValueError for text that cannot be read, and
    for an op that has a rule; VerificationError, naming the strategy, where ranks do not compute together what one does.
    """
    target = op if isinstance(op, OpOverload) else op.default
    notation.register_rule(target, text)
    problem: Exception | str = "it takes more than tensors"
    for arguments in [example] if example is not None else _made(target, text):
        try:
            target(*arguments)
        except Exception as error:
            problem = error
            continue
        try:
            check_rule(target, *arguments)
        except BaseException:
            del RULES[target]
            raise
        return
    if example is not None and isinstance(problem, Exception):
        del RULES[target]
        raise problem
    warnings.warn(
        f"the sharding rule {text!r} of {target} is used but not proven: the op was not run on operands made for it ({problem}). "
        "Give example=(its arguments), small and in float64",
        stacklevel=2,
    )


def _made(target: OpOverload, text: str) -> Iterator[tuple[Tensor, ...]]:
    """Operands whose dims have lengths of their own, and operands whose dims are all alike: a wrong rule may fit these alone.
    Nothing for an op that needs more than tensors."""
    needed = [a for a in target._schema.arguments if not a.has_default_value()]
    operands, _, _ = notation.parse(text)
    if len(needed) != len(operands) or any(not isinstance(a.type, torch.TensorType) for a in needed):
        return
    names = dict.fromkeys(name for dims in operands for name in dims)
    generator = torch.Generator().manual_seed(0)
    for sizes in ({name: SIZES[k % len(SIZES)] for k, name in enumerate(names)}, dict.fromkeys(names, 6)):
        shapes = [[sizes[name] for name in dims] for dims in operands]
        yield tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
