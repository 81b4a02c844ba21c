"""Rules and conversions by execution: values are dealt to the ranks of an axis by their types, run, and put together again.

`deal` and `join` say what a type means in numbers. `check_strategy` runs one op call under one strategy on every rank, and
compares results and gradients with the same call on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwright.passes.graph_tools import map_operands
from shardwright.passes.ops.collectives import join_shards, take_shard, use_communicator
from shardwright.passes.rules.base import Axis, OpCall, Operand, Strategy, TensorMeta, localize
from shardwright.passes.types import Partial, Sections, Type, Varying, balanced_sizes, even_sections, gradient_type
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.program import Mesh

AXIS = "x"


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
    if x.is_floating_point():
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return torch.randint(-5, 5, x.shape, dtype=x.dtype, generator=generator)


def join(parts: Sequence[Tensor], type_: Type) -> Tensor:
    """The whole that the ranks' parts stand for. Asserts that I and R parts are equal."""
    match type_:
        case Varying(dim, sections):
            for i, part in enumerate(parts):
                held = sum(section[i] for section in sections)
                assert part.shape[dim] == held, f"rank {i} holds {tuple(part.shape)} where {type_} gives it {held} on dim {dim}"
            return join_shards(parts, dim, sections)
        case Partial(op):
            rows = torch.stack(list(parts))
            return rows.sum(0) if op == "sum" else rows.amax(0) if op == "max" else rows.amin(0)
    for i, part in enumerate(parts):
        assert torch.allclose(part, parts[0], rtol=1e-10, atol=1e-12, equal_nan=True), f"{type_}: rank {i} differs from rank 0"
    return parts[0]


@dataclass(frozen=True)
class Sample:
    """A call of an op with real tensors among its arguments.

    differentiable    whether gradients are compared (where autograd gives any)
    sharded           False: the rule is right to offer no shards of this call
    compare           False: the values mean nothing (`empty`), only shapes are compared
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    differentiable: bool = True
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
    """The reference. `grad`: floating point operands want gradients."""
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
    wants = [grad and t.is_floating_point() for t in found]
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
    place = lambda o: tensors[o.index]
    found = target(*map_operands(args, place), **map_operands(dict(kwargs), place))
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
    """For each dim: an uneven cut, one where the last rank holds nothing, and cuts in 2 and 3 equal and unequal sections."""
    found: dict[int, list[Sections]] = {}
    for dim, size in enumerate(shape):
        cuts: list[Sections] = []
        if size >= n:
            cuts.append(((*balanced_sizes(size, n)[::-1],),))
            cuts.append(((size - n + 1, *[1] * (n - 1)),))
        cuts += [even_sections(size // k, n) * k for k in (2, 3) if size % k == 0 and size // k > 1]
        if size > 2:
            cuts.append((balanced_sizes(size // 3, n)[::-1], balanced_sizes(size - size // 3, n)))
        found[dim] = cuts
    return found


def splits_of(call: OpCall, n: int) -> dict[tuple[str, int, int], list[Sections]]:
    return {
        (side, i, dim): cuts
        for side, metas in (("in", call.operands), ("out", call.results))
        for i, meta in enumerate(metas)
        for dim, cuts in suggested_cuts(meta.shape, n).items()
    }


def check_strategy(sample: Sample, whole: Run, axis: Axis, strategy: Strategy) -> None:
    """Assert that the ranks of `axis` together compute what one rank computes, forward and backward."""
    n, generator = axis.size, torch.Generator().manual_seed(2)
    held = [deal(t, type_, n, generator) for t, type_ in zip(whole.tensors, strategy.ins, strict=True)]
    seeds = [
        None if c is None else deal(c, gradient_type(type_), n, generator)
        for c, type_ in zip(whole.cotangents, strategy.outs, strict=True)
    ]
    wants = [o.grad for o in whole.call.operands]

    def body(rank: int, world: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        with use_communicator(world.communicator(Mesh((axis.name,), (n,)), rank)):
            leaves = [h[rank].requires_grad_(w) for h, w in zip(held, wants, strict=True)]
            results = _call(*localize(whole.call, strategy, rank), leaves)
            gradients = _gradients(results, [None if s is None else s[rank] for s in seeds], leaves, wants)
            return tuple(r.detach() for r in results), gradients

    ranks = run_ranks(n, body)
    for k, (expected, type_) in enumerate(zip(whole.results, strategy.outs, strict=True)):
        same(join([results[k] for results, _ in ranks], type_) if sample.compare else expected, expected, f"result {k}, {type_}")
    for k, (expected, type_) in enumerate(zip(whole.gradients, strategy.ins, strict=True)):
        if expected is not None:
            parts = [gradients[k] for _, gradients in ranks]
            same(join(parts, gradient_type(type_)), expected, f"gradient of operand {k}, {type_}")


def same(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} for {expected.dtype}"
    narrow = expected.dtype in (torch.float32, torch.complex64)
    rtol, atol = (1e-4, 1e-5) if narrow else (1e-9, 1e-10)
    assert torch.allclose(got, expected, rtol=rtol, atol=atol, equal_nan=True), f"{what}: off by {(got - expected).abs().max():.3g}"
