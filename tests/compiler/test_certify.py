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
from shardwright.compiler import emit as emission
from shardwright.compiler.layout import with_layout
from shardwright.compiler.layouts import Layouts, Mixed
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
    assert str(found).startswith("Verified: ")
    assert str(nothing).startswith("Types and schedules checked, numbers not compared: ")


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


@pytest.mark.parametrize(
    ("blocks", "kept", "renumbered"),
    [((5, 6, 7), [0, 1, 4, 5, 6], (3, 4)), ((0,), [0, 1, 2], (0,)), ((0, 1, 4, 5), [0, 1, 2, 3, 4], (0, 1, 4))],
)
def test_every_border_of_two_layouts_keeps_its_blocks(
    blocks: tuple[int, ...], kept: list[int], renumbered: tuple[int, ...]
) -> None:
    """And blocks are counted anew."""
    made = planned(Strategy(dp=1, tp=4, pp=1, layouts="any"), model=Stack(8))
    others = Layouts(byte_price=1e-3)
    layouts = Layouts(byte_price=0.0, mixed=Mixed(blocks, others))
    mixed = with_layout(made.problem, replace(made.plan, layouts=layouts, layout={}))
    types = [mixed.layout[f"layers.{k}.up.weight"] for k in range(8)]
    assert {k for k in range(8) if types[k] == types[blocks[0]]} == {*blocks}
    small = fewer_blocks(Sample(made.problem, mixed))
    assert sorted({int(name.split(".")[2]) for name in _parameters(small) if "layers" in name}) == kept
    assert small.plan.layouts.mixed == Mixed(renumbered, others)
    assert module.compare_sample(small, made.example)[1] < 1e-9


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
    honest = emission.emit

    def without_reduction(*args: Any) -> RankProgram:
        program = honest(*args)
        kept = tuple(i for i in program.schedule if not (i.kind == "all_reduce" and i.keys[0].startswith("grad.")))
        assert len(kept) < len(program.schedule)
        return replace(program, schedule=kept)

    monkeypatch.setattr(emission, "emit", without_reduction)
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


class Tied(Stack):
    """The first layer's weight is the last's, which another stage holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
        self.last.weight = self.first.weight


def test_a_parameter_that_stages_share() -> None:
    example = {"x": torch.randint(9, (4,)), "y": torch.randint(9, (4,))}
    made = plan(
        Tied(),
        Topology.preset("cpu", devices=3),
        example_inputs=example,
        strategy=Strategy(dp=1, tp=1, pp=3, microbatches=2),
        device="cpu",
    )
    assert verify(made).compared == 1 + 4 * LAYERS


class Masked(nn.Module):
    """A mask and a count, which zeros would not stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.mask, self.count = nn.Buffer(torch.tril(torch.ones(4, 4, dtype=torch.bool))), nn.Buffer(torch.tensor(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = (self.inner(x) @ x.transpose(1, 2)).masked_fill(~self.mask, -torch.inf).softmax(-1) / self.count
        return nn.functional.cross_entropy(self.outer(scores @ x).mean(1), y)


def example_of(model: nn.Module, example: dict[str, Tensor]) -> PlannedModel:
    wanted = Strategy(dp=2, tp=1, pp=1)
    return plan(model, Topology.preset("cpu", devices=2), example_inputs=example, strategy=wanted, device="cpu")


def test_buffers_of_whole_numbers_are_the_models_own() -> None:
    example = {"x": torch.randn(2, 4, WIDTH), "y": torch.randint(3, (2,))}
    assert verify(example_of(Masked(), example)).compared == 4
    broken = Masked()
    broken.count.zero_()
    assert "not compared: the model's loss on random parameters is nan" in str(verify(example_of(broken, example)))


class Columns(nn.Module):
    """Each column of the input has ids of its own, and the third is a sum of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, WIDTH) for n in (50, 3))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(self.tables[0](x[:, 0]) + self.tables[1](x[:, 1])), y)


def test_inputs_of_columns_and_of_one_dim() -> None:
    table = {"x": torch.tensor([[49, 0], [20, 1], [3, 2], [4, 1]]), "y": torch.randint(3, (4,))}
    made = example_of(Columns(), table)
    assert verify(made).compared == 4
    flat = module.repeated(made.problem, {"input.x": table["x"][:, 0], "input.y": table["y"]})["input.x"]
    assert not torch.equal(flat[:4], flat[4:]) and flat.min() >= 0 and flat.max() <= 49


def test_ranks_that_all_take_the_first_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwright.compiler import verify as numbers

    made = example_of(Columns(), {"x": torch.tensor([[49, 0], [20, 1], [3, 2], [4, 1]]), "y": torch.randint(3, (4,))})
    honest = numbers.cut
    monkeypatch.setattr(numbers, "cut", lambda whole, cuts, mesh, at: honest(whole, cuts, mesh, dict.fromkeys(at, 0)))
    with pytest.raises(VerificationError):
        verify(made)


class Boxes(nn.Module):
    """Of two whole numbers the second is the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(self.table(x[:, 1] - x[:, 0])), y)


def test_numbers_that_belong_together_stay_as_they_are() -> None:
    example = {"x": torch.tensor([[7, 8], [6, 7]]).repeat(8, 1), "y": torch.randint(3, (16,))}
    assert verify(example_of(Boxes(), example)).compared == 3


def test_without_gradients_around_it_and_with_inputs_that_want_them() -> None:
    example = {"x": torch.randn(4, 4, requires_grad=True), "y": torch.randint(3, (4,))}
    with torch.no_grad():
        assert verify(example_of(Stack(), example)).compared == 4 + 4 * LAYERS


def test_what_is_captured_again_shares_outputs_as_the_plan_does() -> None:
    made = planned(Strategy(dp=4, tp=1, pp=1))
    sample = Sample(replace(made.problem, share_outputs=True), made.plan)
    assert fewer_ranks(sample, made.capture).problem.share_outputs
