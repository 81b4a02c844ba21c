"""Random graphs on random meshes under random strategies: what the check accepts computes what one device does, and only that.

SHARDWRIGHT_EXAMPLES=20 draws 20 times as many.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from mutations import Mutation, mutations
from properties import examples
from random_graphs import Recipe, build, recipes
from random_lowering import error_of, lowered_at_random
from rewrites import Rewrite, rewrites

from shardwright.passes.check import TypeCheckError
from shardwright.passes.rules.base import Axis

MESHES = {"two": (Axis("x", 2),), "three": (Axis("x", 3),), "two-by-two": (Axis("x", 2), Axis("y", 2))}
EXAMPLES = {"two": 100, "three": 100, "two-by-two": 50}
SEEDS = st.integers(0, 2**16)


@pytest.mark.parametrize("mesh", MESHES)
def test_what_type_checks_is_equal_to_one_device(mesh: str) -> None:
    @given(recipes(), SEEDS)
    @examples(EXAMPLES[mesh])
    def equal(recipe: Recipe, seed: int) -> None:
        assert error_of(lowered_at_random(build(recipe), MESHES[mesh], random.Random(seed))) < 1.0

    equal()


@given(recipes(most=4), st.sampled_from(sorted(MESHES)), SEEDS)
@examples(10)
def test_so_does_the_backward_that_is_emitted(recipe: Recipe, mesh: str, seed: int) -> None:
    assert error_of(lowered_at_random(build(recipe), MESHES[mesh], random.Random(seed)), joint=True) < 1.0


NEEDED = 100
"""Rewrites, and refusals, that are seen at least."""
REWRITES = ["convert in two steps", "convert twice", "convert at each use", "there and back", "another strategy"]
REWRITES += ["compute later", "compute earlier"]


def test_what_preserves_equality_is_accepted() -> None:
    tried: Counter[str] = Counter()

    @given(recipes(), st.sampled_from((2, 3)), SEEDS)
    @examples(30)
    def accepted(recipe: Recipe, n: int, seed: int) -> None:
        axis, choose = Axis("x", n), random.Random(seed)
        sharded = lowered_at_random(build(recipe), (axis,), choose)
        kinds: defaultdict[str, list[Rewrite]] = defaultdict(list)
        for rewrite in rewrites(sharded.graphs[0,], axis):
            kinds[rewrite.kind].append(rewrite)
        for rewrite in [choose.choice(found) for found in kinds.values()]:
            note(str(rewrite))
            changed = sharded.changed(lambda gm, index, r=rewrite: r(gm, axis, index, sharded.values))
            changed.check()
            assert error_of(changed) < 1.0
            tried[rewrite.kind] += 1

    accepted()
    print(f"\naccepted: {dict(tried)}")
    assert tried.total() >= NEEDED and min(tried[kind] for kind in REWRITES) > 0, tried


def test_what_breaks_equality_is_refused() -> None:
    """What only numbers can see is a table that was taken for another of its shape: everything else the check must see."""
    refused: Counter[str] = Counter()

    @given(recipes(), st.sampled_from((2, 3)), SEEDS)
    @examples(40)
    def sound(recipe: Recipe, n: int, seed: int) -> None:
        axis, choose = Axis("x", n), random.Random(seed)
        sharded = lowered_at_random(build(recipe), (axis,), choose)
        given_types = {p.meta["key"]: p.meta["types"]["x"] for p in sharded.graphs[0,].graph.nodes if p.op == "placeholder"}
        kinds: defaultdict[str, list[Mutation]] = defaultdict(list)
        for mutation in mutations(sharded.graphs[0,], axis):
            kinds[mutation.kind].append(mutation)
        for mutation in [choose.choice(found) for found in kinds.values()]:
            note(str(mutation))
            changed = sharded.changed(lambda gm, index, m=mutation: m(gm))
            try:
                changed.check(given_types)
            except TypeCheckError:
                refused["by type"] += 1
                continue
            if mutation.kind in ("take another table", "shift a table"):
                refused["by numbers"] += not error_of(changed) < 1.0
            else:
                assert error_of(changed) < 1.0
                refused["equal after all"] += 1

    sound()
    print(f"\nrefused: {dict(refused)}")
    assert refused["by type"] >= NEEDED and refused["by numbers"] > 0, refused
