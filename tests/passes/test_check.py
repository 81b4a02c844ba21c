"""Nothing wrong gets through: every mutation of a typed graph is refused by the static check, or else by the numerical one.

`pytest -s tests/passes/test_check.py` prints which caught how many.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import pytest
from mutations import Mutation, mutations
from programs import NEAR, case, plan
from torch import fx
from typed_execution import Typed, error_of, typed

from shardwright.passes.check import TypeCheckError, check
from shardwright.passes.convert import convert
from shardwright.passes.ops import StaticCommunicator
from shardwright.passes.ops.collectives import use_communicator
from shardwright.passes.types import P

MODELS = {"llama": {"layers": 1, "num_key_value_heads": 4}, "gpt2": {"layers": 1}, "bert": {"layers": 1}}
PLANS = {
    "tp4": {"tp": 4},
    "sequence-parallel": {"tp": 4, "sequence_parallel": True},
    "dp4": {"dp_shard": 4},
    "zero3": {"dp_shard": 4, "zero": 3},
    "by time, near": {"tp": 4, "byte_price": 0.0, "topology": NEAR},
}
SAMPLED = 12
"""Mutations of one kind tried on one graph: chosen by a fixed seed where there are more."""
CASES = list(itertools.product(MODELS, PLANS))


def sharded(model: str, strategy: str) -> Typed:
    return typed(case(model, **MODELS[model]), plan(**PLANS[strategy]))


def sampled(model: Typed) -> list[Mutation]:
    kinds: defaultdict[str, list[Mutation]] = defaultdict(list)
    for mutation in mutations(model.graphs[0], model.axis):
        kinds[mutation.kind].append(mutation)
    choose = random.Random(0)
    return [m for found in kinds.values() for m in choose.sample(found, min(SAMPLED, len(found)))]


def refused_by_type(model: Typed, graphs: Iterable[fx.GraphModule]) -> bool:
    """Whether the static check refuses the graph of any rank."""
    n, name = model.axis.size, model.axis.name
    for index, gm in enumerate(graphs):
        with use_communicator(StaticCommunicator({name: n}, {name: index})):
            try:
                check(gm, model.axis, index, model.placeholders)
            except TypeCheckError:
                return True
    return False


def refused_by_number(model: Typed, graphs: Sequence[fx.GraphModule]) -> bool:
    """Whether loss or gradients break the promise, or the ranks cannot run at all."""
    try:
        return not error_of(model, graphs) < 1.0
    except Exception:  # what a wrong graph raises may be anything
        return True


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_what_is_right_passes_both(model: str, strategy: str) -> None:
    found = sharded(model, strategy)
    assert not refused_by_type(found, found.graphs)
    assert error_of(found, found.graphs) < 1.0


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_no_mutation_gets_through(model: str, strategy: str) -> None:
    found = sharded(model, strategy)
    caught: defaultdict[str, Counter[str]] = defaultdict(Counter)
    escaped: list[Mutation] = []
    for mutation in sampled(found):
        if refused_by_type(found, (mutation(gm) for gm in found.graphs)):
            caught[mutation.kind]["type"] += 1
        elif refused_by_number(found, [mutation(gm) for gm in found.graphs]):
            caught[mutation.kind]["number"] += 1
        else:
            escaped.append(mutation)
    lines = [f"{model} {strategy}: mutations refused by the type check, and by numbers alone"]
    lines += [f"    {kind:28}{c['type']:6}{c['number']:6}" for kind, c in sorted(caught.items())]
    print("\n" + "\n".join(lines))
    assert not escaped, "\n".join([*lines, "got through:", *(f"    {m}" for m in escaped)])


def test_an_error_says_where_and_which_types() -> None:
    found = sharded("llama", "tp4")
    gm = found.graphs[0]
    node = next(n for n in gm.graph.nodes if n.target is convert and n.args[2] == P)
    changed = next(m for m in mutations(gm, found.axis) if m.node == node.name and m.kind == "swap types")(gm)
    with use_communicator(StaticCommunicator({"tp": 4}, {"tp": 0})), pytest.raises(TypeCheckError) as error:
        check(changed, found.axis, 0, found.placeholders)
    text = str(error.value)
    assert node.name in text and node.meta["source"] in text and "'tp'" in text
    assert "from I" in text and "is P" in text, text
