"""Every conversion by execution: its value stays the same, its gradient is the conjugate, and what must not exist is refused."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from shardwright.compiler.check_rule import Sample, check_lowered, deal, differentiable, join, run_whole
from shardwright.passes.convert import Step, backward_ops, convert, exists, forward_ops, is_free, traffic
from shardwright.passes.ops.collectives import use_communicator
from shardwright.passes.rules.base import Axis, OpCall, Strategy, strategies
from shardwright.passes.types import I, P, Partial, R, Type, Varying, gradient_type, shard
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.program import Mesh

N, SHAPE = 3, (7, 9)
MAX = Partial("max")
SHARDS = [
    shard(0, 7, N),
    Varying(0, ((2, 4, 1),)),
    shard(1, 9, N),
    Varying(1, ((1, 1, 1),) * 3),
    Varying(1, ((2, 1, 0), (1, 2, 3))),
    Varying(1, ((9, 0, 0),)),
]
TYPES: list[Type] = [I, R, P, *SHARDS]
PAIRS = [(src, dst) for src, dst in itertools.product(TYPES, TYPES) if src != dst and exists(src, dst, grad=True)]


def name(pair: tuple[Type, Type]) -> str:
    return "-to-".join(str(t).replace(" ", "") for t in pair)


def on_ranks(steps: list[Step], parts: list[Tensor]) -> list[Tensor]:
    def body(rank: int, world: object) -> Tensor:
        x = parts[rank]
        with use_communicator(world.communicator(Mesh(("x",), (len(parts),)), rank)):
            for op, args in steps:
                x = op(x, *args)
        return x

    return run_ranks(len(parts), body)


def pairing(values: list[Tensor], type_: Type, gradients: list[Tensor]) -> float:
    """<x, g> of a value and its cotangent: Invariant values count once, all others are summed over ranks."""
    pairs = list(zip(values, gradients, strict=True))
    return float(sum((x * g).sum() for x, g in (pairs[:1] if type_ == I else pairs)))


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_conversion(pair: tuple[Type, Type]) -> None:
    src, dst = pair
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)
    values = deal(x, src, N, generator)
    converted = on_ranks(forward_ops("x", src, dst), values)
    torch.testing.assert_close(join(converted, dst), x)
    cotangents = deal(y, gradient_type(dst), N, generator)
    gradients = on_ranks(backward_ops("x", src, dst), cotangents)
    torch.testing.assert_close(join(gradients, gradient_type(src)), y)
    assert pairing(converted, dst, cotangents) == pytest.approx(pairing(values, src, gradients)), "not conjugate"


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("dst", [I, R], ids=str)
def test_partial_extremes(op: str, dst: Type) -> None:
    parts = list(torch.randn(N, *SHAPE, dtype=torch.float64))
    got = join(on_ranks(forward_ops("x", Partial(op), dst), parts), dst)
    assert torch.equal(got, join(parts, Partial(op)))
    assert exists(Partial(op), dst, grad=False) and not exists(Partial(op), dst, grad=True)


@pytest.mark.parametrize(
    ("src", "dst"),
    [(R, I), (I, P), *((v, P) for v in SHARDS), (MAX, P), (P, MAX), (MAX, SHARDS[0]), (I, MAX), (MAX, Partial("min"))],
    ids=str,
)
def test_refused(src: Type, dst: Type) -> None:
    assert not exists(src, dst, grad=True)
    with pytest.raises(ValueError, match="no conversion|no gradient"):
        backward_ops("x", src, dst)


@pytest.mark.parametrize("type_", [*TYPES, MAX], ids=str)
def test_to_the_same_type_is_nothing(type_: Type) -> None:
    assert forward_ops("x", type_, type_) == backward_ops("x", type_, type_) == []


@pytest.mark.parametrize("src", TYPES, ids=str)
def test_without_gradient_invariant_and_replicate_are_one(src: Type) -> None:
    assert is_free(R, I, grad=False) and is_free(I, R, grad=False)
    assert not is_free(R, I, grad=True) and not is_free(I, R, grad=True)
    assert exists(src, I, grad=False) and exists(src, R, grad=False)
    assert exists(I, src, grad=False) == exists(R, src, grad=False)
    assert traffic(src, R, grad=False).backward == ()


COLLECTIVES = {
    ("I", "R"): ((), ("all_reduce",)),
    ("I", "V"): (("shard",), ("all_gather",)),
    ("V", "I"): (("all_gather",), ("shard",)),
    ("V", "R"): (("all_gather",), ("reduce_scatter",)),
    ("P", "I"): (("all_reduce",), ()),
    ("P", "R"): (("all_reduce",), ("all_reduce",)),
    ("P", "V"): (("reduce_scatter",), ("all_gather",)),
    ("R", "V"): (("shard",), ("unshard",)),
    ("R", "P"): (("keep_first",), ("keep_first",)),
    ("V", "V"): (("all_to_all",), ("all_to_all",)),
}


def test_collectives_are_those_of_the_design() -> None:
    stand = {"I": I, "R": R, "P": P}
    for (src, dst), expected in COLLECTIVES.items():
        found = traffic(stand.get(src, SHARDS[0]), stand.get(dst, SHARDS[2]), grad=True)
        assert (found.forward, found.backward) == expected, (src, dst)


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_lowered_along_a_second_axis(pair: tuple[Type, Type]) -> None:
    """A conversion over one axis is an op to the next one, with a rule of its own."""
    whole = run_whole(Sample(identity, (torch.randn(4, *SHAPE, dtype=torch.float64),)), grad=True)
    src, dst = (Varying(t.dim + 1, t.sections) if isinstance(t, Varying) else t for t in pair)
    first, second = Axis("x", N), Axis("y", 2, ("x",))
    conversion = Strategy("convert", (src,), (dst,), differentiable, (*whole.call.args, first.name, src, dst), {})
    lowered = OpCall(convert, conversion.args, {}, whole.call.operands, whole.call.results)
    for label in {s.label for s in strategies(lowered, second)}:
        again = partial(along, second, label)
        check_lowered(Sample(identity, ()), whole, [(first, lambda _: conversion), (second, again)])


def identity(x: Tensor) -> Tensor:
    return x.clone()


def along(axis: Axis, label: str, call: OpCall) -> Strategy:
    """What the rule of `convert` says of a conversion, as a strategy of the function that stands for it here."""
    found = next(s for s in strategies(OpCall(convert, call.args, {}, call.operands, call.results), axis) if s.label == label)
    return Strategy(label, found.ins, found.outs, differentiable, found.args or call.args, {})
