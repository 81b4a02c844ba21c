"""Training through ParallelModule, on all ranks in one process: what optimizers see and leave is what one device has."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from lockstep_module import OneDevice, assert_same, double, on_ranks, wholes
from programs import NEAR
from safetensors.torch import save_file
from torch import Tensor, nn

from shardwright import Strategy
from shardwright.compiler import engine
from shardwright.runtime.errors import MismatchError, ShardwrightError
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.sharded import full_tensor

STEPS = 3
PARALLEL = {
    "dp4": Strategy(dp=4, zero=0),
    "zero1": Strategy(dp=4, zero=1),
    "zero3": Strategy(dp=4, zero=3),
    "hsdp": Strategy(dp_replicate=2, dp_shard=2, zero=2),
    "tp4": Strategy(tp=4),
    "sp2": Strategy(dp=2, tp=2, sequence_parallel=True),
    "zero3tp2": Strategy(dp=2, tp=2, zero=3),
    "pp4": Strategy(pp=4, microbatches=4),
    "dp2pp2": Strategy(dp=2, pp=2, zero=1, microbatches=2),
    "tp2pp2": Strategy(tp=2, pp=2, microbatches=2),
    "auto": Strategy(),
}
TRAINED = [
    *(("mlp", name) for name in PARALLEL),
    *(("gpt", name) for name in ("zero1", "zero3tp2", "sp2", "tp2pp2", "dp2pp2")),
    ("llama", "zero3tp2"),
    ("llama", "pp4"),
    ("gpt2", "tp4"),
    ("gpt2", "dp2pp2"),
    ("bert", "hsdp"),
    ("t5", "zero1"),
    ("vit", "tp2pp2"),
    ("mixtral", "zero3"),
    ("resnet", "zero3tp2"),
    ("resnet", "dp4"),
]
Made = tuple[nn.Module, dict[str, Any]]


def made(model: str, **options: Any) -> Made:
    return double(*zoo.MODELS[model](**options))


def later(batch: dict[str, Any], step: int) -> dict[str, Any]:
    """Another batch of the same shapes: the same samples, in another order."""
    return {k: v.roll(step, 0) for k, v in batch.items()}


def optimizer_of(parameters: Any) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW over two groups, and a scheduler."""
    named = list(parameters)
    groups = [
        {"params": [p for k, p in named if "bias" not in k], "weight_decay": 0.1},
        {"params": [p for k, p in named if "bias" in k], "lr": 0.02, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.01)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["loss"]


def coupled(model: str, strategy: Strategy) -> Strategy:
    """BatchNorm takes one micro-batch."""
    return replace(strategy, microbatches=1) if model == "resnet" and strategy.microbatches else strategy


@pytest.mark.parametrize(("model", "strategy"), TRAINED)
def test_parameters_after_three_steps(model: str, strategy: str) -> None:
    """With clipping, parameter groups and a scheduler; `loss.backward()` and `train_step` in turn; buffers too."""
    plain, batch = made(model)
    original = copy.deepcopy(plain)
    one, (optimizer, schedule) = OneDevice(plain), optimizer_of(plain.named_parameters())
    facts = []
    for step in range(STEPS):
        loss = one(**later(batch, step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        facts.append([loss.item(), norm.item()])

    def body(parallel: ParallelModule, rank: int) -> Any:
        optimizer, schedule = optimizer_of(parallel.named_parameters())
        found = []
        for step in range(STEPS):
            if step == 1:
                loss = parallel.train_step(**later(batch, step))
            else:
                loss = loss_of(parallel(**later(batch, step)))
                loss.backward()
            norm = parallel.clip_grad_norm_(0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append([loss.item(), norm.item()])
        return found, wholes(parallel), parallel.state_dict(full=True, rank0_only=False)

    results = on_ranks(original, coupled(model, PARALLEL[strategy]), body, example=batch, batch="global")
    for found, _, _ in results:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(facts), rtol=1e-7, atol=1e-9)
        assert found == results[0][0], "loss and norm are equal on all ranks"
    assert_same([parameters for _, parameters, _ in results], dict(plain.named_parameters()), 1e-8)
    for _, _, state in results:
        assert list(state) == list(plain.state_dict())
        assert_same(
            [{k: v for k, v in state.items() if v.is_floating_point()}],
            {k: v for k, v in state_of(plain).items() if v.is_floating_point()},
            1e-8,
        )
        assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items() if not v.is_floating_point())


# --- one feature at a time, on a small model ------------------------------------------------------------------------

SOME = ("zero1", "zero3tp2", "dp2pp2")


@pytest.fixture(params=SOME)
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return PARALLEL[request.param]


def test_accumulation_with_no_sync(strategy: Strategy) -> None:
    """Gradients of three losses, summed over the ranks once, are those of the sum of the losses."""
    plain, batch = made("mlp")
    original, one = copy.deepcopy(plain), OneDevice(plain)
    sum((k + 1) * one(**later(batch, k)) for k in range(3)).backward()

    def body(parallel: ParallelModule, rank: int) -> Any:
        for k in range(2):
            with parallel.no_sync():
                (loss_of(parallel(**later(batch, k))) * (k + 1)).backward()
        (loss_of(parallel(**later(batch, 2))) * 3).backward()
        return wholes(parallel, "grad")

    assert_same(on_ranks(original, strategy, body, example=batch, batch="global"), gradients(plain))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


class Normed(nn.Module):
    """Dropout, and a BatchNorm that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(13, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.last(self.dropout(self.norm(self.first(x)))), y)


def test_evaluation_between_steps(strategy: Strategy) -> None:
    """Without dropout, and by the running statistics of the steps before."""
    plain, batch = double(Normed(), zoo.MODELS["mlp"]()[1])
    original = copy.deepcopy(plain)
    plain.dropout.p = 0.0
    one = OneDevice(plain)
    expected = []
    for step in range(3):
        plain.eval()
        expected.append(one(**later(batch, 1)).item())
        plain.train()
        one(**later(batch, step))  # counts, without learning

    def body(parallel: ParallelModule, rank: int) -> Any:
        found = []
        for step in range(3):
            parallel.eval()
            found.append(loss_of(parallel(**later(batch, 1))).item())
            with torch.no_grad():
                output = loss_of(parallel(**later(batch, 1)))
            assert not output.requires_grad and output.item() == found[-1]
            parallel.train()
            parallel.train_step(**later(batch, step))
        return found, parallel.state_dict(full=True, rank0_only=False)

    for found, state in on_ranks(original, replace(strategy, microbatches=1), body, example=batch, batch="global"):
        assert found == pytest.approx(expected, rel=1e-9)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(state[name], buffer, rtol=1e-9, atol=1e-12)


class InstanceNormed(nn.Module):
    """Normalization of each channel of each sample, with running statistics: means over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True, track_running_stats=True)
        self.second, self.other = nn.Conv2d(1, 5, 3), nn.InstanceNorm2d(5, momentum=0.3, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(torch.tanh(self.norm(self.first(x)))[:, None])).tanh().mean()


@pytest.mark.parametrize("name", ["dp4", "tp4", "zero3tp2"])
def test_instance_norm_keeps_its_statistics(name: str) -> None:
    plain, (x, *later_ones) = InstanceNormed().double(), torch.randn(3, 8, 3, 9).double()
    original, optimizer = copy.deepcopy(plain), torch.optim.SGD(plain.parameters(), lr=0.5)
    expected = []
    for given in (x, *later_ones):
        optimizer.zero_grad()
        expected.append(plain(given))
        expected[-1].backward()
        optimizer.step()
    plain.eval()
    expected.append(plain(x))

    def body(parallel: ParallelModule, rank: int) -> Any:
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5)
        losses = []
        for given in (x, *later_ones):
            optimizer.zero_grad()
            losses.append(parallel.train_step(given).item())
            optimizer.step()
        grads, state = wholes(parallel, "grad"), parallel.state_dict(full=True, rank0_only=False)
        parallel.eval()
        return [*losses, loss_of(parallel(x)).item()], grads, state

    results = on_ranks(original, coupled("resnet", PARALLEL[name]), body, example=(x,), batch="global")
    assert_same([grads for _, grads, _ in results], gradients(plain))
    for losses, _, state in results:
        assert losses == pytest.approx([y.item() for y in expected], rel=1e-9)
        assert_same([{k: v.double() for k, v in state.items()}], {k: v.double() for k, v in plain.state_dict().items()})


class Assorted(nn.Module):
    """A bag of embeddings, a mask that sets, the last token of each sample, and log-probabilities picked by token."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.tokens, self.act = nn.EmbeddingBag(12, 8, mode="mean"), nn.Embedding(12, 8), nn.Hardswish()
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)

    def forward(self, ids: Tensor, last: Tensor, hidden: Tensor) -> Tensor:
        h = self.act(self.middle(self.tokens(ids)))
        h[hidden] = 0.5
        h = h + (h[torch.arange(len(ids)), last] + self.bag(ids))[:, None]
        chosen = self.head(h).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return -F.logsigmoid((chosen * ~hidden.all(1, keepdim=True)).sum(1)).mean()


@pytest.mark.filterwarnings("error:ops without a sharding rule")
@pytest.mark.parametrize("name", ["dp4", "sp2"])
def test_lookups_are_sharded(name: str) -> None:
    plain = Assorted().double()
    batch = {"ids": torch.randint(0, 12, (8, 5)), "last": torch.randint(-5, 5, (8,)), "hidden": torch.rand(8, 5) < 0.3}
    original, loss = copy.deepcopy(plain), plain(**batch)
    loss.backward()

    def body(parallel: ParallelModule, rank: int) -> Any:
        found = parallel.train_step(**batch).item()
        nodes = [n for n in parallel.program.graphs["forward"].graph.graph.nodes if n.op == "call_function"]
        assert all(n.meta["val"].shape[0] < 8 for n in nodes if n.target is torch.ops.aten.gather.default)
        return found, wholes(parallel, "grad"), [str(n.target) for n in nodes]

    results = on_ranks(original, PARALLEL[name], body, example=batch, batch="global")
    assert_same([grads for _, grads, _ in results], gradients(plain))
    for found, _, targets in results:
        assert found == pytest.approx(loss.item(), rel=1e-9)
        assert "aten.gather.default" in targets and "aten._embedding_bag.default" not in targets
        assert ("shardwright.pick.default" if name == "dp4" else "shardwright.pick_shard.default") in targets


def test_frozen_parameters(strategy: Strategy) -> None:
    """Frozen before: not trained, and not to be thawed. Frozen after: without a gradient from then on."""
    plain, batch = made("mlp")
    plain.layers[0].weight.requires_grad_(False)
    original = copy.deepcopy(plain)
    OneDevice(plain)(**batch).backward()
    expected = gradients(plain)
    assert "layers.0.weight" not in expected

    def body(parallel: ParallelModule, rank: int) -> Any:
        parallel.train_step(**batch)
        found = wholes(parallel, "grad")
        held = dict(parallel.named_parameters())
        parallel.zero_grad()
        for name, p in held.items():
            if name.startswith("layers.1"):
                p.requires_grad_(False)
        parallel.train_step(**batch)
        left = wholes(parallel, "grad")
        if "layers.0.weight" in held:
            held["layers.0.weight"].requires_grad_(True)
        if "layers.0.weight" in held:
            with pytest.raises(ShardwrightError, match=r"'layers\.0\.weight' was frozen when the model was planned"):
                parallel.train_step(**batch)
        return found, left

    results = on_ranks(original, strategy, body, example=batch, batch="global")
    assert_same([found for found, _ in results], expected)
    assert_same([left for _, left in results], {k: g for k, g in expected.items() if not k.startswith("layers.1")})


def test_state_dicts(strategy: Strategy) -> None:
    """Sharded and whole, out and in again; and a plain model's."""
    plain, batch = made("gpt", layers=1)
    other, _ = made("gpt", layers=1)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    first, second = OneDevice(plain)(**batch).item(), OneDevice(other)(**batch).item()
    assert first != pytest.approx(second, rel=1e-3)

    def body(parallel: ParallelModule, rank: int) -> None:
        def loss() -> float:
            return loss_of(parallel(**batch)).item()

        sharded = {k: v.clone() for k, v in parallel.state_dict().items()}
        whole = parallel.state_dict(full=True, rank0_only=False)
        assert (parallel.state_dict(full=True) == {}) == (rank > 0)
        assert loss() == pytest.approx(first, rel=1e-9)
        parallel.load_state_dict(other.state_dict())
        assert loss() == pytest.approx(second, rel=1e-9)
        parallel.load_state_dict(sharded)
        assert loss() == pytest.approx(first, rel=1e-9)
        parallel.load_state_dict(other.state_dict())
        parallel.load_state_dict(whole)
        assert loss() == pytest.approx(first, rel=1e-9)
        with pytest.raises(RuntimeError, match="Missing key"):
            parallel.load_state_dict({k: v for k, v in whole.items() if k != "head.weight"})

    on_ranks(plain, strategy, body, example=batch, batch="global")


def test_compiles_once_per_kind_of_call(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape seen before costs nothing; a new one gets a program under the same layout; so does another constant."""
    plain, batch = double(Scaled(), {"x": torch.randn(8, 6), "y": torch.randn(8, 5)})
    smaller = {k: v[:6] for k, v in batch.items()}
    calls = [(batch, 1.0), (smaller, 1.0), (batch, 2.0), (smaller, 1.0), (batch, 1.0), (batch, 2.0)]
    original, one = copy.deepcopy(plain), OneDevice(plain)
    expected = [one(**b, scale=scale).item() for b, scale in calls]
    emitted: list[int] = []
    make = engine.ModelEngine._compile
    monkeypatch.setattr(
        engine.ModelEngine,
        "_compile",
        lambda self, *args, **options: emitted.append(self.control.rank) or make(self, *args, **options),
    )

    def body(parallel: ParallelModule, rank: int) -> None:
        layouts = []
        for k, (b, scale) in enumerate(calls):
            assert loss_of(parallel(**b, scale=scale)).item() == pytest.approx(expected[k], rel=1e-9)
            assert emitted.count(rank) == min(k + 1, 3)
            held = [(name, tuple(p.to_local().shape)) for name, p in parallel.named_parameters() if hasattr(p, "to_local")]
            layouts.append((parallel.plan.hash, held))
        assert all(layout == layouts[0] for layout in layouts)

    on_ranks(original, strategy, body, example={**batch, "scale": 1.0}, batch="global")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.HandMLP((6, 9, 5))

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.inner(x, y)


@dataclass
class Given:
    x: Tensor
    more: list[Any]


@dataclass
class Returned:
    loss: Tensor
    parts: dict[str, Any]
    note: str | None = None


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, given: Given, *, options: dict[str, Any]) -> Returned:
        hidden = torch.tanh(self.first(given.x) + given.more[0]["shift"])
        out = self.second(hidden)
        loss = (out - options["y"]).square().mean() * options["weight"]
        return Returned(loss, {"hidden": hidden, "out": (out, None)}, note=options["note"])


@pytest.mark.parametrize("outputs", ["loss", "all"])
def test_nested_inputs_and_outputs(outputs: str, strategy: Strategy) -> None:
    """Sharded outputs know their whole; under a pipeline, those besides the loss come back where they are asked for."""
    plain = Nested().double()
    x, shift, y = (torch.randn(5, n, dtype=torch.float64) for n in (6, 8, 3))
    given = Given(x, [{"shift": shift}, None, 3])
    options = {"y": y, "weight": 2.5, "note": "kept"}
    expected = plain(given, options=options)
    expected.loss.backward()

    def body(parallel: ParallelModule, rank: int) -> Any:
        found = parallel(given, options=options)
        assert type(found) is Returned and found.note == "kept" and set(found.parts) == {"hidden", "out"}
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-9)
        if strategy.pp is None or outputs == "all":
            pairs = (found.parts["hidden"], expected.parts["hidden"]), (found.parts["out"][0], expected.parts["out"][0])
            for got, wanted in pairs:
                assert got.shape == wanted.shape
                torch.testing.assert_close(full_tensor(got.detach()), wanted.detach(), rtol=1e-9, atol=1e-12)
        else:
            assert found.parts["hidden"] is None and found.parts["out"] == (None, None)
        found.loss.backward()
        return wholes(parallel, "grad")

    assert_same(on_ranks(plain, strategy, body, batch="global", outputs=outputs), gradients(plain))


def test_loss_function(strategy: Strategy) -> None:
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    x, target = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 5, (5,))
    loss = F.cross_entropy(plain(x), target)
    loss.backward()

    def body(parallel: ParallelModule, rank: int) -> Any:
        out = parallel(x, target)
        if strategy.pp is None:
            assert out.shape == (5, 5)
        assert parallel.train_step(x, target=target).item() == pytest.approx(loss.item(), rel=1e-9)
        return wholes(parallel, "grad")

    results = on_ranks(plain, strategy, body, example=(x, target), batch="global", loss_fn=F.cross_entropy)
    assert_same(results, gradients(plain))


def test_compiled_and_autocast(strategy: Strategy) -> None:
    """torch.compile leaves it as it is; autocast around it is refused by name."""
    plain, batch = made("mlp")
    expected = OneDevice(plain)(**batch).item()

    def body(parallel: ParallelModule, rank: int) -> None:
        assert loss_of(torch.compile(parallel)(**batch)).item() == pytest.approx(expected, rel=1e-9)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ShardwrightError, match=r"torch\.autocast"):
            parallel(**batch)
        parallel.train_step(**batch)

    on_ranks(plain, strategy, body, example=batch, batch="global")


def test_an_optimizer_that_waits_for_the_first_call(strategy: Strategy) -> None:
    plain, batch = made("mlp")
    original, one = copy.deepcopy(plain), OneDevice(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for _ in range(2):
        one(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    def body(parallel: ParallelModule, rank: int) -> Any:
        with pytest.raises(ShardwrightError, match="example_inputs"):
            list(parallel.parameters())
        optimizer = parallel.optimizer(torch.optim.AdamW, lr=0.1)
        for _ in range(2):
            loss_of(parallel(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return wholes(parallel)

    assert_same(on_ranks(original, strategy, body, batch="global"), dict(plain.named_parameters()), 1e-8)


# --- batches of every kind ------------------------------------------------------------------------------------------

LOCAL = {
    **{name: PARALLEL[name] for name in ("dp4", "zero3tp2", "dp2pp2")},
    "any2": Strategy(dp=2, tp=2, zero=2, layouts="any"),
}


def check_local(model: nn.Module, batches: list[dict[str, Any]], weights: list[float], strategy: Strategy) -> None:
    """Data rank k is given batches[k]: the loss is the mean over everything that counts, `weights[k]` of it in batches[k]."""
    original, one = copy.deepcopy(model), OneDevice(model)
    expected = sum(one(**b) * w for b, w in zip(batches, weights, strict=True) if w) / sum(weights)
    expected.backward()

    def own(parallel: ParallelModule) -> dict[str, Any]:
        assert parallel.data_world_size == len(batches)
        return batches[parallel.data_rank]

    def body(parallel: ParallelModule, rank: int) -> Any:
        loss = loss_of(parallel(**own(parallel)))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        loss.backward()
        norm = parallel.clip_grad_norm_(1e9)
        assert norm.item() == pytest.approx(torch.nn.utils.get_total_norm(list(gradients(model).values())).item(), rel=1e-9)
        return wholes(parallel, "grad")

    def example(rank: int) -> dict[str, Any]:
        stage, data = divmod(rank, 2)
        return batches[rank if strategy.dp == 4 else data if strategy.pp else stage]

    topology = NEAR if strategy.layouts == "any" else None
    assert_same(on_ranks(original, strategy, body, example=example, topology=topology), gradients(model))


@pytest.fixture(params=LOCAL)
def local(request: pytest.FixtureRequest) -> Strategy:
    return LOCAL[request.param]


def llama_batches(
    shapes: list[tuple[int, int]], masked: tuple[int, ...] = ()
) -> tuple[nn.Module, list[dict[str, Tensor]], list[float]]:
    """A model; a batch of each shape, those of `masked` with no label at all; the labels that count in each."""
    model, _ = made("llama", layers=1)
    batches = []
    for k, (rows, length) in enumerate(shapes):
        tokens = torch.randint(0, 101, (rows, length), generator=torch.Generator().manual_seed(k))
        labels = torch.where(torch.rand(rows, length) < 0.2, -100, tokens)
        batches.append({"input_ids": tokens, "labels": torch.full_like(tokens, -100) if k in masked else labels})
    return model, batches, [float((b["labels"][:, 1:] != -100).sum()) for b in batches]


def test_labels_all_masked_on_one_rank(local: Strategy) -> None:
    model, batches, weights = llama_batches([(2, 8)] * (local.dp or 1), masked=(1,))
    assert weights[1] == 0
    check_local(model, batches, weights, local)


def test_local_batches_of_other_sizes_and_lengths(local: Strategy) -> None:
    model, batches, weights = llama_batches([(3, 8), (2, 11), (1, 5), (4, 8)][: local.dp])
    check_local(model, batches, weights, local)


def test_lengths_far_apart_on_the_first_call(local: Strategy) -> None:
    """Each rank captures at its own length; where the parameters lie is the plan's to say, not each rank's."""
    model, batches, weights = llama_batches([(4, 12), (4, 2), (4, 3), (4, 12)][: local.dp])
    check_local(model, batches, weights, local)


def test_local_batches_of_other_sizes_with_a_plain_mean(local: Strategy) -> None:
    """The mean over the samples of all ranks, however many each has."""
    model, batch = made("mlp", batch=9)
    sizes = [3, 2, 1, 3] if local.dp == 4 else [6, 3]
    parts = {k: v.split(sizes) for k, v in batch.items()}
    check_local(model, [{k: v[i] for k, v in parts.items()} for i in range(len(sizes))], [float(n) for n in sizes], local)


class MeanOverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().mean()


def test_a_plain_mean_over_other_lengths_is_refused(local: Strategy) -> None:
    """Which count to divide by is not known: refused on every rank, with the line that takes the mean."""
    refused = []

    def body(parallel: ParallelModule, rank: int) -> None:
        x = torch.ones(4, 6 + parallel.data_rank, 3)
        with pytest.raises(MismatchError, match=r"different lengths.*a fixed count.*test_training\.py.*\.mean\(\).*pad"):
            parallel(x)
        refused.append(rank)

    on_ranks(MeanOverTokens(), local, body, example=(torch.randn(4, 6, 3),), promote=False, share=False)
    assert sorted(refused) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["dp4", "zero3tp2", "dp2pp2", "tp4"])
def test_left_padding(name: str) -> None:
    model, batch = made("llama", layers=1, batch=5, length=10)
    mask = torch.ones(5, 10, dtype=torch.long)
    for row, padded in enumerate((3, 0, 7, 1, 0)):
        mask[row, :padded] = 0
    batch = {**batch, "attention_mask": mask, "labels": torch.where(mask.bool(), batch["labels"], -100)}
    check_global(model, batch, PARALLEL[name])


@pytest.mark.parametrize("name", ["dp4", "zero3", "hsdp", "dp2pp2", "pp4", "tp2pp2"])
@pytest.mark.parametrize("model", ["gpt", "mlp"])
def test_batches_that_do_not_divide(model: str, name: str) -> None:
    plain, batch = made(model, batch=7, layers=1 if model == "gpt" else 3)
    check_global(plain, batch, PARALLEL[name])


def check_global(model: nn.Module, batch: dict[str, Any], strategy: Strategy) -> None:
    original = copy.deepcopy(model)
    loss = OneDevice(model)(**batch)
    loss.backward()

    def body(parallel: ParallelModule, rank: int) -> Any:
        assert parallel.train_step(**batch).item() == pytest.approx(loss.item(), rel=1e-9)
        return wholes(parallel, "grad")

    assert_same(on_ranks(original, strategy, body, example=batch, batch="global"), gradients(model))


def test_a_batch_too_small_for_the_ranks_is_refused() -> None:
    refused = []

    def body(parallel: ParallelModule, rank: int) -> None:
        with pytest.raises(ShardwrightError, match="a batch of 3 samples leaves nothing for some of the 4 data ranks"):
            parallel(**{k: v[:3] for k, v in batch.items()})
        refused.append(rank)

    model, batch = made("mlp")
    on_ranks(model, PARALLEL["dp4"], body, example=batch, batch="global")
    assert sorted(refused) == [0, 1, 2, 3]


# --- random numbers, ties, and models without memory ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["dp4", "zero3tp2", "sp2", "tp4", "tp2pp2", "dp2pp2"])
@pytest.mark.parametrize("model", ["gpt", "mlp"])
def test_dropout_draws_the_same_numbers_on_every_mesh(model: str, name: str) -> None:
    """Losses and gradients of two steps are those of the program of one rank, and the steps draw different numbers."""
    plain, batch = made(model, dropout=0.3, batch=6, layers=3)

    def body(parallel: ParallelModule, rank: int) -> Any:
        found = []
        for _ in range(2):
            parallel.zero_grad()
            found.append((parallel.train_step(**batch).item(), wholes(parallel, "grad")))
        return found

    torch.manual_seed(5)
    (((first, gradients), (second, _)),) = on_ranks(plain, None, body, example=batch, batch="global", world_size=1)
    assert first != pytest.approx(second, rel=1e-6)
    torch.manual_seed(5)
    results = on_ranks(plain, PARALLEL[name], body, example=batch, batch="global")
    for found in results:
        assert [loss for loss, _ in found] == pytest.approx([first, second], rel=1e-9)
    assert_same([found[0][1] for found in results], gradients)
    torch.manual_seed(6)
    other = on_ranks(plain, PARALLEL[name], body, example=batch, batch="global")
    assert other[0][0][0] != pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_dropout_of_transformers(model: str) -> None:
    """Attention's own dropout, sharded by heads and by samples, in repeated layers that are planned as one."""
    plain, batch = made(model, dropout=0.2, layers=3)
    body = lambda parallel, rank: parallel.train_step(**batch).item()  # noqa: E731
    torch.manual_seed(5)
    (expected,) = on_ranks(plain, None, body, example=batch, batch="global", world_size=1)
    for name in ("zero3tp2", "dp2pp2"):
        torch.manual_seed(5)
        assert on_ranks(plain, PARALLEL[name], body, example=batch, batch="global") == pytest.approx([expected] * 4, rel=1e-9)


def test_tied_weights_of_two_stages_stay_equal() -> None:
    plain, batch = made("gpt2", layers=1)

    def body(parallel: ParallelModule, rank: int) -> Any:
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1)
        for step in range(2):
            parallel.train_step(**later(batch, step))
            optimizer.step()
            optimizer.zero_grad()
        state = parallel.state_dict(full=True, rank0_only=False)
        assert torch.equal(state["transformer.wte.weight"], state["lm_head.weight"])
        return wholes(parallel).get("transformer.wte.weight")

    first, last = on_ranks(plain, Strategy(pp=2), body, example=batch, batch="global", world_size=2)
    assert first is not None and last is not None and torch.equal(first, last)
    assert not torch.equal(first, plain.transformer.wte.weight.detach())


@pytest.mark.parametrize("source", ["state dict", "safetensors", "initialization"])
def test_a_model_on_the_meta_device(source: str, strategy: Strategy, tmp_path: Path) -> None:
    """Buffers that are in no state dict (a rotary embedding's) included; its own initialization is the same on every mesh."""
    real, batch = zoo.MODELS["llama"](layers=1)
    with torch.device("meta"):
        empty = type(real)(real.config).train()
    state: Any = real.state_dict()
    if source == "safetensors":
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
        state = tmp_path
    body = lambda parallel, rank: loss_of(parallel(**batch)).item()  # noqa: E731
    options: dict[str, Any] = {"example": batch, "batch": "global", "promote": False}
    if source == "initialization":
        torch.manual_seed(3)
        (expected,) = on_ranks(empty, None, body, world_size=1, **options)
        torch.manual_seed(3)
        state = None
    else:
        expected = real(**batch).loss.item()
    assert on_ranks(empty, strategy, body, source=state, **options) == pytest.approx([expected] * 4, rel=1e-5)


def test_verified_before_training() -> None:
    model, batch = zoo.MODELS["mlp"]()

    def body(parallel: ParallelModule, rank: int) -> Any:
        parallel.train_step(**batch)
        return parallel.certificate

    found = on_ranks(model, PARALLEL["zero1"], body, example=batch, batch="global", verify=True, promote=False)
    assert found[0].compared > 0 and found[0].largest_error < 1e-9
    assert found == [found[0]] * 4
