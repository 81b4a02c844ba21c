"""Sharding rules by execution: values are dealt to the ranks of an axis by their types, run, and put together again.

`deal` and `join` say what a type means in numbers. `check_strategy` runs one op call under one strategy on every
rank, in this process, and compares results and gradients with the same call on one rank. `check_rule` does so for all that the rule
of an op offers: it is what shardwright's own rules are tested with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..passes.convert import backward_ops, convert
from ..passes.graph_tools import map_operands
from ..passes.ops.collectives import join_shards, take_shard, use_communicator
from ..passes.rules.base import Axis, OpCall, Operand, Strategy, TensorMeta, has_derivatives, localize, strategies
from ..passes.types import Partial, Sections, Type, Varying, balanced_sizes, even_sections, gradient_type, local_shape
from ..runtime.lockstep import run_ranks
from ..runtime.program import Mesh
from .torch_compat import OpOverload
from .verify import VerificationError


def deal(whole: Tensor, type_: Type, n: int, generator: torch.Generator) -> list[Tensor]:
    """What each of n ranks holds of `whole`. Partial: random terms that sum to it."""
    match type_:
        case Varying(dim, sections):
            return [take_shard(whole, dim, sections, i).clone() for i in range(n)]
        case Partial("sum"):
            terms = [_random_like(whole, generator) for _ in range(n - 1)]
            return [*terms, whole - sum(terms)] if terms else [whole.clone()]
        case Partial():
            raise ValueError(f"no op takes {type_} values")
    return [whole.clone() for _ in range(n)]


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    if has_derivatives(x.dtype):
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return torch.randint(-5, 5, x.shape, dtype=x.dtype, generator=generator)


def join(parts: Sequence[Tensor], type_: Type) -> Tensor:
    """The whole that the ranks' parts stand for. Raises VerificationError where I or R parts differ."""
    match type_:
        case Varying(dim, sections):
            for i, part in enumerate(parts):
                held = sum(section[i] for section in sections)
                _require(part.shape[dim] == held, f"rank {i} holds {tuple(part.shape)} where {type_} gives it {held} on dim {dim}")
            return join_shards(parts, dim, sections)
        case Partial(op):
            rows = torch.stack(list(parts))
            return rows.sum(0) if op == "sum" else rows.amax(0) if op == "max" else rows.amin(0)
    for i, part in enumerate(parts):
        close = torch.allclose(part, parts[0], rtol=1e-10, atol=1e-12, equal_nan=True)
        _require(close, f"{type_}: rank {i} differs from rank 0")
    return parts[0]


class _Conversion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, src: Type, dst: Type) -> Tensor:
        ctx.conversion = (axis, src, dst)
        return convert(x.clone(), axis, src, dst)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        for op, args in backward_ops(*ctx.conversion):
            grad = op(grad, *args)
        return grad, None, None, None


def differentiable(x: Tensor, axis: str, src: Type, dst: Type) -> Tensor:
    """`convert` with its gradient, for autograd: graphs get both from passes/differentiate.py instead."""
    return _Conversion.apply(x, axis, src, dst)


@dataclass(frozen=True)
class Sample:
    """A call of an op with real tensors among its arguments.

    differentiable    how many of its first operands torch can differentiate
    sharded           False: the rule is right to offer no shards of this call
    compare           False: the values mean nothing (`empty`), only shapes are compared
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    differentiable: int = 99
    sharded: bool = True
    compare: bool = True

    def __str__(self) -> str:
        def text(value: Any) -> str:
            match value:
                case Tensor():
                    return "x".join(map(str, value.shape)) or "scalar"
                case list() | tuple():
                    return "[" + ",".join(map(text, value)) + "]"
            return str(value)

        named = [f"{k}={text(v)}" for k, v in self.kwargs.items()]
        return f"{self.target}({', '.join([*map(text, self.args), *named])})".removeprefix("aten.")


@dataclass(frozen=True)
class Run:
    """A sample on one rank: the call as rules see it, its tensors, results, cotangents of the results and gradients."""

    call: OpCall
    tensors: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    cotangents: tuple[Tensor | None, ...]
    gradients: tuple[Tensor | None, ...]


def run_whole(sample: Sample, *, grad: bool) -> Run:
    """The reference. `grad`: floating point operands want gradients, where the op can give them."""
    found: list[Tensor] = []

    def visit(value: Any) -> Any:
        match value:
            case Tensor():
                found.append(value)
                return Operand(len(found) - 1)
            case list() | tuple():
                return type(value)(map(visit, value))
        return value

    args, kwargs = visit(tuple(sample.args)), {k: visit(v) for k, v in sample.kwargs.items()}
    wants = [grad and k < sample.differentiable and has_derivatives(t.dtype) for k, t in enumerate(found)]
    leaves = [t.detach().clone().requires_grad_(w) for t, w in zip(found, wants, strict=True)]
    results = _call(sample.target, args, kwargs, leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = tuple(_random_like(r, generator) if r.requires_grad else None for r in results)
    gradients = _gradients(results, cotangents, leaves, wants)
    operands = tuple(TensorMeta(tuple(t.shape), t.dtype, w) for t, w in zip(found, wants, strict=True))
    metas = tuple(TensorMeta(tuple(r.shape), r.dtype, r.requires_grad) for r in results)
    results = tuple(r.detach() for r in results)
    return Run(OpCall(sample.target, args, kwargs, operands, metas), tuple(found), results, cotangents, gradients)


def _call(target: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    args, kwargs = map_operands((args, dict(kwargs)), lambda o: tensors[o.index])
    found = target(*args, **kwargs)
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _gradients(
    results: Sequence[Tensor], cotangents: Sequence[Tensor | None], leaves: Sequence[Tensor], wants: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the leaves that want one; zeros where none flows."""
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if c is not None and r.requires_grad]
    wanted = [x for x, w in zip(leaves, wants, strict=True) if w]
    if not pairs or not wanted:
        return tuple(None for _ in leaves)
    found = torch.autograd.grad([r for r, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True, materialize_grads=True)
    rest = iter(found)
    return tuple(next(rest) if w else None for w in wants)


def suggested_cuts(shape: Sequence[int], n: int) -> dict[int, list[Sections]]:
    """For each dim: an uneven cut, cuts in two and three equal sections, and one in two unequal ones. Every rank has some."""
    found: dict[int, list[Sections]] = {}
    for dim, size in enumerate(shape):
        rest = size - size // 3
        cuts = [((1,) * (n - 1) + (size - n + 1,),)] if size >= n else []
        cuts += [even_sections(size // k, n) * k for k in (2, 3) if size % k == 0 and size // k >= n]
        cuts += [(balanced_sizes(size // 3, n)[::-1], balanced_sizes(rest, n))] if rest >= n else []
        found[dim] = cuts
    return found


def splits_of(call: OpCall, n: int) -> dict[tuple[str, int, int], list[Sections]]:
    return {
        (side, i, dim): cuts
        for side, metas in (("in", call.operands), ("out", call.results))
        for i, meta in enumerate(metas)
        for dim, cuts in suggested_cuts(meta.shape, n).items()
    }


Choice = Callable[[OpCall], Strategy]
Coordinates = tuple[int, ...]


class Lowered:
    """An op call lowered along some axes, one after the other, at every coordinate of their mesh.

    `path` says for each axis which strategy a call takes. At coordinates of the first k axes, `strategies` has the choice for
    axis k and `calls` the call that is left there.
    """

    def __init__(self, call: OpCall, path: Sequence[tuple[Axis, Choice]]) -> None:
        self.axes = [axis for axis, _ in path]
        self.calls: dict[Coordinates, OpCall] = {(): call}
        self.strategies: dict[Coordinates, Strategy] = {}
        before: list[Coordinates] = [()]
        for axis, choose in path:
            after = []
            for at in before:
                strategy = self.strategies[at] = choose(self.calls[at])
                for i in range(axis.size):
                    self.calls[*at, i] = _local_call(self.calls[at], strategy, i)
                    after.append((*at, i))
            before = after
        self.ranks = before

    def deal(self, whole: Tensor, type_of: Callable[[Strategy], Type], generator: torch.Generator) -> dict[Coordinates, Tensor]:
        """The part of a value at the coordinates of every rank."""
        held = {(): whole}
        for axis in self.axes:
            held = {
                (*at, i): part
                for at, x in held.items()
                for i, part in enumerate(deal(x, type_of(self.strategies[at]), axis.size, generator))
            }
        return held

    def join(self, parts: Mapping[Coordinates, Tensor], type_of: Callable[[Strategy], Type]) -> Tensor:
        for axis in reversed(self.axes):
            before = dict.fromkeys(at[:-1] for at in parts)
            parts = {at: join([parts[*at, i] for i in range(axis.size)], type_of(self.strategies[at])) for at in before}
        return parts[()]


def _local_call(call: OpCall, strategy: Strategy, index: int) -> OpCall:
    target, args, kwargs = localize(call, strategy, index)

    def local(metas: tuple[TensorMeta, ...], types: tuple[Type, ...]) -> tuple[TensorMeta, ...]:
        return tuple(replace(m, shape=local_shape(m.shape, t, index)) for m, t in zip(metas, types, strict=True))

    return OpCall(target, args, kwargs, local(call.operands, strategy.ins), local(call.results, strategy.outs))


def check_lowered(sample: Sample, whole: Run, path: Sequence[tuple[Axis, Choice]]) -> None:
    """Raises VerificationError unless the ranks of the axes together compute what one rank computes, forward and backward."""
    lowered, generator = Lowered(whole.call, path), torch.Generator().manual_seed(2)
    mesh = Mesh(tuple(a.name for a in lowered.axes), tuple(a.size for a in lowered.axes))
    wants = [o.grad for o in whole.call.operands]
    held = [lowered.deal(t, lambda s, k=k: s.ins[k], generator) for k, t in enumerate(whole.tensors)]
    seeds = [
        None if c is None else lowered.deal(c, lambda s, k=k: gradient_type(s.outs[k]), generator)
        for k, c in enumerate(whole.cotangents)
    ]

    def body(rank: int, world: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        at = lowered.ranks[rank]
        local = lowered.calls[at]
        with use_communicator(world.communicator(mesh, rank)):
            leaves = [h[at].requires_grad_(w) for h, w in zip(held, wants, strict=True)]
            results = _call(local.target, local.args, local.kwargs, leaves)
            gradients = _gradients(results, [None if s is None else s[at] for s in seeds], leaves, wants)
            return tuple(r.detach() for r in results), gradients

    narrow = any(x.dtype == torch.float32 for x in (*whole.tensors, *whole.results))
    ranks = dict(zip(lowered.ranks, run_ranks(mesh.world_size, body), strict=True))
    for k, expected in enumerate(whole.results):
        parts = {at: results[k] if sample.compare else torch.zeros_like(results[k]) for at, (results, _) in ranks.items()}
        got = lowered.join(parts, lambda s, k=k: s.outs[k])
        same(got, expected if sample.compare else torch.zeros_like(expected), f"result {k}", narrow=narrow)
    for k, expected in enumerate(whole.gradients):
        if expected is not None:
            parts = {at: g for at, (_, gradients) in ranks.items() if (g := gradients[k]) is not None}
            got = lowered.join(parts, lambda s, k=k: gradient_type(s.ins[k]))
            same(got, expected, f"gradient of operand {k}", narrow=narrow)


def check_strategy(sample: Sample, whole: Run, axis: Axis, strategy: Strategy) -> None:
    """`check_lowered` along one axis. A note of the error names the strategy."""
    try:
        check_lowered(sample, whole, [(axis, lambda _: strategy)])
    except Exception as error:
        ins, outs = (", ".join(map(str, types)) for types in (strategy.ins, strategy.outs))
        error.add_note(f"{sample} over {axis.size} ranks under strategy {strategy.label!r}: ({ins}) -> ({outs})")
        raise


def same(got: Tensor, expected: Tensor, what: str, *, narrow: bool = False) -> None:
    _require(got.shape == expected.shape, f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}")
    _require(got.dtype == expected.dtype, f"{what}: {got.dtype} for {expected.dtype}")
    rtol, atol = (1e-4, 1e-5) if narrow else (1e-9, 1e-10)
    if not torch.allclose(got, expected, rtol=rtol, atol=atol, equal_nan=True):
        raise VerificationError(f"{what}: off by {(got - expected).abs().max():.3g}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise VerificationError(message)


def runs(sample: Sample) -> list[Run]:
    """With gradients, where torch has them, and, as rules may offer more then, without."""
    plain = run_whole(sample, grad=False)
    try:
        whole = run_whole(sample, grad=True)
    except RuntimeError:  # no derivative, or one that the op's other results have not
        return [plain]
    return [whole, plain] if any(o.grad for o in whole.call.operands) else [plain]


def check_rule(op: Any, *args: Any, **kwargs: Any) -> int:
    """Run `op(*args, **kwargs)` under every strategy that its rule offers, over two and over three ranks in this process, even and
    uneven, forward and backward. How many were run: 0 where the op has no rule, or one that offers nothing for these shapes.

    Raises VerificationError, saying under which strategy, where the ranks together do not compute what one does. Floating-point
    tensors should be float64, and dims longer than three.
    """
    target = op if isinstance(op, OpOverload) else op.default
    sample, count = Sample(target, args, kwargs), 0
    for whole in runs(sample):
        for axis in (Axis("x", 2), Axis("x", 3)):
            for strategy in strategies(whole.call, axis, splits_of(whole.call, axis.size)):
                if any(isinstance(t, Varying) for t in (*strategy.ins, *strategy.outs)):
                    check_strategy(sample, whole, axis, strategy)
                    count += 1
    return count
