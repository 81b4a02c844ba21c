"""Loops whose number of steps depends on data, as one op: what a step does is text in its first argument.

    loop(steps, carried, others)                     what is carried when the condition is false
    loop_grad(steps, carried, others, gradients)     gradients of what of these is floating, from those of the results

    v3 = aten.sum.default(v0)
    v4 = aten.lt.Scalar(v3, 3)
    while v4
    v3 = aten.mul.Tensor(v0, v2)
    carry v3, v1
    v5 = aten.mul.Tensor(v4, v2)
    ...
    give v5, v7

In each of the three parts v0, v1, ... are what is carried and then the others, and `device` is theirs; in the last the gradients of
results follow. It is left out where nothing floating is carried. Only ops are called, by names that torch knows: text that was
loaded computes, and does nothing else.

`loop_begin` and `loop_end` mark the ops of a step while a model is traced (compiler/loops.py).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .collectives import NAMESPACE, ops
from .define import define


@dataclass(frozen=True)
class Name:
    """A value, or one of an op's several results; below 0: the device that the loop runs on."""

    number: int
    item: int | None = None

    def of(self, values: Sequence[Any]) -> Any:
        if self.number < 0:
            return values[0].device
        found = values[self.number]
        return found if self.item is None else found[self.item]


DEVICE = Name(-1)


@dataclass(frozen=True)
class Call:
    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """first: the number of the first call's result."""

    first: int
    calls: tuple[Call, ...]
    results: tuple[Name, ...]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values: list[Any] = [*inputs, *[None] * (self.first - len(inputs))]
        for call in self.calls:
            values.append(call.op(*_filled(call.args, values), **{k: _filled(v, values) for k, v in call.kwargs.items()}))
        return [name.of(values) for name in self.results]


def _filled(value: Any, values: Sequence[Any]) -> Any:
    if isinstance(value, Name):
        return value.of(values)
    return type(value)(_filled(v, values) for v in value) if isinstance(value, tuple | list) else value


@cache
def read(steps: str) -> dict[str, Part]:
    """The parts, by the word that ends each. Raises ValueError for what is no such text."""
    parts: dict[str, Part] = {}
    calls: list[Call] = []
    first = None
    for line in steps.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("while", "carry", "give"):
            names = _value(ast.parse(f"[{rest}]", mode="eval").body)
            parts[word] = Part(first if first is not None else 0, tuple(calls), tuple(names))
            calls, first = [], None
            continue
        statement = ast.parse(line).body[0]
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
            raise ValueError(f"{line!r} is no step of a loop")
        number = int(statement.targets[0].id[1:])
        first = number if first is None else first
        if number != first + len(calls):
            raise ValueError(f"{line!r} comes out of order")
        calls.append(_call(statement.value))
    return parts


def _call(node: ast.expr) -> Call:
    match node:
        case ast.Call(ast.Attribute(ast.Attribute(ast.Name(namespace), name), overload), args, keywords):
            op = _op(NAMESPACE if namespace == "shardwright" else namespace, name, overload)
            named = {str(k.arg): _value(k.value) for k in keywords}
            if any(a.name == "device" for a in op._schema.arguments) and not any(
                "Tensor" in str(a.type) for a in op._schema.arguments
            ):
                named.setdefault("device", DEVICE)  # of a tensor that is made from none
            return Call(op, tuple(map(_value, args)), named)
    raise ValueError(f"{ast.unparse(node)} is no call of an op")


def _op(*path: str) -> Any:
    found: Any = torch.ops
    for name in path:
        found = getattr(found, name, None)
    if not isinstance(found, type(torch.ops.aten.add.Tensor)):
        raise ValueError(f"{'.'.join(path)} is no op")
    return found


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.Name("device"):
            return DEVICE
        case ast.Name("inf" | "nan" as name):
            return float(name)
        case ast.Name(name) if name[0] == "v" and name[1:].isdigit():
            return Name(int(name[1:]))
        case ast.Subscript(ast.Name(name), ast.Constant(int(k))):
            return Name(int(name[1:]), k)
        case ast.List(items):
            return [_value(item) for item in items]
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.BinOp(left, ast.Add() | ast.Sub() as sign, right):  # a complex number
            return _value(left) + _value(right) if isinstance(sign, ast.Add) else _value(left) - _value(right)
        case ast.Attribute(ast.Name("torch"), name):
            found = getattr(torch, name)
            if isinstance(found, torch.dtype | torch.memory_format | torch.layout):
                return found
    raise ValueError(f"{ast.unparse(node)} is no argument of an op")


def written(value: Any, names: Callable[[Any], str]) -> str:
    """An argument as `read` takes it; names: of what stands for a value."""
    match value:
        case list() | tuple():
            return f"[{', '.join(written(v, names) for v in value)}]"
        case float() if math.isinf(value) or math.isnan(value):
            return str(value)
        case torch.device():
            return "device"
        case None | bool() | int() | float() | complex() | str() | torch.dtype() | torch.memory_format() | torch.layout():
            return repr(value)
    return names(value)


def states(parts: dict[str, Part], carried: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What is carried before every step, and after the last."""
    state = [*carried]
    for _ in count():
        yield state
        (more,) = parts["while"].run([*state, *others])
        if not bool(more):
            return
        state = parts["carry"].run([*state, *others])


def _kernel(steps: str, carried: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    *_, last = states(read(steps), carried, others)
    return [x.clone(memory_format=torch.contiguous_format) for x in last]


def _grad_kernel(steps: str, carried: Sequence[Tensor], others: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The steps are taken again, and what they carry is kept until they are gone through backwards."""
    parts, found = read(steps), [*gradients]
    dtypes = [torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype for x in floating(others)]
    sums = [x.new_zeros(x.shape, dtype=dtype) for x, dtype in zip(floating(others), dtypes, strict=True)]
    *before, _ = states(parts, carried, others)
    for state in reversed(before):
        given = parts["give"].run([*state, *others, *found])
        found = given[: len(found)]
        for total, more in zip(sums, given[len(found) :], strict=True):
            total += more
    sums = [total.to(x.dtype) for total, x in zip(sums, floating(others), strict=True)]
    return [x.clone(memory_format=torch.contiguous_format) for x in (*found, *sums)]


def floating(values: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in values if x.is_floating_point() or x.is_complex()]


def _empty(values: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in values]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.steps, carried, others = inputs
    ctx.count = len(carried)
    ctx.save_for_backward(*carried, *others)


def _backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    carried, others = list(saved[: ctx.count]), list(saved[ctx.count :])
    wanted = [(x, g) for x, g in zip(carried, gradients, strict=True) if floating([x])]
    seeds = [torch.zeros_like(x) if g is None else g for x, g in wanted]
    found = iter(ops.loop_grad(ctx.steps, carried, others, seeds))
    of = [[next(found) if floating([x]) else None for x in values] for values in (carried, others)]
    return None, *of


define(
    "loop(str steps, Tensor[] carried, Tensor[] others) -> Tensor[]",
    _kernel,
    lambda steps, carried, others: _empty(carried),
    _backward,
    _save,
)
define(
    "loop_grad(str steps, Tensor[] carried, Tensor[] others, Tensor[] gradients) -> Tensor[]",
    _grad_kernel,
    lambda steps, carried, others, gradients: _empty([*floating(carried), *floating(others)]),
)


def _copies(carried: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in carried]


define("loop_begin(Tensor[] carried) -> Tensor[]", _copies, _copies, lambda ctx, gradients: (gradients,))
define(
    "loop_end(Tensor condition, Tensor[] carried) -> Tensor[]",
    lambda condition, carried: _copies(carried),
    lambda condition, carried: _copies(carried),
    lambda ctx, gradients: (None, gradients),
)
