"""Ops that couple samples, on dims that a data axis cannot cut evenly: all ranks make the same collectives along later axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Case, compare, emit_all, prepare, run
from programs import machine, plan
from torch import Tensor, nn

from shardwright.compiler import emit
from shardwright.passes.check_schedules import check_schedules
from shardwright.passes.rules.base import Axis, own_cuts
from shardwright.passes.types import even_sections


class Coupled(nn.Module):
    """Samples in another order, head by head, and less their mean. Three tokens each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.centre, self.last = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        z = self.last(x - self.centre(x).mean(0, keepdim=True))
        rows, length, width = z.shape
        shape = (rows, self.heads, length, width // self.heads)
        turned = z.reshape(rows, length, *shape[1::2]).transpose(1, 2).flatten(0, 1).flip(0)
        return nn.functional.mse_loss(x + turned.reshape(shape).transpose(1, 2).reshape(x.shape), y)


@pytest.fixture(scope="module")
def cases() -> dict[int, Case]:
    torch.manual_seed(0)
    found = {}
    for width, heads in ((8, 4), (9, 3)):
        inputs = {"x": torch.randn(8, 3, width), "y": torch.randn(8, 3, width)}
        found[width] = prepare(Coupled(width, heads), inputs)
    return found


MESHES: list[tuple[dict[str, int], list[int]]] = [
    ({"dp_replicate": 2, "dp_shard": 2}, [2, 2, 2, 2]),
    ({"dp_replicate": 2, "dp_shard": 2}, [1, 1, 2, 4]),
    ({"dp_shard": 2, "tp": 2}, [4, 4]),
    ({"dp_shard": 2, "tp": 2}, [5, 3]),
    ({"dp_shard": 2, "tp": 2}, [2, 6]),
]


@pytest.mark.parametrize("byte_price", [None, 0.0])
@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize(("mesh", "samples"), MESHES)
def test_equals_one_device(
    cases: dict[int, Case], mesh: dict[str, Any], samples: list[int], width: int, byte_price: float | None
) -> None:
    case = cases[width]
    programs = emit_all(case, plan(topology=machine(1e9), byte_price=byte_price, **mesh), samples)
    check_schedules(programs)
    compare(case, programs, run(case, programs))


def test_an_even_axis_makes_even_cuts() -> None:
    assert own_cuts(3, Axis("dp_shard", 2, even=True)) == []
    assert own_cuts(3, Axis("dp_shard", 2)) == [even_sections(3, 2)]
    assert own_cuts(4, Axis("dp_shard", 2, even=True)) == [even_sections(4, 2)]


def test_the_batch_is_cut_as_it_lies() -> None:
    """Unevenly, through all of the model: no op takes it whole but those that couple samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    case = prepare(Summed(model), {"x": torch.randn(7, 4)})
    programs = emit_all(case, plan(dp_shard=2, tp=2, microbatches=2), [4, 3])
    compare(case, programs, run(case, programs))
    nodes = [n for p in programs for spec in p.graphs.values() for n in spec.graph.graph.nodes]
    assert not [n for n in nodes if "gather" in str(n.target) and "dp_shard" in n.args]


class Summed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


class Gated(nn.Module):
    """By the sum of all samples, a number for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in (self.first, self.last):
            x = layer(x.cumsum(1))
            x = x * x.sum(0).mean(0)
        return nn.functional.mse_loss(x, y)


@pytest.mark.parametrize("network", [1e7, 1e9])
@pytest.mark.parametrize("samples", [[3, 1, 1, 2], [1, 1, 1, 4], [2, 1, 3, 1]], ids=str)
def test_ways_over_all_axes_with_unequal_samples(samples: list[int], network: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks take the same, though each sees shapes of its own."""
    torch.manual_seed(0)
    case = prepare(Gated(6), {"x": torch.randn(7, 5, 6), "y": torch.randn(7, 5, 6)})
    rerouted, reroute = [], emit.reroute
    monkeypatch.setattr(emit, "reroute", lambda *args: rerouted.append(reroute(*args)) or rerouted[-1])
    programs = emit_all(case, plan(topology=machine(network), dp_replicate=2, dp_shard=2), samples)
    check_schedules(programs)
    compare(case, programs, run(case, programs))
    assert any(rerouted)
