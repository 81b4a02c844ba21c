"""Training through ParallelModule, on all ranks in one process: what optimizers see and leave is what one device has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from lockstep_module import OneDevice, assert_same, double, on_ranks, wholes
from torch import Tensor, nn

from shardwright import Strategy
from shardwright.runtime.module import ParallelModule

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
    from dataclasses import replace

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
        facts.append([float(loss), float(norm)])

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
            found.append([float(loss), float(norm)])
        return found, wholes(parallel), parallel.state_dict(full=True, rank0_only=False)

    results = on_ranks(original, coupled(model, PARALLEL[strategy]), body, example=batch, batch="global")
    for rank, (found, _, _) in enumerate(results):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(facts), rtol=1e-7, atol=1e-9, msg=lambda m: f"rank {rank}: {m}")
        assert found == results[0][0], "loss and norm are equal on all ranks"
    assert_same([parameters for _, parameters, _ in results], dict(plain.named_parameters()), 1e-8)
    for _, _, state in results:
        assert list(state) == list(plain.state_dict())
        assert_same([{k: v for k, v in state.items() if v.is_floating_point()}], {k: v for k, v in state_of(plain).items() if v.is_floating_point()}, 1e-8)
        assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items() if not v.is_floating_point())
