"""How gradients are summed over several axes: the cheapest sequence is found, and any of them gives the gradients of one device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from harness import compare, emit_all, run
from hypothesis import given
from hypothesis import strategies as st
from programs import case, mesh, program
from programs import plan as plan_of
from properties import examples

from shardwright.compiler.gradient_sums import GradientSums, Sum, Sums, cheapest, scattered, shares, ways
from shardwright.compiler.plan import Plan
from shardwright.compiler.step_sums import Moved, Part
from shardwright.compiler.topology import CollectiveTime, Device, Level, Topology, collective_bytes, collective_seconds
from shardwright.compiler.traffic import traffic
from shardwright.passes.check_schedules import check_schedules
from shardwright.passes.types import balanced_sizes
from shardwright.runtime.program import Mesh

DEVICE = Device("slow", {"float64": 1e9, "float32": 1e9}, 1e12, 1e11, launch=1e-9)
MANY = 1e12


def network(inner: float, outer: float, latency: float = 1e-9) -> Topology:
    """Nodes of two devices each, with so many bytes/s inside and between them."""
    return Topology(DEVICE, (Level("node", 2, inner, latency), Level("cluster", 8, outer, latency)))


def every_sequence(axes: tuple[str, ...], may: tuple[str, ...], must: tuple[str, ...]) -> Iterator[Sums]:
    """In any order, those that scatter after those that do not included."""
    if not axes:
        yield ()
    for count in range(1, len(axes) + 1):
        for taken in itertools.combinations(axes, count):
            rest, axis = tuple(a for a in axes if a not in taken), "+".join(taken)
            for then in every_sequence(rest, may, must):
                if not set(taken) & set(must):
                    yield (Sum("all_reduce", axis), *then)
                if set(taken) <= set(may):
                    yield (Sum("reduce_scatter", axis), *then)


@pytest.mark.parametrize("latency", [1e-9, 1e-4])
@pytest.mark.parametrize(("inner", "outer"), [(1e10, 1e10), (1e10, 1e8), (1e8, 1e8)])
@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 4, 2), (4, 1, 2), (1, 2, 4)])
def test_no_other_sequence_is_cheaper(axes: tuple[int, ...], inner: float, outer: float, latency: float) -> None:
    over = mesh(**dict(zip(("dp_replicate", "dp_shard", "tp"), axes, strict=True)))
    topology = network(inner, outer, latency)
    level = 2 if "dp_shard" in over.axes else 0
    may, must = (("dp_shard", "tp"), ("dp_shard",)) if level else ((), ())
    sums = GradientSums(over, level, topology)

    def cost(found: Sums, size: float) -> float:
        return sum(
            collective_seconds(kind, size * share, topology.span(over, step.axis))
            for step, share in shares(over, found)
            for kind in step.kinds
        )

    for size in (1e3, 1e6, 1e9):
        found = cheapest(ways(over, over.axes, may, must, sums._time), size)
        assert cost(found, size) == pytest.approx(min(cost(s, size) for s in every_sequence(over.axes, may, must)), rel=1e-12)
    least = min(cost(s, MANY) for s in every_sequence(over.axes, may, must)) / MANY
    assert sums.copies_rate == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("levels", [(0,), (2,), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("topology", [network(1e10, 1e8), network(1e8, 1e8, latency=1e-4), network(1e8, 1e10)])
@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1), st.floats(0, 10))
@examples(30)
def test_no_choice_of_sums_takes_less_than_they_take_at_least(
    topology: Topology, levels: tuple[int, ...], own: float, copied: float, hidden: float, backward: float
) -> None:
    """Where a share of the first sums runs beside the backward, while that lasts; and of parameters of which ZeRO-3 keeps some
    whole."""
    over = mesh(dp_replicate=2, dp_shard=2, tp=2) if levels[0] else mesh(dp_replicate=4, tp=2)
    parts = [Part(GradientSums(over, level, topology), own, copied) for level in levels]
    least, found = (seconds(parts, at_least, hidden, backward) for at_least in (True, False))
    assert least <= found * (1 + 1e-9)


def seconds(parts: list[Part], at_least: bool, hidden: float, backward: float) -> float:
    moved = Moved()
    moved.add(parts, 1.0, at_least)
    sums = parts[0].sums
    assert sums.topology is not None
    return moved.seconds(sums.topology.on(sums.mesh), hidden, backward)


def test_gathers_of_parameters_do_not_run_beside_the_backward() -> None:
    """However long it lasts, and of copies that count at least as well."""
    part = Part(GradientSums(mesh(dp_shard=4, tp=2), 2, network(1e8, 1e8)), 0.0, 1e9)
    found = seconds([part], False, 1.0, 1e9)
    gathered = part.copied * 7 / 8 / 1e8  # of eight ranks, at so many bytes/s
    assert found >= 0.999 * gathered
    assert seconds([part], True, 1.0, 1e9) == pytest.approx(gathered, rel=1e-3)


def test_few_bytes_go_with_the_others_and_many_over_all_links() -> None:
    sums = GradientSums(mesh(dp_shard=4, tp=2), 2, network(1e8, 1e8, latency=1e-4))
    assert sums.own == (Sum("reduce_scatter", "dp_shard"),)
    assert sums.copies(10.0)[0] == sums.own[0] and len(sums.copies(10.0)) == 2
    assert scattered(sums.copies(MANY)) and len(sums.copies(10.0)) >= len(sums.copies(MANY))
    replicated = GradientSums(mesh(dp_replicate=4, tp=2), 0, network(1e8, 1e8, latency=1e-4))
    assert replicated.copies(MANY) == (Sum("all_reduce", "dp_replicate+tp"),)


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 2, 4), (1, 4, 2), (4, 1, 2)])
@pytest.mark.parametrize("topology", [network(1e10, 1e8), network(1e9, 1e9, latency=1e-4)])
@pytest.mark.parametrize("beside", [0.4, 0.875])
def test_of_what_runs_beside_the_backward_nobody_waits(axes: tuple[int, ...], topology: Topology, beside: float) -> None:
    """No other sequence leaves less, where such a share of the first sum of copies does."""
    over = mesh(**dict(zip(("dp_replicate", "dp_shard", "tp"), axes, strict=True)))
    level = 2 if "dp_shard" in over.axes else 0
    sums = GradientSums(over, level, topology, beside=beside)

    def waited(found: Sums, size: float) -> float:
        first = collective_seconds(found[0].kind, size, topology.span(over, found[0].axis))
        first -= collective_seconds(found[0].kind, 0.0, topology.span(over, found[0].axis))  # latencies count
        hidden = beside * first if any(axis.startswith("dp") for step in found for axis in step.axes) else 0.0
        taken = sum(
            collective_seconds(kind, size * share, topology.span(over, step.axis))
            - (sums.own[k : k + 1] == (step,)) * collective_seconds(kind, 0.0, topology.span(over, step.axis))
            for k, (step, share) in enumerate(shares(over, found))
            for kind in step.kinds
        )
        return taken - hidden

    found = every_sequence(over.axes, *((("dp_shard", "tp"), ("dp_shard",)) if level else ((), ())))
    possible = [s for s in found if all(k.kind == "all_reduce" or j == 0 or s[j - 1].kind != "all_reduce" for j, k in enumerate(s))]
    for size in (1e6, 1e9):
        assert waited(sums.copies(size), size) == pytest.approx(min(waited(s, size) for s in possible), rel=1e-9)


@pytest.mark.parametrize("zero", [2, 3])
def test_other_sums_where_the_backward_hides_them(zero: int) -> None:
    """To the same gradients. Under ZeRO-3, which waits for what the graphs scatter, they are the same sums."""
    found = case("gpt", batch=12)
    plain = plan_of(zero, sequence_parallel=True, topology=network(1e8, 1e8), dp_shard=2, tp=4)
    made = []
    for wanted in (plain, replace(plain, beside=0.7)):
        programs = emit_all(found, wanted, balanced_sizes(found.batch, 2))
        check_schedules(programs)
        compare(found, programs, run(found, programs))
        made.append([(i.kind, i.axis) for i in programs[0].schedule if i.keys and i.keys[0].startswith("grad.")])
    assert (made[0] == made[1]) == (zero == 3)
    assert Plan.from_json(wanted.to_json()) == wanted and wanted.hash != plain.hash


def test_without_a_machine_bytes_count() -> None:
    over = mesh(dp_replicate=2, dp_shard=2, tp=2)
    found = GradientSums(over, 2, None, beside=0.5).copies(MANY)

    def received(sums: Sums) -> float:
        return sum(
            collective_bytes(kind, share, math.prod(map(over.size, step.axes)))
            for step, share in shares(over, sums)
            for kind in step.kinds
        )

    everything = list(every_sequence(over.axes, ("dp_shard", "tp"), ("dp_shard",)))
    assert received(found) == pytest.approx(min(map(received, everything)))
    assert scattered(found) == ("dp_shard+tp",)


TOPOLOGIES = {"alike": network(1e8, 1e8), "nodes": network(1e10, 1e6), "latency": network(1e10, 1e10, latency=1.0), "none": None}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("axes", "zero"),
    [
        ({"dp_shard": 2, "tp": 2}, 2),
        ({"dp_shard": 2, "tp": 2}, 3),
        ({"dp_replicate": 2, "tp": 2}, 0),
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, 1),
        ({"dp_shard": 3, "tp": 2}, 2),
        ({"pp": 2, "dp_shard": 2, "tp": 2}, 2),
    ],
    ids=["zero2", "zero3", "replicated", "hybrid", "uneven", "pipeline"],
)
def test_equals_one_device(axes: dict[str, int], zero: int, topology: str) -> None:
    """Norms on activations that are cut by their tokens: tp holds copies of their weights."""
    found, micro = case("gpt", batch=12), 2 if "pp" in axes else 1
    wanted = plan_of(zero, sequence_parallel=True, microbatches=micro, topology=TOPOLOGIES[topology], **axes)
    programs = emit_all(found, wanted, balanced_sizes(found.batch, wanted.data_size))
    sums = {i.axis for i in programs[0].schedule if i.kind in ("all_reduce", "reduce_scatter") and i.keys[0].startswith("grad.")}
    assert any("tp" in axis.split("+") for axis in sums)
    check_schedules(programs)
    compare(found, programs, run(found, programs))


@pytest.mark.parametrize("zero", [2, 3])
def test_small_copies_are_cut_where_that_takes_longer_too(zero: int) -> None:
    """Where a collective takes a second however small it is, copies stay whole over tp, unless bytes are wanted."""
    found = case("gpt", batch=12)
    fast = plan_of(zero, sequence_parallel=True, topology=network(1e10, 1e10, latency=1.0), dp_shard=2, tp=4)
    cut = []
    for wanted in (fast, replace(fast, small_copies=True)):
        programs = emit_all(found, wanted, balanced_sizes(found.batch, 2))
        check_schedules(programs)
        compare(found, programs, run(found, programs))
        cut.append({s.name for s in programs[0].parameters if any("tp" in axis.split("+") for axis in s.gathered)})
    assert not cut[0] and cut[1]
    assert Plan.from_json(wanted.to_json()) == wanted and "small copies" in wanted.name


def test_no_shard_of_copies_is_smaller() -> None:
    for over, level in ((mesh(dp_shard=4, tp=2), 2), (mesh(dp_shard=4, tp=2), 3), (mesh(dp_replicate=2, dp_shard=2, tp=2), 2)):
        sums = GradientSums(over, level, network(1e8, 1e8, latency=1e-4), small=True)
        left = [way.left for way in sums._copies_ways]
        for size in (10.0, MANY):
            found = sums.copies(size)
            assert math.prod(map(over.size, scattered(found))) == max(left) > 1
            times = [way.time.of(size * sums.held) for way in sums._copies_ways if way.left == max(left)]
            assert next(w.time.of(size * sums.held) for w in sums._copies_ways if w.sums == found) == min(times)


def test_sequences_differ_by_machine() -> None:
    """The tests above run over all of them."""
    orders = set()
    for topology in TOPOLOGIES.values():
        made = program(case("gpt"), plan_of(2, sequence_parallel=True, dp_shard=2, tp=2, topology=topology))
        orders |= {s.gathered for s in made.parameters}
    assert orders == {("dp_shard",), ("dp_shard", "tp"), ("dp_shard+tp",)} or len(orders) >= 3, orders


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_shards_copies_over_tp_too(zero: int) -> None:
    """What tp holds copies of lies in quarters on 2 x 2 ranks, and no gradient is summed whole over tp."""
    made = program(case("gpt"), plan_of(zero, sequence_parallel=True, dp_shard=2, tp=2))
    copies = [s for s in made.parameters if any("tp" in axis.split("+") for axis in s.gathered)]
    assert copies
    for spec in copies:
        ranks = math.prod(len(cut.sections[0]) for cut in spec.cuts)
        assert ranks == 4 and not spec.replicated
    over_tp = [c for c in traffic(made) if "tp" in c.axis.split("+") and c.phase == "schedule" and c.kind == "all_reduce"]
    short = [s for s in made.parameters if "tp" in s.replicated and s.trainable]  # too short to be cut in four
    assert sum(c.size for c in over_tp) <= sum(math.prod(s.shape) * s.dtype.itemsize for s in short)


def test_shards_are_alike_on_all_ranks() -> None:
    """Whatever a rank's own share of an uneven cut, the same dims are cut by the same axes."""
    found, wanted = case("gpt", batch=12), plan_of(2, sequence_parallel=True, dp_shard=3, tp=2)
    programs = emit_all(found, wanted, balanced_sizes(found.batch, 3))
    for specs in zip(*(p.parameters for p in programs), strict=True):
        assert len({tuple((c.axis, c.dim) for c in s.cuts) for s in specs}) == 1


def test_axes_keep_the_order_of_the_mesh() -> None:
    found = ways(Mesh(("a", "b", "c"), (2, 2, 2)), ("a", "b", "c"), (), (), lambda k, step: CollectiveTime(1.0, 0.0))
    assert cheapest(found, 1.0) == (Sum("all_reduce", "a+b+c"),)
