"""The models' sharded graphs under another type checker, spmd_types: it agrees, but for the differences that are explained here.

`pytest -s tests/passes/test_oracle.py` prints how many wrong graphs, which our check refuses, it refuses too.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
from harness import Case
from mutations import Mutation, mutations
from oracle import REFUSED, Difference, differences
from programs import NEAR, case, lowered, plan
from test_check import refused_by_type
from torch import fx
from typed_execution import Typed, typed
from zoo import MODELS

from shardwright.passes.rules.base import Axis

PLANS = {
    "tp4": {"tp": 4},
    "sequence-parallel": {"tp": 4, "sequence_parallel": True},
    "dp4": {"dp_shard": 4},
    "zero3": {"dp_shard": 4, "zero": 3},
    "by time, near": {"tp": 4, "byte_price": 0.0, "topology": NEAR},
}
TWO_AXES = {
    "dp2 x tp2": {"dp_shard": 2, "tp": 2},
    "dp2 x sp2": {"dp_shard": 2, "tp": 2, "sequence_parallel": True},
    "dp2 x tp2 by time": {"dp_shard": 2, "tp": 2, "byte_price": 0.0, "topology": NEAR},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
}

SUMMED = "its types do not say which dim is cut: that a cut dim is summed over is for the user to say, by a reinterpretation V -> P"
OURS = "the op has a collective inside, which is not seen from outside"
OWN_SHARD = "of a value that all ranks have, each expands the part that is its own: a slice, written as a smaller size"
CONSTANT = "a constant made at the size of the rank's shard: equal on all ranks, and a shard of a whole constant too"

NAMES = {*MODELS} - {"llama4"}  # which is llama with other layers
TOKENS = {"llama", "gpt2", "gpt", "bert", "t5", "mixtral"}
EXPLAINED: dict[Difference, tuple[str, set[str]]] = {
    Difference("sum", "V", "P", "V"): (SUMMED, NAMES),
    Difference("linear", "V V", "P", "V"): (SUMMED, NAMES),
    Difference("matmul", "V V", "P", "V"): (SUMMED, {"gpt2"}),
    Difference("grouped_linear", "V V I", "P", "V"): (SUMMED, {"mixtral"}),
    Difference("convolution", "V V", "P", "V"): (SUMMED, {"resnet"}),
    Difference("embedding_shard", "V I", "P", "V"): (SUMMED, TOKENS),
    Difference("pick_shard", "V I", "P", "V"): (SUMMED, TOKENS),
    Difference("logsumexp_shard", "V", "I", "V"): (OURS, TOKENS),
    Difference("expand", "I", "V", "I"): (OWN_SHARD, {"bert", "t5"}),
    Difference("expand", "R", "V", "R"): (OWN_SHARD, {"vit"}),
    Difference("full", "", "V", "R"): (CONSTANT, {"t5", "lstm"}),
    Difference("arange_shard", "", "V", "R"): (CONSTANT, {"t5"}),
}
"""Every difference, its reason, and the models in which it is met."""

BY_VERSION = {("t5", Difference("expand", "I", "V", "I"))}
"""Of these, what torch from 2.15 on exports no more."""


def model_of(name: str) -> Case:
    return case(name, **({} if name in ("resnet", "mlp", "lstm") else {"layers": 1}))


def sharded(model: str, strategy: str) -> Typed:
    return typed(model_of(model), plan(**PLANS[strategy]))


def graphs(model: str) -> Iterator[tuple[str, fx.GraphModule, list[Axis]]]:
    """The first rank's under every strategy, and the axes over which it is typed."""
    for strategy in PLANS:
        found = sharded(model, strategy)
        yield strategy, found.graphs[0], [found.axis]
    for strategy, options in TWO_AXES.items():
        _, wanted, found = lowered(model_of(model), plan(**options))
        yield strategy, found.graph, [*map(Axis, wanted.mesh.axes, wanted.mesh.sizes)]


@pytest.mark.parametrize("model", sorted(NAMES))
def test_it_agrees_but_for_what_is_explained(model: str) -> None:
    met: dict[Difference, str] = {}
    for strategy, graph, axes in graphs(model):
        for node, difference in differences(graph, *axes):
            met.setdefault(difference, f"{strategy}, {node.name}: {difference}")
    listed = {d for d, (_, models) in EXPLAINED.items() if model in models}
    assert not met.keys() - listed, "not explained: " + "; ".join(met[d] for d in met.keys() - listed)
    gone = {d for d in listed - met.keys() if (model, d) not in BY_VERSION}
    assert not gone, "no longer met: " + "; ".join(map(str, gone))


SHARES = {("llama", "tp4"): 0.6, ("gpt2", "sequence-parallel"): 0.55, ("bert", "zero3"): 0.3}
"""Of the wrong conversions that our check refuses, how many at least it refuses too. It sees neither a cut of the wrong dim, nor a
removed gather before a product that sums what was cut, nor an input marked as what it is not."""
SAMPLED = 8


@pytest.mark.parametrize(("model", "strategy"), SHARES)
def test_it_refuses_wrong_conversions_too(model: str, strategy: str) -> None:
    found = sharded(model, strategy)
    kinds: defaultdict[str, list[Mutation]] = defaultdict(list)
    for mutation in mutations(found.graphs[0], found.axis):
        if "conversion" in mutation.kind or mutation.kind.startswith(("swap types", "retarget result", "retarget source")):
            kinds[mutation.kind].append(mutation)
    choose, ours, theirs = random.Random(0), Counter[str](), Counter[str]()
    for kind, all_ in kinds.items():
        for mutation in choose.sample(all_, min(SAMPLED, len(all_))):
            if refused_by_type(found, (mutation(gm) for gm in found.graphs)):
                ours[kind] += 1
                theirs[kind] += any(d not in EXPLAINED for _, d in differences(mutation(found.graphs[0]), found.axis))
    print(f"\n{model} {strategy}: wrong conversions that our check refuses, and spmd_types too")
    print("\n".join(f"    {kind:28}{count:6}{theirs[kind]:6}" for kind, count in sorted(ours.items())))
    assert theirs.total() >= SHARES[model, strategy] * ours.total() > 0, f"{theirs} of {ours}"


def test_what_is_not_a_conversion_is_refused() -> None:
    """The oracle itself: a node whose source is marked as another type than it has."""
    found = sharded("llama", "tp4")
    wrong = next(m for m in mutations(found.graphs[0], found.axis) if m.kind == "swap types")
    assert any(d.theirs == REFUSED for _, d in differences(wrong(found.graphs[0]), found.axis))
