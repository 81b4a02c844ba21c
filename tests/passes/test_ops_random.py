"""Random ops: the numbers of a position do not depend on who draws them, and are statistically sound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compare, emit_all, prepare, run
from programs import plan, shares
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import shardwright
from shardwright import Strategy, Topology
from shardwright.compiler.capture import capture
from shardwright.compiler.capture_error import CaptureError
from shardwright.compiler.memory import program_memory
from shardwright.compiler.prepare import prepare as prepare_graph
from shardwright.passes.normalize import normalize
from shardwright.passes.ops import StaticCommunicator, ops, use_communicator
from shardwright.passes.ops.collectives import take_shard
from shardwright.passes.types import even_sections, flatten_sections

SEED = torch.tensor(1234567890123)


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def bits(seed: int, site: int, shape: tuple[int, ...], position: tuple[int, ...]) -> int:
    """The documented hash in Python's own integers."""
    split = next((d for d in reversed(range(len(shape) + 1)) if math.prod(shape[d:]) >= 256), 0)
    row = column = 0
    for d, (size, i) in enumerate(zip(shape, position, strict=True)):
        row, column = (row * size + i, column) if d < split else (row, column * size + i)
    row = row * -(-math.prod(shape[split:]) // 2**31) + column // 2**31
    key = mix((row * 0x9E3779B97F4A7C15 + mix((seed % 2**64) ^ mix(site + 1))) % 2**64)
    h = (key + (column % 2**31) * 0x9E3779B1) % 2**32
    h ^= h >> 16
    h = (h * 0x7FEB352D + (key >> 32)) % 2**32
    h ^= h >> 15
    return (h * 0x846CA68B) % 2**32


def coordinates(**where: tuple[int, int]) -> StaticCommunicator:
    """axis=(size, index)"""
    return StaticCommunicator({a: n for a, (n, _) in where.items()}, {a: i for a, (_, i) in where.items()})


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 300), (3, 2, 257), (700, 3), (2, 3, 5, 11), (2**17 + 3,)])
@pytest.mark.parametrize("seed", [0, -5, 2**62 + 9])
def test_is_the_documented_hash(shape, seed):
    drawn = ops.uniform(torch.tensor(seed), 9, shape, torch.float32)
    dropped = ops.dropout(torch.ones(shape), torch.tensor(seed), 0.3, 9)
    positions = list(itertools.islice(itertools.product(*map(range, shape)), 0, None, max(1, math.prod(shape) // 500)))
    for position in positions:
        h = bits(seed, 9, shape, position)
        assert drawn[position].item() == (h >> 8) / 2**24
        assert dropped[position].item() == (torch.tensor(1 / 0.7).item() if h ^ 2**31 >= round(0.3 * 2**32) else 0.0)


def test_positions_beyond_32_bits():
    shape, sections = (2**33,), [2**33 - 5, 2, 3]
    for index, start in ((1, 2**33 - 5), (2, 2**33 - 3)):
        with use_communicator(coordinates(tp=(3, index))):
            drawn = ops.uniform_shard(SEED, 4, shape, torch.float32, ["tp"], [0], [3], sections)
        assert drawn.tolist() == [(bits(int(SEED), 4, shape, (start + i,)) >> 8) / 2**24 for i in range(len(drawn))]
    with use_communicator(coordinates(tp=(2, 1))):
        rows = ops.uniform_shard(SEED, 4, (2**34, 512), torch.float32, ["tp"], [0], [2], [2**34 - 3, 3])
    assert rows[2, 500].item() == (bits(int(SEED), 4, (2**34, 512), (2**34 - 1, 500)) >> 8) / 2**24


CUTS = {
    "even": ((6, 300), [("tp", 1, ())]),
    "uneven": ((7, 300), [("tp", 0, ((3, 4, 0),))]),
    "sections": ((4, 330), [("tp", 1, ((50, 60, 0), (100, 5, 5), (1, 1, 108)))]),
    "two axes on one dim": ((10, 33), [("dp", 0, ((7, 3),)), ("tp", 0, ())]),
    "sections of sections": ((3, 40), [("dp", 1, ((8, 4), (20, 8))), ("tp", 1, ())]),
    "two dims": ((9, 5, 70), [("dp", 0, ((4, 5),)), ("tp", 2, ((20, 30, 20),))]),
}


@pytest.mark.parametrize("shape, cuts", CUTS.values(), ids=CUTS.keys())
def test_shards_draw_what_the_whole_draws(shape, cuts):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    whole = ops.dropout(x, SEED, 0.4, 5)
    gradient = torch.autograd.grad(whole.sum(), x)[0]
    uniform = ops.uniform(SEED, 5, shape, torch.float64)
    sizes = {"dp": 2, "tp": 3}
    for dp, tp in itertools.product(range(2), range(3)):
        indices = {"dp": dp, "tp": tp}
        args: tuple[list, ...] = ([], [], [], [])

        def local(y: Tensor, indices=indices) -> Tensor:
            for axis, dim, sections in cuts:
                y = take_shard(y, dim, sections or even_sections(y.shape[dim], sizes[axis]), indices[axis])
            return y

        for axis, dim, sections in cuts:
            flat = flatten_sections(sections)
            for where, what in zip(args, ([axis], [dim], [len(flat)], flat), strict=True):
                where.extend(what)
        with use_communicator(StaticCommunicator(sizes, indices)):
            part = local(x.detach()).clone().requires_grad_()
            dropped = ops.dropout_shard(part, SEED, 0.4, 5, shape, *args)
            assert torch.equal(dropped, local(whole))
            assert torch.equal(torch.autograd.grad(dropped.sum(), part)[0], local(gradient))
            assert torch.equal(ops.uniform_shard(SEED, 5, shape, torch.float64, *args), local(uniform))


def test_wrong_part_is_refused():
    with use_communicator(coordinates(tp=(2, 0))), pytest.raises(ValueError, match="cuts of"):
        ops.dropout_shard(torch.ones(3), SEED, 0.5, 0, [4], ["tp"], [0], [0], [])
    with use_communicator(coordinates(tp=(2, 0))), pytest.raises(ValueError, match="axis 'tp' of dim 0"):
        ops.dropout_shard(torch.ones(3), SEED, 0.5, 0, [4], ["tp"], [0], [2], [3, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_values(dtype, p):
    x = (torch.rand(130, 520) + 0.5).to(dtype)
    y = ops.dropout(x, SEED, p, 1)
    kept = y != 0
    assert y.dtype == dtype and abs(kept.double().mean().item() - (1 - p)) < 0.01
    if p < 1:
        torch.testing.assert_close(
            y[kept], (x.double() / (1 - p)).to(dtype)[kept], rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0
        )


def test_layouts_and_empty():
    x = torch.randn(4, 5, 6, 7).permute(0, 2, 1, 3)
    y = ops.dropout(x, SEED, 0.5, 1)
    assert y.stride() == x.stride() and torch.equal(y, ops.dropout(x.contiguous(), SEED, 0.5, 1))
    assert ops.dropout(torch.ones(0, 3), SEED, 0.5, 1).shape == (0, 3)
    assert ops.uniform(SEED, 1, [3, 0], torch.float32).shape == (3, 0)


def words(count: int, seed: Tensor = SEED, site: int = 0) -> Tensor:
    """24 random bits each, in order of position."""
    return ops.uniform(seed, site, [count // 1024, 1024], torch.float32).double().mul_(2**24).long().view(-1)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.std() * b.std()))


def test_uniform_moments_and_bytes():
    n = 1 << 20
    drawn = words(n)
    unit = drawn.double() / 2**24
    assert abs(unit.mean().item() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(unit.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    for shift in (0, 8, 16):
        counts = ((drawn >> shift) & 255).bincount(minlength=256).double()
        chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255), shift
    pairs = ((drawn[:-1] >> 16) * 256 + (drawn[1:] >> 16)).bincount(minlength=1 << 16).double()
    chi_square = ((pairs - n / 65536) ** 2 / (n / 65536)).sum().item()
    assert abs(chi_square - 65535) < 5 * math.sqrt(2 * 65535)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1023, 1024, 1025, 2048, 32768])
def test_neighbours_are_uncorrelated(lag):
    drawn = words(1 << 19)
    for shift, mask in ((0, 2**24 - 1), (23, 1), (12, 1), (0, 1)):
        lane = (drawn >> shift) & mask
        assert abs(correlation(lane[:-lag], lane[lag:])) < 5 / math.sqrt(len(lane)), (shift, mask)


@pytest.mark.parametrize("seed, site", [(0, 1), (0, 2), (0, 1 << 31), (1, 0), (-1, 0), (1 << 32, 0), (1 << 63 - 1, 0), (1, 1)])
def test_sites_and_seeds_are_uncorrelated(seed, site):
    n = 1 << 19
    one, other = words(n, torch.tensor(0), 0), words(n, torch.tensor(seed), site)
    assert abs(correlation(one, other)) < 5 / math.sqrt(n)
    for shift in range(0, 24, 4):
        assert abs(correlation(one >> shift & 1, other >> shift & 1)) < 5 / math.sqrt(n)


def test_float64_has_all_its_bits():
    drawn = ops.uniform(SEED, 3, [1 << 16], torch.float64)
    assert drawn.min() >= 0 and drawn.max() < 1
    low = (drawn * 2**53).long() & (2**26 - 1)
    assert len(low.unique()) > 0.999 * len(low)
    assert abs(correlation(low, (drawn * 2**53).long() >> 26)) < 5 / 256


def test_few_columns_are_dropped_together():
    """Rows of one batch are dropped independently of one another."""
    keep = (ops.dropout(torch.ones(4096, 256), SEED, 0.5, 2) != 0).double()
    overlap = (keep @ keep.T / 256).triu(1)
    values = overlap[overlap > 0]
    assert abs(values.mean().item() - 0.25) < 1e-3 and values.max() < 0.25 + 8 * math.sqrt(0.1875 / 256)


def test_gradient_draws_again():
    x = torch.randn(5, 300, requires_grad=True)

    def step(x: Tensor, seed: Tensor) -> Tensor:
        return torch.autograd.grad(ops.dropout(x, seed, 0.2, 7).sum(), x)[0]

    graph = make_fx(step, tracing_mode="fake")(x, SEED)
    calls = [node for node in graph.graph.nodes if node.target == ops.dropout.default]
    assert len(calls) == 2 and calls[0].args[1:] == calls[1].args[1:]
    assert torch.equal(graph(x.detach(), SEED), ops.dropout(torch.ones(5, 300), SEED, 0.2, 7))


class Noisy(nn.Module):
    """Every kind of number that a model may draw."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + 0.1 * torch.randn_like(self.first(x))
        h = h + torch.normal(h.detach(), 0.5) * torch.randint_like(h, 3) + torch.randint(2, 5, h.shape)
        h = h * F.dropout1d(h, 0.3) + torch.empty_like(h).uniform_(-1, 1) + torch.empty_like(h).exponential_(2.0)
        return self.second(h + torch.randn(h.shape, dtype=h.dtype)).square().mean()


MESHES = [{"dp_shard": 4}, {"tp": 2}, {"tp": 2, "dp_shard": 2}, {"pp": 2, "microbatches": 2}, {"dp_shard": 2, "microbatches": 2}]


@pytest.mark.parametrize("batch", [4, 7])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_models_draw_the_same_numbers_on_every_mesh(axes: dict[str, int], batch: int) -> None:
    found = prepare(Noisy(), {"x": torch.randn(batch, 6)})
    wanted = plan(**axes)
    programs = emit_all(found, wanted, shares(found, wanted))
    compare(found, programs, run(found, programs))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_draws_its_own_samples_alone(ranks: int) -> None:
    found = prepare(Noisy(), {"x": torch.randn(8, 6)})
    wanted = plan(dp_shard=ranks)
    for program in emit_all(found, wanted, shares(found, wanted)):
        drawn = [n for n in program.graphs["forward"].graph.graph.nodes if "uniform" in str(n.target)]
        assert {n.target for n in drawn} == {ops.uniform_shard.default}
        assert [n.meta["val"].numel() * ranks for n in drawn] == [math.prod(n.args[2]) for n in drawn]


def test_memory_of_what_is_drawn_does_not_grow_with_the_mesh() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x + torch.randn_like(x)).square().mean()

    def counted(devices: int) -> tuple[float, float]:
        topology, x = Topology.preset("h100", devices=devices), torch.randn(4, 4, 64, 64, device="meta")
        found = shardwright.plan(Big(), topology, example_inputs=(x,), strategy=Strategy(dp=devices))
        return found.plan.predicted.peak_bytes, program_memory(shardwright.emit(found, 0)).peak

    (_, few), (predicted, many) = counted(2), counted(64)
    assert many <= few * 1.01
    assert predicted == pytest.approx(many, rel=0.5)


@pytest.mark.parametrize(
    ("draw", "mean", "deviation"),
    [
        (lambda x: torch.randn_like(x), 0.0, 1.0),
        (lambda x: torch.normal(x * 0 + 2, 3.0), 2.0, 3.0),
        (lambda x: torch.randint(-3, 5, x.shape).double(), 0.5, 2.2913),
        (lambda x: torch.empty_like(x).exponential_(2.0), 0.5, 0.5),
        (lambda x: torch.empty_like(x).uniform_(1, 3), 2.0, 0.5774),
    ],
    ids=["randn", "normal", "randint", "exponential", "uniform"],
)
def test_moments(draw: Callable[[Tensor], Tensor], mean: float, deviation: float) -> None:
    class Draw(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return draw(x)

    x = torch.zeros(400, 500, dtype=torch.float64)
    gm = normalize(capture(Draw(), (x,), {}).graph)
    given = {"input.0": x, "seed": torch.tensor(5)}
    (drawn,) = fx.Interpreter(gm).run(*(given[n.meta["key"]] for n in gm.graph.nodes if n.op == "placeholder"))
    assert drawn.mean().item() == pytest.approx(mean, abs=0.02)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.01)


def test_what_draws_by_torchs_generator_is_refused() -> None:
    class Sampling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.multinomial(x.softmax(-1), 2).float().mean() * x.mean()

    with pytest.raises(CaptureError, match=r"(?s)multinomial.*torch's generator.*test_ops_random\.py"):
        prepare_graph(capture(Sampling(), (torch.randn(3, 4),), {}))
