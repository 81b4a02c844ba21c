"""What cannot be right is refused: one clear error, at once, on every rank, and what was there before still trains.

A peer that dies is in test_torchrun.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from lockstep_module import double, on_ranks
from torch import Tensor, nn

from shardwright import Strategy
from shardwright.runtime.errors import PeerLostError
from shardwright.runtime.module import ParallelModule

Example = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]


def mlp(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    return double(*zoo.MODELS["mlp"](**options))


def refused(
    model: nn.Module | Callable[[int], nn.Module], strategy: Strategy | None, example: Example, world_size: int = 4, **options: Any
) -> str:
    """The error with which planning or the first step ends, which must reach every rank. Its text on rank 0."""
    from lockstep_module import parallelize

    from shardwright.runtime.lockstep import World, run_ranks

    texts: dict[int, str] = {}

    def body(rank: int, world: World) -> None:
        torch.manual_seed(0)
        own = copy.deepcopy(model) if isinstance(model, nn.Module) else model(rank)
        given = example(rank) if callable(example) else example
        with pytest.raises((ValueError, RuntimeError)) as error:
            parallelize(own, world, rank, given, strategy, batch="global", **options).train_step(**given)
        assert not isinstance(error.value, PeerLostError), "a rank was left waiting"
        texts[rank] = str(error.value)

    run_ranks(world_size, body, timeout=120)
    assert sorted(texts) == list(range(world_size))
    return texts[0]


# --- models ---------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if h.sum() > 0:  # the line to be named
            h = h * 2
        return h.mean()


def test_control_flow_that_depends_on_data(capfd: pytest.CaptureFixture[str]) -> None:
    text = refused(Branching(), None, {"x": torch.randn(4, 4)})
    assert "depends on the values of tensors" in text and "torch.where" in text
    assert "test_bad_input.py" in text and "if h.sum() > 0:" in text
    assert capfd.readouterr().out == "", "torch.export's own report of it"


class Contrastive(nn.Module):
    """A loss in which each sample meets every other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.second(torch.tanh(self.first(x))), dim=-1)
        return F.cross_entropy(z @ z.T, torch.arange(len(x)))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()).square().mean()


class NormalizedAlone(nn.Module):
    """Each sample by itself; the running statistics are means over all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.InstanceNorm1d(2, track_running_stats=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).unflatten(-1, (2, 4))).relu()).square().mean()


COUPLED = [(Contrastive, "matmul"), (Normalized, "module 'norm'"), (NormalizedAlone, "module 'norm'")]


@pytest.mark.parametrize(("model", "named"), COUPLED, ids=["loss", "batch norm", "instance norm"])
@pytest.mark.parametrize("pp", [1, 2])
def test_samples_that_see_each_other_under_pinned_microbatches(model: type[nn.Module], named: str, pp: int) -> None:
    text = refused(model().double(), Strategy(pp=pp, microbatches=2), {"x": torch.randn(8, 6).double()})
    assert "couples samples of different micro-batches" in text and named in text and "test_bad_input.py" in text
    assert "Use microbatches=1" in text


@pytest.mark.parametrize("model", [Contrastive, Normalized, NormalizedAlone])
def test_samples_that_see_each_other_take_one_microbatch(model: type[nn.Module]) -> None:
    def body(parallel: ParallelModule, rank: int) -> float:
        assert parallel.plan.microbatches == 1 and parallel.plan.stages == 2
        return parallel.train_step(**batch).item()

    plain, batch = model().double(), {"x": torch.randn(8, 6).double()}
    losses = on_ranks(plain, Strategy(pp=2, dp=2), body, example=batch, batch="global")
    assert losses == pytest.approx([plain(**batch).item()] * 4, rel=1e-9)


# --- meshes, sizes and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Strategy(dp=3), "dp=3 does not divide the 4 ranks: sizes that do are 1, 2, 4"),
        (Strategy(dp=2, tp=2, pp=2), "dp=2 x pp=2 x tp=2 = 8 does not divide the 4 ranks"),
        (Strategy(pp=2, microbatches=7), "microbatches=7 cannot cut dim 0 of the batch, which has 2 samples"),
        (Strategy(dp=4), "dim 0 of the batch, 3 samples, cannot be cut over 4 data ranks: dp of 1, 2 works"),
    ],
    ids=["mesh", "product", "micro-batches", "batch"],
)
def test_sizes_that_cannot_be(strategy: Strategy, message: str) -> None:
    model, batch = mlp(batch=3 if strategy.dp == 4 else 4)
    assert message in refused(model, strategy, batch)


@pytest.mark.parametrize("strategy", [Strategy(tp=4), Strategy(dp=4, zero=3), Strategy(pp=4), Strategy(tp=2, pp=2)], ids=str)
def test_dims_that_do_not_divide_are_cut_unevenly_or_replicated(strategy: Strategy) -> None:
    """Widths of 3 and 5, 3 samples, 2 layers: nothing divides by 4."""
    torch.manual_seed(0)
    plain = zoo.HandMLP((3, 5, 1)).double()
    batch = {"x": torch.randn(5, 3).double(), "y": torch.randn(5, 1).double()}
    losses = on_ranks(plain, strategy, lambda p, _: p.train_step(**batch).item(), example=batch, batch="global")
    assert losses == pytest.approx([plain(**batch).item()] * 4, rel=1e-9)


def test_memory_that_does_not_suffice() -> None:
    """By how much, and what would fit: here nothing but more memory; under pins, what they rule out."""
    model, batch = mlp()
    text = refused(model, None, batch, memory_limit=1000)
    assert "no plan fits 1000 B per rank" in text and "too much" in text and "memory_limit=" in text
    largest = max(model.named_parameters(), key=lambda item: item[1].numel())[0]
    assert f"  {largest}, its gradient and its optimizer state" in text
    text = refused(model, Strategy(dp=4, zero=0), batch, memory_limit=20_000)
    assert re.search(r"What would fit, the cheapest first: (tp|dp_shard)=4.*, which your strategy rules out", text)


def test_where_the_memory_goes() -> None:
    """Large batch, small parameters: the line of the model whose values are kept."""
    model, _ = mlp()
    text = refused(model, Strategy(dp=1, tp=1, pp=1, microbatches=1), mlp(batch=4096)[1], world_size=1, memory_limit=500_000)
    assert re.search(r"activations, \d x \S+\.py:\d+: ", text)
    ways = text.split("the cheapest first: ")[1].split(";")
    assert any("instead of 4096 samples" in way for way in ways)
    assert any("micro-batches, which your strategy rules out" in way for way in ways)


# --- ranks that differ ----------------------------------------------------------------------------------------------


def test_different_models() -> None:
    text = refused(lambda rank: mlp(layers=2 if rank == 2 else 3)[0], None, mlp()[1])
    assert "ranks hold different models" in text and "ranks 0, 1, 3: parameter layers.1.weight: float64 [25, 27]" in text


def test_different_frozen_parameters() -> None:
    def model(rank: int) -> nn.Module:
        made = mlp()[0]
        made.get_parameter("layers.0.weight").requires_grad_(rank != 1)
        return made

    assert "rank 1: parameter layers.0.weight: float64 [27, 13], frozen" in refused(model, None, mlp()[1])


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(13, 5), scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.linear(x) * self.scale, y)


def test_different_code() -> None:
    """The same parameters, another graph."""
    text = refused(lambda rank: Scaled(2.0 if rank == 3 else 1.0).double(), None, mlp()[1])
    assert "captured different graphs of the model" in text and "rank 3: aten.mul.Tensor" in text and "test_bad_input.py" in text


@pytest.mark.parametrize("name", ["strategy", "outputs"])
def test_different_requests(name: str) -> None:
    """Each rank's own arguments."""
    from lockstep_module import parallelize

    from shardwright.runtime.lockstep import World, run_ranks

    model, batch = mlp()
    found = []

    def body(rank: int, world: World) -> None:
        own: dict[str, Any] = {"strategy": Strategy(tp=4)} if name == "strategy" else {"outputs": "all"}
        with pytest.raises(RuntimeError, match=rf"ranks ask for different plans; the first difference:\n  ranks 0, 2, 3: {name}="):
            parallelize(copy.deepcopy(model), world, rank, batch, **(own if rank == 1 else {}))
        found.append(rank)

    run_ranks(4, body, timeout=60)
    assert sorted(found) == [0, 1, 2, 3]


def test_different_structures_of_a_batch() -> None:
    """Found out in a later call, after which training goes on."""
    model, batch = mlp()
    more = {**batch, "x": batch["x"].float()}

    def body(parallel: ParallelModule, rank: int) -> None:
        before = parallel.train_step(**batch).item()
        with pytest.raises(RuntimeError, match="rank 2"):
            parallel.train_step(**(more if rank == 2 else batch))
        with pytest.raises((RuntimeError, TypeError), match="rank 1"):
            parallel.train_step(**({"x": batch["x"]} if rank == 1 else batch))
        parallel.zero_grad()
        assert parallel.train_step(**batch).item() == before

    on_ranks(model, Strategy(dp=2, tp=2), body, example=batch, batch="global")


# --- user code, gradients, optimizers -------------------------------------------------------------------------------


def test_an_exception_in_the_users_code_on_one_rank() -> None:
    """In a step of training: the others end too, saying which rank stopped and why."""
    ended = []

    def body(parallel: ParallelModule, rank: int) -> None:
        try:
            parallel.train_step(**batch)
            if rank == 1:
                raise KeyError("the user's loader")
            parallel.train_step(**batch)
        except PeerLostError as error:
            ended.append(str(error))
            raise

    model, batch = mlp()
    with pytest.raises(KeyError, match="the user's loader"):
        on_ranks(model, Strategy(dp=4), body, example=batch, batch="global")
    assert len(ended) == 3 and all('rank 1 stopped: KeyError: "the user\'s loader"' in text for text in ended)


def test_an_exception_in_the_model_on_one_rank() -> None:
    """While it is captured."""

    class Fails(Scaled):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if self.scale < 0:
                raise ZeroDivisionError("in the model")
            return super().forward(x, y)

    text = refused(lambda rank: Fails(-1.0 if rank == 2 else 1.0).double(), None, mlp()[1])
    assert "rank 2" in text and "in the model" in text


def test_a_gradient_into_an_output_other_than_the_loss() -> None:
    def body(parallel: ParallelModule, rank: int) -> None:
        out = parallel(**batch)
        logits = out["logits"].full_tensor()
        with pytest.raises(RuntimeError, match="output 'logits'"):
            logits.sum().backward()
        parallel.zero_grad()
        parallel(**batch)["loss"].backward()

    model, batch = double(*zoo.MODELS["gpt"](layers=1))
    on_ranks(model, Strategy(dp=2, tp=2), body, example=batch, batch="global", outputs="all")


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon"])
def test_optimizers_that_mix_elements(name: str) -> None:
    cls: Any = getattr(torch.optim, name, None)
    if cls is None:
        pytest.skip(f"this torch has no {name}")

    def body(parallel: ParallelModule, rank: int) -> None:
        matrices = [p for p in parallel.parameters() if p.dim() == 2]
        before = [p.detach().clone().to_local() for p in matrices]
        with pytest.raises(RuntimeError, match="element"):
            optimizer = cls(matrices, lr=0.1)
            parallel.train_step(**batch)
            optimizer.step(*([lambda: parallel.train_step(**batch)] if name == "LBFGS" else []))
        for p, old in zip(matrices, before, strict=True):
            assert torch.equal(p.detach().to_local(), old), "nothing was changed"

    model, batch = mlp()
    on_ranks(model, Strategy(dp=2, tp=2, zero=3), body, example=batch, batch="global")


def test_ambient_autocast_is_refused_by_name() -> None:
    def body(parallel: ParallelModule, rank: int) -> None:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"torch\.autocast.*precision="):
            parallel.train_step(**batch)
        parallel.train_step(**batch)

    model, batch = mlp()
    on_ranks(model, Strategy(dp=4), body, example=batch, batch="global")
