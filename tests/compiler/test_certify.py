"""Certificates: whole, reduced to what memory allows, and refused where programs are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright import PlannedModel, Strategy, Topology, plan, verify
from shardwright.compiler import certify as module
from shardwright.compiler.reduce import Sample, fewer_blocks, fewer_ranks
from shardwright.compiler.verify import VerificationError, random_state, reference
from shardwright.passes.ops.collectives import take_shard
from shardwright.runtime.program import RankProgram

WIDTH, LAYERS = 6, 5


class Block(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, layers: int = LAYERS, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList(Block(norm) for _ in range(layers))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return nn.functional.cross_entropy(self.last(hidden), y)


def planned(strategy: Strategy, devices: int = 4, rows: int = 4, model: nn.Module | None = None, **options: Any) -> PlannedModel:
    torch.manual_seed(0)
    example = {"x": torch.randn(rows, 4), "y": torch.randint(3, (rows,))}
    topology = Topology.preset("cpu", devices=devices)
    return plan(model or Stack(), topology, example_inputs=example, strategy=strategy, device="cpu", **options)


def test_the_whole_model_where_memory_allows() -> None:
    found = verify(planned(Strategy(dp=2, tp=2)))
    assert found.numbers.startswith("the whole model")
    assert found.compared == 2 * (2 + 2 * LAYERS)
    assert 0 < found.largest_error < 1e-9
    assert "every one of 4 ranks" in str(found)


def test_fewer_blocks_compute_what_a_shallower_model_does() -> None:
    problem = planned(Strategy(dp=1, tp=1, pp=1), devices=1).problem
    small = fewer_blocks(Sample(problem, planned(Strategy(dp=1, tp=1, pp=1), devices=1).plan))
    assert small.left_out == (f"2 of {LAYERS} blocks",)
    state = random_state(small.problem.graph, torch.Generator().manual_seed(1))
    inputs = {"input.x": torch.randn(4, 4, dtype=torch.float64), "input.y": torch.randint(3, (4,))}
    loss, gradients = reference(small.problem.graph, small.problem.loss or "", state, inputs)

    shallow = Stack(2).double()
    names = [n for n, _ in shallow.named_parameters()]
    assert sorted(state) == sorted(f"param.{n}" for n in names)
    shallow.load_state_dict({n: state[f"param.{n}"] for n in names})
    expected = shallow(inputs["input.x"], inputs["input.y"])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in shallow.named_parameters():
        torch.testing.assert_close(gradients[f"param.{name}"], parameter.grad)


def test_reduced_where_memory_does_not_allow_more() -> None:
    made = planned(Strategy(dp=2, tp=2))
    whole = module.comparison_bytes(made.problem, made.plan)
    found = verify(made, memory_limit=whole - 1)
    assert f"reduced: 2 of {LAYERS} blocks" in found.numbers
    assert found.compared == 2 * (2 + 2 * 2)
    nothing = verify(made, memory_limit=10)
    assert nothing.numbers.startswith("not compared: about") and nothing.compared == 0
    assert verify(made, numbers=False).numbers.startswith("not compared: no inputs")


def test_buffers_of_blocks_left_out_are_left_out() -> None:
    made = planned(Strategy(dp=2, tp=1, pp=1), devices=2, model=Stack(norm=True))
    small = fewer_blocks(Sample(made.problem, made.plan)).problem.graph
    keys = {key for key in small.meta["outputs"] if key.startswith("buffer.")}
    assert {key.split(".")[2] for key in keys} == {"0", "1"}
    assert verify(made, memory_limit=module.comparison_bytes(replace(made.problem, graph=small), made.plan)).compared > 0


def test_every_stage_keeps_a_block() -> None:
    made = planned(Strategy(dp=1, tp=1, pp=4, microbatches=4))
    small = fewer_blocks(Sample(made.problem, made.plan))
    stages = {k for name, k in made.plan.stage_of.items() if f"param.{name}" in _parameters(small)}
    assert stages == {0, 1, 2, 3}
    assert len(_parameters(small)) < len(_parameters(Sample(made.problem, made.plan)))
    found = verify(made, memory_limit=module.comparison_bytes(small.problem, small.plan))
    assert "reduced" in found.numbers and found.compared


def _parameters(sample: Sample) -> set[str]:
    return {str(n.meta["key"]) for n in sample.problem.graph.graph.nodes if str(n.meta.get("key", "")).startswith("param.")}


def test_many_ranks_are_checked_on_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 8)
    made = planned(Strategy(dp_replicate=3, dp_shard=8, tp=2, zero=3), devices=48, rows=3)
    found = verify(made)
    assert found.ranks == 48
    assert found.types == "ranks 0 and 47 at full size; every one of 8 ranks of the reduced plan"
    for part in ("2 of 3 ranks on dp_replicate", "2 of 8 ranks on dp_shard", f"2 of {LAYERS} blocks", "4 of 72 samples"):
        assert part in found.numbers
    assert found.compared == 2 * (2 + 2 * 2)


def test_data_ranks_compute_different_samples() -> None:
    made = planned(Strategy(dp=4, tp=1, pp=1))
    rows = module.repeated(made.problem, made.example)["input.x"]
    assert rows.shape[0] == 16
    shares = [take_shard(rows, 0, ((4, 4, 4, 4),), k) for k in range(4)]
    assert all(not torch.equal(shares[0], other) for other in shares[1:])
    assert fewer_ranks(Sample(made.problem, made.plan), None) == Sample(made.problem, made.plan)


@pytest.mark.parametrize("limit", [None, 1])
def test_a_gradient_that_is_not_reduced_is_refused(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """Whole and reduced: the schedules still fit together, the numbers do not."""
    made = planned(Strategy(dp=2, tp=1, pp=1, zero=0), devices=2)
    honest = module.emit

    def without_reduction(*args: Any) -> RankProgram:
        program = honest(*args)
        kept = tuple(i for i in program.schedule if not (i.kind == "all_reduce" and i.keys[0].startswith("grad.")))
        assert len(kept) < len(program.schedule)
        return replace(program, schedule=kept)

    monkeypatch.setattr(module, "emit", without_reduction)
    size = module.comparison_bytes(made.problem, made.plan)
    with pytest.raises(VerificationError, match="gradient of"):
        verify(made, memory_limit=None if limit is None else size - limit)


def test_a_certificate_travels_as_text() -> None:
    found = verify(planned(Strategy(dp=2, tp=1, pp=1), devices=2), numbers=False)
    assert module.Certificate.from_json(found.to_json()) == found


def test_inputs_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(Strategy(dp=2, tp=1, pp=1), devices=2)
    seen: list[Mapping[str, Tensor]] = []
    honest = module.compare_sample
    monkeypatch.setattr(module, "compare_sample", lambda sample, inputs: seen.append(inputs) or honest(sample, inputs))
    own = {"input.x": torch.randn(8, 4), "input.y": torch.randint(3, (8,))}
    assert verify(made, own).compared
    assert seen == [own]
