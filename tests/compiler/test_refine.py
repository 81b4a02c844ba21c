"""The search under a limit of bytes: what it proves of layouts that fit, and that it finds what is near."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from harness import problem_of
from programs import NEAR, case, machine

from shardwright import Strategy
from shardwright.compiler import refine
from shardwright.compiler.candidates import Candidate, Search
from shardwright.compiler.strategy import resolve
from shardwright.compiler.topology import Topology

PRICES = (0.0, 1e-10, 1e-8, 1e-6)


def search_of(model: str, topology: Topology, strategy: Strategy, limit: float) -> Search:
    found = case(model, batch=8)
    request = resolve((4,), strategy)
    return Search(problem_of(found, [found.batch]), request, topology, found.batch, "global", None, limit)


def searched(search: Search) -> list[Candidate]:
    return sorted((c for c in search.candidates() if search.fits(c)), key=lambda c: c.per_sample)


@pytest.mark.parametrize("topology", [NEAR, machine(1e9)], ids=["fast", "slow"])
@pytest.mark.parametrize("model", ["gpt", "gpt2", "bert"])
def test_no_layouts_that_fit_take_less_than_is_proven(model: str, topology: Topology) -> None:
    free = searched(search_of(model, topology, Strategy(), math.inf))[0]
    for share in (0.8, 0.4):
        search = search_of(model, topology, Strategy(pp=1), share * free.predicted.peak_bytes)
        found = searched(search)
        best = found[0].per_sample if found else math.inf
        families = {(c.plan.mesh, c.plan.zero, c.plan.microbatches): c.plan for c in found if c.plan.byte_price is not None}
        for plan, held, kept in itertools.product(families.values(), PRICES, PRICES):
            tried = search.price(replace(plan, byte_price=held, kept_price=kept, whole=()))
            if search.fits(tried):
                assert tried.per_sample >= min(best, search.bound) * (1 - 1e-9), tried.plan.name


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_what_is_not_asked_is_not_faster(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search stops where nothing faster can follow: the plan is as fast as that of one that asks all families at all prices."""
    free = searched(search_of("gpt2", machine(1e9), Strategy(), math.inf))[0]
    limit = share * free.predicted.peak_bytes

    def best() -> tuple[float, float]:
        search = search_of("gpt2", machine(1e9), Strategy(), limit)
        return searched(search)[0].per_sample, search.bound

    seconds, bound = best()
    assert bound >= 0.98 * seconds
    monkeypatch.setattr(refine, "CLOSE", -math.inf)
    monkeypatch.setattr(refine, "ASKED", math.inf)
    whole, _ = best()
    assert seconds * (1 - 1e-3) <= whole <= seconds * (1 + 1e-9)
    assert whole >= min(seconds, bound) * (1 - 1e-9)
