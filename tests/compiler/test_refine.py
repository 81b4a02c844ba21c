"""The search under a limit of bytes: what it proves of plans that fit, and that it finds what is near."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from harness import mesh, problem_of
from programs import FAR, NEAR, adapted, case, machine
from properties import TIMES
from torch import nn

import shardwright
from benchmarks.plan_limits import vit_large
from shardwright import Strategy
from shardwright.compiler import refine, step_cost
from shardwright.compiler.candidates import Candidate, Search
from shardwright.compiler.dual import between
from shardwright.compiler.families import Family
from shardwright.compiler.gathers import Whole
from shardwright.compiler.layouts import Layouts, Mixed
from shardwright.compiler.mixing import DEARER, mixtures
from shardwright.compiler.plan import Plan, Prediction
from shardwright.compiler.strategy import resolve
from shardwright.compiler.topology import Level, Topology
from shardwright.compiler.totals import OF_BYTES, OF_SECONDS, totals_of

PRICES = ((0.0, 0.0), (1e-11, 0.0), (1e-9, 0.0), (1e-9, 1e-10), (1e-8, 1e-8), (1e-7, 1e-9))
"""Of a byte held and of one kept."""

TWO_LEVELS = replace(NEAR, levels=(Level("inner", 2, 1e8, 1e-9), Level("outer", 16, 1e10, 1e-9)))
HIDES = replace(machine(1e8), overlap={"data": 0.8})


def search_of(
    model: str, topology: Topology, strategy: Strategy, limit: float, ranks: int = 4, mode: str = "global", rows: int = 8
) -> Search:
    found = adapted(rows) if model == "adapted" else case(model, batch=rows)
    request = resolve((ranks,), strategy)
    return Search(problem_of(found, [found.batch]), request, topology, found.batch, mode, None, limit)


def searched(search: Search) -> list[Candidate]:
    return sorted((c for c in search.candidates() if search.fits(c)), key=lambda c: c.per_sample)


def others(search: Search, plan: Plan) -> Iterator[Candidate]:
    """Plans of a family: at prices that nobody asked, in Megatron's layouts, and with parameters kept whole."""
    for held, kept in PRICES if TIMES > 1 else PRICES[1::2]:
        tried = replace(plan, layouts=Layouts(byte_price=held, kept_price=kept), whole=())
        yield from search.completed(search.price(tried))
    for sequence in (False, True):
        megatron = replace(tried, layouts=Layouts(sequence=sequence))
        yield from search.completed(search.price(megatron))


CASES = {
    "gpt": ("gpt", NEAR, Strategy(), 4, "local"),
    "gpt, slow": ("gpt", machine(1e9), Strategy(), 4, "global"),
    "gpt2, slow": ("gpt2", machine(1e9), Strategy(pp=1), 4, "local"),
    "gpt, two networks": ("gpt", TWO_LEVELS, Strategy(), 8, "global"),
    "bert, overlap": ("bert", HIDES, Strategy(pp=1), 4, "global"),
    "vit, ZeRO over 2": ("vit", machine(1e9), Strategy(dp_shard=2, layouts="any"), 4, "global"),
    "gpt2, ZeRO-3": ("gpt2", FAR, Strategy(zero=3, layouts="any"), 4, "global"),
    "adapters": ("adapted", machine(1e9), Strategy(), 4, "global"),
    "t5": ("t5", machine(1e9), Strategy(), 4, "global"),
    "mixtral, stages": ("mixtral", machine(1e9), Strategy(pp=2, layouts="any"), 4, "local"),
}


@pytest.mark.parametrize("name", CASES)
def test_no_plan_that_fits_takes_less_than_is_proven(name: str) -> None:
    model, topology, strategy, ranks, mode = CASES[name]
    free = searched(search_of(model, topology, strategy, math.inf, ranks, mode))[0]
    for share in (0.7, 0.4) if TIMES > 1 else (0.4 if list(CASES).index(name) % 2 else 0.7,):
        search = search_of(model, topology, strategy, share * free.predicted.peak_bytes, ranks, mode)
        made = list(search.candidates())
        best = min((c.per_sample for c in made if search.fits(c)), default=math.inf)
        assert search.bound <= best * (1 + 1e-9)
        families = {(c.plan.mesh, c.plan.zero, c.plan.microbatches): c.plan for c in made if c.plan.layouts.any}
        for plan in families.values():
            if strategy.zero is None and plan.zero in (2, 3):
                plan = replace(plan, zero=5 - plan.zero)
            for tried in itertools.chain(others(search, plan), others(search, replace(plan, microbatches=2 * plan.microbatches))):
                if search.fits(tried) and tried.plan.microbatches <= search.batch.local_rows(plan.mesh):
                    assert tried.per_sample >= min(best, search.bound) * (1 - 1e-9), tried.plan.name


@pytest.mark.parametrize("topology", [NEAR, HIDES], ids=["near", "overlap"])
@pytest.mark.parametrize("model", ["gpt", "gpt2", "vit", "adapted"])
def test_a_step_takes_no_less_than_its_totals_say(model: str, topology: Topology) -> None:
    """With any number of whole parameters between two; and with just as many exactly as much, but for bytes without totals, and
    for the latencies of sums over tp."""
    search = search_of(model, topology, Strategy(), math.inf)
    plans = {(c.plan.mesh, c.plan.zero): replace(c.plan, whole=()) for c in search.candidates() if c.plan.layouts.any}
    for plan, (held, kept) in itertools.product(plans.values(), PRICES[::2]):
        size = plan.mesh.size("tp")
        cost = search.tensor.cost(size, Layouts(byte_price=held, kept_price=kept), search.load(plan))
        least, whole = search.tensor.least(size), search.steps.whole(plan.stages)
        few, most = (1, len(whole) - 1) if plan.zero == 3 else (0, 0)
        functions = search.steps.at_least(plan, whole[few : most + 1], least)
        between = [of(totals_of(cost)) for of in functions]
        for of, depends in zip(functions, (OF_SECONDS, OF_BYTES), strict=True):
            others = totals_of(cost)
            others[[j for j in range(len(others)) if j not in depends]] *= 7.0
            assert of(others) == of(totals_of(cost))
        for k in range(few, most + 1):
            found = search.steps.predict(replace(plan, whole=whole[k].names), cost, whole[k])
            seconds, size = (of(totals_of(cost)) for of in search.steps.at_least(plan, whole[k : k + 1], least))
            assert between[0] <= seconds * (1 + 1e-9)
            assert between[1] <= size * (1 + 1e-9)
            assert seconds == pytest.approx(found.step_seconds, rel=1e-3 if cost.sums else 1e-9)
            assert seconds <= found.step_seconds * (1 + 1e-9)
            assert size <= found.peak_bytes * (1 + 1e-9)
            gathering = search.steps.at_least(plan, whole[k : k + 1], replace(least, gathered=cost.gathered))
            assert [of(totals_of(cost)) for of in gathering] == pytest.approx([seconds, size], rel=1e-9)
            more = replace(cost, gathered=cost.gathered + 1e6)
            _, gathering = search.steps.at_least(plan, whole[k : k + 1], replace(least, gathered=more.gathered))
            grown = search.steps.predict(replace(plan, whole=whole[k].names), more, whole[k])
            assert size < gathering(totals_of(more)) <= grown.peak_bytes * (1 + 1e-9)


@pytest.mark.parametrize("model", ["gpt", "vit", "adapted"])
def test_as_much_runs_beside_a_backward_as_its_parts_let(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of placements whose backward has as many parts a step takes as much as their totals say; each is of some range."""
    search, ranges = search_of(model, HIDES, Strategy(zero=2), math.inf), 0
    monkeypatch.setattr(step_cost, "SEGMENT_BYTES", int(search.steps.trained / 5.5))
    plans = {c.plan.mesh: c.plan for c in search.candidates() if c.plan.layouts.any and c.plan.mesh.size("tp") > 1}
    for plan, (held, kept) in itertools.product(plans.values(), PRICES):
        size, layouts = plan.mesh.size("tp"), Layouts(byte_price=held, kept_price=kept)
        cost, least = search.tensor.cost(size, layouts, search.load(plan)), search.tensor.least(size)
        found = search.steps.alike_parts(plan, least.trainable)
        assert found[0][0] <= least.trainable and found[-1][1] == search.steps.trained
        assert all(one[1] >= other[0] for one, other in itertools.pairwise(found))
        ranges = max(ranges, len(found))
        trained = next(between for between in reversed(found) if between[0] <= cost.trainable <= between[1])
        seconds, _ = search.steps.at_least(plan, search.steps.whole(plan.stages)[:1], least, trained)
        _, predicted = search.predict(plan, cost)
        assert seconds(totals_of(cost)) <= predicted.step_seconds * (1 + 1e-9)
        assert seconds(totals_of(cost)) == pytest.approx(predicted.step_seconds, rel=1e-4)  # latencies over tp
    assert ranges > 2


@pytest.mark.parametrize("model", ["gpt", "vit"])
@pytest.mark.parametrize("sizes", [{"dp_shard": 2, "tp": 4}, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}], ids=str)
def test_what_just_fits_takes_no_less_than_is_proven_of_its_parts(
    model: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which copies are many, too: a rank holds less of these than of as many other parameters."""
    wide = replace(HIDES, levels=(Level("network", 8, 1e8, 1e-9),))
    strategy = Strategy(**sizes, zero=2, layouts="any")
    plan, found = Plan(mesh(**sizes), zero=2, layouts=Layouts(byte_price=0.0)), []
    free = search_of(model, wide, strategy, math.inf, ranks=8)
    monkeypatch.setattr(step_cost, "SEGMENT_BYTES", int(free.steps.trained / 5.5))
    for held, kept in PRICES:
        tried = replace(plan, layouts=Layouts(byte_price=held, kept_price=kept))
        for limit in (math.inf, 0.0):  # fast, and with small copies
            _, taken = free.of(limit=limit).predict(tried, free.cost(tried))
            search = free.of(limit=taken.peak_bytes * (1 + 1e-9))
            family = Family(search, plan, search.batch.samples(plan.mesh), 0, 0, 0.0)
            family.estimate()
            assert family.least <= taken.step_seconds * (1 + 1e-9)
            found.append(len(family.envelopes))
    assert max(found) > 2


def test_sums_that_the_backward_hides_are_chosen_where_that_is_faster() -> None:
    """And not where they are no others, or take longer than the backward does."""
    plan = Plan(mesh(dp_shard=2, tp=4), zero=2, layouts=Layouts(byte_price=0.0))
    chosen = []
    wide = replace(HIDES, levels=(Level("network", 8, 1e8, 1e-3),))
    for topology in (wide, replace(wide, overlap={})):
        search = search_of("gpt", topology, Strategy(dp_shard=2, tp=4, zero=2, layouts="any"), math.inf, ranks=8)
        cost = replace(search.cost(plan), trainable=2.0**27)
        cost = replace(cost, sums=search.steps.terms(plan).copies_rate * cost.trainable)
        for compute in (1e-6, 1e3):
            (taken, found), fast = search.predict(plan, replace(cost, compute=compute)), replace(cost, compute=compute)
            assert found.step_seconds <= search.steps.predict(plan, fast).step_seconds
            chosen.append(taken.beside > 0)
    assert chosen == [False, True, False, False]


@pytest.mark.parametrize("name", ["gpt, slow", "vit, ZeRO over 2", "gpt2, ZeRO-3", "adapters"])
def test_what_blocks_gather_divides_a_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever was placed, with blocks in two layouts too, no plan that fits takes less than the family does whose blocks gather
    as many bytes."""
    model, topology, strategy, ranks, mode = CASES[name]
    found: list[Family] = []
    divided = Family.gathering

    def gathering(family: Family, gathered: int, below: int | None) -> Family:
        found.append(divided(family, gathered, below))
        return found[-1]

    monkeypatch.setattr(refine, "FAR", 0.0)
    monkeypatch.setattr(refine, "VAIN", 1)
    monkeypatch.setattr(refine, "ASKED", 40)
    monkeypatch.setattr(Family, "gathering", gathering)
    checked = 0
    free = searched(search_of(model, topology, strategy, math.inf, ranks, mode))[0]
    for share in (0.8, 0.5):
        search = search_of(model, topology, strategy, share * free.predicted.peak_bytes, ranks, mode)
        made = list(search.candidates())
        assert search.bound <= min((c.per_sample for c in made if search.fits(c)), default=math.inf)
        for family in found:
            tp, (whole, *_) = family.plan.mesh.size("tp"), family.whole
            layouts = {c.plan.layouts for c in made if c.plan.layouts.mixed and c.plan.mesh.size("tp") == tp}
            layouts |= {Layouts(byte_price=held, kept_price=kept) for held, kept in PRICES}
            costs = [search.tensor.cost(tp, each, family.load) for each in layouts]
            for cost in (*costs, *family.explored.costs):
                _, predicted = search.predict(replace(family.plan, whole=whole.names), cost, whole)
                if predicted.peak_bytes <= search.limit and family.gathered <= cost.gathered < (family.below or math.inf):
                    checked += 1
                    assert predicted.step_seconds >= family.least * (1 - 1e-9)
        found.clear()
    assert checked > 0


def test_between_two_layouts_some_blocks_lie_in_each() -> None:
    """Where like blocks cannot all lie in the faster layouts, as many do as fit: faster than any plan in which they lie alike."""
    found = case("gpt", layers=8)
    request = resolve((4,), Strategy(tp=4, layouts="any"))

    def search(limit: float) -> Search:
        return Search(problem_of(found, [found.batch]), request, machine(1e9), found.batch, "global", None, limit)

    tight = search(0.7 * searched(search(math.inf))[0].predicted.peak_bytes)
    fitting = searched(tight)
    best, alike = fitting[0], next(c for c in fitting if c.plan.layouts.mixed is None)
    mixed = best.plan.layouts.mixed
    assert mixed is not None and 1 <= len(mixed.blocks) < 8 and f"{len(mixed.blocks)} blocks in others" in best.plan.name
    assert best.per_sample < alike.per_sample * (1 - 2 * refine.CLOSE)
    assert 1 - tight.bound / best.per_sample < 0.3 * (1 - tight.bound / alike.per_sample)
    assert tight.fits(best)
    plan = replace(tight.with_layout(best.plan), predicted=best.predicted)
    assert f"In other layouts than the rest: blocks 0-{len(mixed.blocks) - 1}\n" in plan.explain()
    assert "Proven: no plan that fits takes over" in plan.explain()
    assert Plan.from_json(plan.to_json()) == plan
    blocks = [[t for name, t in plan.layout.items() if f".{k}." in name] for k in range(8)]
    assert [k for k in range(8) if blocks[k] != blocks[7]] == list(mixed.blocks)


def test_bytes_are_dearer_where_no_mixture_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked thoroughly, blocks in the layouts that fit pay more for a byte than these did, where none is faster at their prices."""
    found = case("gpt", layers=8)
    request = resolve((4,), Strategy(tp=4, layouts="any"))

    def search(limit: float) -> Search:
        return Search(problem_of(found, [found.batch]), request, machine(1e9), found.batch, "global", None, limit)

    families: list[Family] = []
    monkeypatch.setattr(refine, "mixtures", lambda family, *_: families.append(family) or ())
    tight = search(0.7 * searched(search(math.inf))[0].predicted.peak_bytes)
    list(tight.candidates())
    family, ends = next((f, ends) for f in families if (ends := between(f.look())) is not None)
    over, within = (family.explored.layouts[k] for k in (ends.over, ends.within))
    dearer = [within.dearer(times) for times in DEARER]
    for times, paid in zip(DEARER, dearer, strict=True):
        assert paid.byte_price == times * within.byte_price and paid.kept_price == times * within.kept_price
        assert (paid.compute_price, paid.sums_price) == (within.compute_price, within.sums_price)
    priced: list[Layouts] = []
    price = Search.price

    def noted(self: Search, plan: Plan, whole: Whole | None = None) -> Candidate:
        priced.append(plan.layouts)
        return price(self, plan, whole)

    monkeypatch.setattr(Search, "price", noted)
    for thoroughly in (False, True):
        priced.clear()
        least = ends.seconds * (1 + 1e-9)
        made = list(mixtures(family, least, thoroughly))
        assert all(not tight.fits(c) or c.predicted.step_seconds < least for c in made)
        others = {(layouts.mixed.layouts if layouts.mixed else None, replace(layouts, mixed=None)) for layouts in priced}
        assert all(((paid, over) in others) == thoroughly for paid in dearer)
        assert (within, over) in others


@pytest.mark.parametrize("topology", [machine(1e9), NEAR], ids=["slow", "near"])
@pytest.mark.parametrize("share", [0.8, 0.7])
def test_no_mixture_that_fits_takes_less_than_is_proven(share: float, topology: Topology) -> None:
    """Of any two layouts that were found, with any number of blocks in the one, and with every other block."""
    found = case("gpt", layers=6)
    request = resolve((4,), Strategy(tp=4, layouts="any"))

    def search(limit: float) -> Search:
        return Search(problem_of(found, [found.batch]), request, topology, found.batch, "global", None, limit)

    tight = search(share * searched(search(math.inf))[0].predicted.peak_bytes)
    made = list(tight.candidates())
    assert tight.bound <= min((c.per_sample for c in made if tight.fits(c)), default=math.inf)
    alike = {c.plan.layouts: c for c in made if c.plan.layouts.any and c.plan.layouts.mixed is None}.values()
    pairs = itertools.product([c for c in alike if not tight.fits(c)][:3], [c for c in alike if tight.fits(c)][:3])
    fitting = 0
    for one, other in pairs:
        for blocks in (*(range(k) for k in range(1, 6)), range(0, 6, 2)):
            layouts = replace(one.plan.layouts, mixed=Mixed(tuple(blocks), other.plan.layouts))
            for c in tight.completed(tight.price(replace(one.plan, layouts=layouts, whole=()))):
                if tight.fits(c):
                    fitting += 1
                    assert c.per_sample >= tight.bound * (1 - 1e-9)
    assert fitting > 5


def test_copies_are_small_where_they_do_not_fit() -> None:
    """Where sums take long, whatever their bytes, a plan that fits cuts copies over tp, and counts what that takes and saves."""
    slow = replace(machine(1e9), levels=(Level("network", 8, 1e9, 1e-3),))
    strategy = Strategy(dp_shard=2, tp=4, zero=2, layouts="any")
    fast = search_of("gpt", slow, strategy, math.inf, ranks=8)
    tight = search_of("gpt", slow, strategy, 0.0, ranks=8)
    plan = Plan(mesh(dp_shard=2, tp=4), zero=2, layouts=Layouts(byte_price=0.0))
    before, after = fast.price(plan), tight.price(plan)
    assert not before.plan.small_copies and after.plan.small_copies
    assert after.predicted.peak_bytes < before.predicted.peak_bytes
    assert after.predicted.step_seconds > before.predicted.step_seconds
    assert not fast.price(after.plan).plan.small_copies  # what fits is fast


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_what_is_not_asked_is_not_faster(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search stops where nothing faster can follow: the plan is as fast as that of one that asks all families at all prices."""
    free = searched(search_of("gpt2", machine(1e9), Strategy(), math.inf))[0]
    limit = share * free.predicted.peak_bytes

    def best() -> tuple[float, float]:
        search = search_of("gpt2", machine(1e9), Strategy(), limit)
        return searched(search)[0].per_sample, search.bound

    seconds, bound = best()
    monkeypatch.setattr(refine, "CLOSE", -math.inf)
    monkeypatch.setattr(refine, "ASKED", math.inf)
    whole, _ = best()
    assert whole >= min(seconds, bound) * (1 - 1e-9)
    assert seconds <= whole * (1 + 1e-2)


def test_where_everything_fits_nothing_is_left_to_find() -> None:
    """With bytes to spare the plan is the fastest there is, but for a share that is not searched for."""
    for model, topology in (("gpt", NEAR), ("gpt2", machine(1e9)), ("bert", HIDES)):
        search = search_of(model, topology, Strategy(), math.inf)
        assert search_bound_gap(search) <= 2 * refine.CLOSE


def search_bound_gap(search: Search) -> float:
    best = searched(search)[0].per_sample
    return 1 - search.bound / best


def large_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Of blocks that are many, and sums of gradients that take a while."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(vocab_size=32000, num_hidden_layers=16, use_cache=False, **sizes)
    tokens = {name: torch.empty(1, 8192, dtype=torch.int64) for name in ("input_ids", "labels")}
    return transformers.LlamaForCausalLM(config), tokens


@pytest.mark.parametrize(
    ("make", "devices", "share"),
    [(large_llama, 64, 0.45), (vit_large, 8, 0.35), (vit_large, 8, 0.45)],
    ids=["llama", "vit", "vit, gathers"],
)
@pytest.mark.filterwarnings("ignore:outputs that are not tensors")
def test_of_a_large_model_the_gap_is_below_a_hundredth(make: Callable[[], Any], devices: int, share: float) -> None:
    """Where the fastest plan does not fit, by far."""
    with torch.device("meta"):
        model, batch = make()
        model.bfloat16()

    def predicted(limit: float | None) -> Prediction:
        topology = Topology.preset("h100", devices=devices)
        found = shardwright.plan(model, topology, example_inputs=batch, memory_limit=limit).plan.predicted
        assert found is not None
        return found

    limit = share * predicted(None).peak_bytes
    found = predicted(limit)
    assert found.gap is not None and found.gap <= 0.01
    assert found.peak_bytes <= limit
