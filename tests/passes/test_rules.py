"""Every sharding rule by execution: what the ranks compute together, and its gradients, are those of one rank."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from samples import aten, generic_sample, is_sharded, ours, pairs, samples, tagged_pointwise_ops

from shardwright.compiler.check_rule import Choice, Run, Sample, check_lowered, check_strategy, run_whole, splits_of
from shardwright.passes.convert import convert
from shardwright.passes.rules.base import RULES, Axis, OpCall, Strategy, strategies
from shardwright.passes.types import Sections, Varying, even_sections

SAMPLES = samples()
AXES = [Axis("x", 2), Axis("x", 3)]
ELSEWHERE: dict[object, str] = {
    convert: "test_convert.py",
    ours.dropout_shard.default: "test_dropout_lowered_twice",
    ours.uniform_shard.default: "test_uniform_lowered_twice",
}
"""Ops that have no sample here, and where they are tested."""


def runs(sample: Sample) -> list[Run]:
    """The sample with gradients and, as rules may offer more without, without them."""
    with_gradient = run_whole(sample, grad=True)
    differs = any(o.grad for o in with_gradient.call.operands)
    return [with_gradient, run_whole(sample, grad=False)] if differs else [with_gradient]


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: f"{axis.size}-ranks")
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_rule(sample: Sample, axis: Axis) -> None:
    sharded = False
    for whole in runs(sample):
        for strategy in strategies(whole.call, axis, splits_of(whole.call, axis.size)):
            check_strategy(sample, whole, axis, strategy)
            sharded |= is_sharded(strategy)
    assert sharded == sample.sharded, "the rule offers " + ("nothing" if sample.sharded else "what it should not")


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.sharded], ids=str)
def test_rule_over_two_axes(sample: Sample) -> None:
    """What one factor leaves of a call is cut again, by the same or another."""
    whole = run_whole(sample, grad=True)
    for _, path in pairs(whole.call):
        check_lowered(sample, whole, path)


FAILS_ON_NOTHING = {aten.pixel_shuffle.default, aten.pixel_unshuffle.default}
"""Ops whose backward in torch itself fails on tensors without elements."""


@pytest.mark.parametrize(
    "sample",
    [s for s in SAMPLES if s.args and torch.is_tensor(s.args[0]) and s.args[0].dim() and s.target not in FAILS_ON_NOTHING],
    ids=str,
)
def test_a_rank_without_samples(sample: Sample) -> None:
    """A batch smaller than its axis leaves ranks with no row of dim 0."""
    whole = run_whole(sample, grad=True)
    empty = Varying(0, ((sample.args[0].shape[0], 0),))
    for strategy in strategies(whole.call, AXES[0], {("in", 0, 0): [empty.sections]}):
        if strategy.ins[0] == empty:
            check_strategy(sample, whole, AXES[0], strategy)


MUST_OFFER = {
    aten.mm.default: "m k n",
    aten.bmm.default: "b m k n",
    aten.linear.default: "...2 ...1 k n",
    ours.attention.default: "b h i",
    ours.chunked_attention.default: "b h i",
    aten.embedding.default: "i0 i1 h v",
    ours.logsumexp.default: "d0 d1 v",
    ours.pick.default: "d0 d1 v",
    aten.reshape.default: "f0 f1 f2 f3 P",
    aten.layer_norm.default: "d0 d1",
    aten.convolution.default: "n o c",
    aten.group_norm.default: "n g",
    aten.split.Tensor: "d0 piece",
    aten.sum.dim_IntList: "d0 d1 d2 P",
    ours.dropout.default: "d0 d1 d2 P",
}
"""Factors without which a transformer would not be sharded as it should, for the first sample of each op."""


@pytest.mark.parametrize("target", MUST_OFFER, ids=str)
def test_rule_offers(target: object) -> None:
    sample = next(s for s in SAMPLES if s.target is target)
    offered = {s.label for s in strategies(run_whole(sample, grad=True).call, AXES[0])}
    assert offered >= {"I", "R", *MUST_OFFER[target].split()}


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_grouped_convolution_offers_groups_and_channels(transposed: bool) -> None:
    weight = torch.zeros(4, 3, 3) if transposed else torch.zeros(6, 2, 3)
    sample = Sample(aten.convolution.default, (torch.zeros(2, 4, 7), weight, None, [1], [0], [1], transposed, [0], 2))
    offered = {s.label for s in strategies(run_whole(sample, grad=True).call, AXES[0])}
    assert offered >= {"n", "g", "o", "c"}


def test_uniform_offers_every_dim() -> None:
    sample = next(s for s in SAMPLES if s.target is ours.uniform.default)
    assert {s.label for s in strategies(run_whole(sample, grad=False).call, AXES[0])} == {"I", "d0", "d1", "d2"}


def test_every_rule_has_a_sample() -> None:
    assert not set(RULES) - {s.target for s in SAMPLES} - set(ELSEWHERE), "ops with a rule and no sample"


def test_elementwise_ops() -> None:
    """The rule that every op with torch's pointwise tag gets."""
    tried = 0
    for op in tagged_pointwise_ops():
        sample = generic_sample(op) if op not in RULES else None
        if sample is not None:
            tried += 1
            whole = run_whole(sample, grad=True)
            for strategy in strategies(whole.call, AXES[0], {("out", 0, 0): [((1, 4),)]}):
                check_strategy(sample, whole, AXES[0], strategy)
    assert tried > 180, f"only {tried} ops could be called"


@pytest.mark.parametrize("labels", list(itertools.product(("d0", "d1", "d2", "P"), repeat=2)), ids="-".join)
def test_dropout_lowered_twice(labels: tuple[str, str]) -> None:
    """A cut of a cut draws the numbers of the whole."""
    x = torch.randn(7, 8, 9, dtype=torch.float64)
    sample = Sample(ours.dropout.default, (x, torch.tensor(11), 0.4, 6))
    check_lowered(sample, run_whole(sample, grad=True), by_label(labels))


@pytest.mark.parametrize("labels", list(itertools.product(("d0", "d1", "d2"), repeat=2)), ids="-".join)
def test_uniform_lowered_twice(labels: tuple[str, str]) -> None:
    sample = Sample(ours.uniform.default, (torch.tensor(11), 6, [7, 8, 9], torch.float64))
    check_lowered(sample, run_whole(sample, grad=False), by_label(labels))


@pytest.mark.parametrize("first, second", [(((2, 5),), ((1, 0, 4), (0, 1, 1))), (((1, 2), (3, 1)), ((2, 1, 1),))], ids=str)
def test_uniform_lowered_twice_unevenly(first: Sections, second: Sections) -> None:
    """Sections that differ between ranks, of which some get nothing."""
    sample = Sample(ours.uniform.default, (torch.tensor(11), 6, [7, 300], torch.float64))

    def cut(axis: Axis, sections: Sections) -> Choice:
        def choose(call: OpCall) -> Strategy:
            size = call.results[0].shape[0]
            own = sections if sum(map(sum, sections)) == size else even_sections(size, axis.size)
            offered = strategies(call, axis, {("out", 0, 0): [own]})
            return next(s for s in offered if s.outs == (Varying(0, own),))

        return choose

    path = [(Axis("x", 2), cut(Axis("x", 2), first)), (Axis("y", 3), cut(Axis("y", 3), second))]
    check_lowered(sample, run_whole(sample, grad=False), path)


def by_label(labels: Sequence[str]) -> list[tuple[Axis, Choice]]:
    """One axis after the other, each taken by the strategy of this label."""

    def choice(axis: Axis, label: str) -> Choice:
        return lambda call: next(s for s in strategies(call, axis) if s.label == label)

    return [(axis, choice(axis, label)) for axis, label in zip((Axis("x", 2), Axis("y", 3)), labels, strict=False)]


def test_the_documentation_has_every_family() -> None:
    """docs/rules.md names each file of rules: what it offers, and what is missing."""
    root = Path(__file__).parents[2]
    told = (root / "docs" / "rules.md").read_text()
    families = {Path(inspect.getfile(function)).name for function in RULES.values()} - {"notation.py", Path(__file__).name}
    assert families
    assert [name for name in sorted(families) if f"`{name}`" not in told] == []
