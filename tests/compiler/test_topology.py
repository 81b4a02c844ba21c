import itertools
import math

import pytest
import torch

from shardwright.compiler import measure as measure_module
from shardwright.compiler.measure import fit_line, measure
from shardwright.compiler.topology import Device, Level, Topology, collective_bytes, collective_seconds
from shardwright.runtime.program import Mesh

GB = 1e9
FAST = Level("nvlink", 8, 400 * GB, 2e-6)
SLOW = Level("network", 64, 50 * GB, 10e-6)
DEVICE = Device("test", {"bfloat16": 1e15, "float32": 1e14}, 80e9, 3e12)
CLUSTER = Topology(DEVICE, (FAST, SLOW))


def fans(mesh, axis):
    return [(hop.level.name, hop.fan_out) for hop in CLUSTER.span(mesh, axis)]


def test_axes_span_the_levels_their_ranks_lie_on():
    mesh = Mesh(("pp", "dp_shard", "tp"), (2, 8, 4))
    assert fans(mesh, "tp") == [("nvlink", 4)]
    assert fans(mesh, "dp_shard") == [("nvlink", 2), ("network", 4)]
    assert fans(mesh, "pp") == [("network", 2)]
    assert fans(mesh, "pp+dp_shard") == [("nvlink", 2), ("network", 8)]
    assert fans(Mesh(("tp",), (1,)), "tp") == []
    with pytest.raises(ValueError, match="128 ranks does not fit on 64"):
        CLUSTER.span(Mesh(("dp",), (128,)), "dp")


@pytest.mark.parametrize("sizes", [(2, 3, 4), (3, 8, 2), (5, 2, 6), (1, 7, 3), (16, 4)])
def test_spans_are_those_of_the_listed_ranks(sizes):
    topology = Topology(DEVICE, (FAST, Level("rack", 24, 60 * GB, 8e-6), Level("network", 96, 50 * GB, 10e-6)))
    axes = ("pp", "dp", "tp")[: len(sizes)]
    mesh = Mesh(axes, sizes)
    for joined in (c for k in (1, 2, 3) for c in itertools.combinations(axes, k)):
        spread = (range(n) if a in joined else (0,) for a, n in zip(axes, sizes, strict=True))
        ranks = [sum(i * math.prod(sizes[k + 1 :]) for k, i in enumerate(at)) for at in itertools.product(*spread)]
        assert topology.span(mesh, "+".join(joined)) == topology.span_of(ranks)


def test_spans_of_many_ranks_are_counted_and_not_listed():
    huge = Topology(DEVICE, (FAST, Level("network", 2**40, 50 * GB, 10e-6)))
    assert [hop.fan_out for hop in huge.span(Mesh(("dp",), (2**40,)), "dp")] == [8, 2**37]


def test_collectives_follow_the_published_formulas():
    n, size = 8, 1e9
    span = CLUSTER.span(Mesh(("tp",), (n,)), "tp")
    ring = (n - 1) * FAST.latency + (n - 1) / n * size / FAST.bandwidth
    assert collective_seconds("all_gather", size, span) == pytest.approx(ring)
    assert collective_seconds("reduce_scatter", size, span) == pytest.approx(ring)
    assert collective_seconds("all_reduce", size, span) == pytest.approx(
        2 * math.log2(n) * FAST.latency + 2 * (n - 1) / n * size / FAST.bandwidth
    )
    assert collective_seconds("send", size, CLUSTER.span_of([0, 8])) == pytest.approx(SLOW.latency + size / SLOW.bandwidth)
    assert collective_seconds("all_reduce", size, ()) == 0.0


def test_a_ring_over_nodes_uses_the_links_of_all_its_members():
    size = 1e9
    whole = CLUSTER.span(Mesh(("dp",), (64,)), "dp")
    alone = CLUSTER.span(Mesh(("dp", "tp"), (8, 8)), "dp")
    # 8 members a node share 8 network links: 400 GB/s, as fast as inside; one member has one
    assert collective_seconds("all_gather", size, whole) == pytest.approx(
        63 / 64 * size / (400 * GB) + 7 * SLOW.latency + 56 * FAST.latency
    )
    assert collective_seconds("all_gather", size, alone) == pytest.approx(7 / 8 * size / (50 * GB) + 7 * SLOW.latency)
    # what leaves a node in an all-to-all goes over each rank's own link
    assert collective_seconds("all_to_all", size, whole) > 56 / 64 * size / (50 * GB)


def test_bytes_on_the_wire():
    assert collective_bytes("all_reduce", 800, 8) == 1400
    assert collective_bytes("all_gather", 800, 8) == collective_bytes("reduce_scatter", 800, 8) == 700
    assert collective_bytes("all_reduce", 800, 1) == 0


@pytest.mark.parametrize("name", ["h100", "h200", "a100-40", "a100-80", "b200", "cpu"])
def test_presets_have_sources_and_pass_through_json(name, tmp_path):
    topology = Topology.preset(name, nodes=4)
    assert topology.sources
    topology.save(tmp_path / "machine.json")
    assert Topology.from_file(tmp_path / "machine.json") == topology
    if name != "cpu":
        assert (topology.node_size, topology.world_size) == (8, 32)
        assert topology.device.peak("bfloat16") > 4 * topology.device.peak("float32")


def test_presets_can_be_cut_to_size():
    assert Topology.preset("h100", devices=4).world_size == 4
    assert Topology.preset("cpu", devices=16).world_size == 16
    with pytest.raises(ValueError, match="12 devices are not a whole number of nodes of 8"):
        Topology.preset("h100", devices=12)
    with pytest.raises(ValueError, match="no topology 'h900'; known are a100-40, a100-80, b200"):
        Topology.preset("h900")
    with pytest.raises(ValueError, match="malformed topology"):
        Topology.from_json('{"device": {}}')
    with pytest.raises(ValueError, match="is not made of units of 8"):
        Topology(DEVICE, (FAST, Level("network", 12, GB, 0.0)))


def test_fits_latency_and_bandwidth():
    sizes = [1e3, 1e5, 1e7]
    start, slope = fit_line(sizes, [1e-5 + s / 1e9 for s in sizes])
    assert start == pytest.approx(1e-5) and slope == pytest.approx(1e-9)
    start, slope = fit_line(sizes, [s / 1e9 - 1e-7 for s in sizes])
    assert start >= 0 and slope > 0


def test_measures_this_machine():
    topology = measure("cpu", seconds=0.3)
    assert 1e7 < topology.device.peak("float32") < 1e14
    assert 1e7 < topology.device.bandwidth < 1e13
    assert topology.device.memory > 1e8 and topology.world_size == 1


def test_cores_that_ranks_share_count_at_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth call waits while another rank has its turn: the median call knows nothing of it."""
    now, calls = [0.0], [0]

    def work() -> None:
        calls[0] += 1
        now[0] += 11e-3 if calls[0] % 10 == 0 else 1e-3

    monkeypatch.setattr(measure_module.time, "perf_counter", lambda: now[0])
    assert measure_module._time(work, torch.device("cpu"), 1.0) == pytest.approx(2e-3, rel=0.05)
