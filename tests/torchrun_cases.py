"""What runs under torchrun: every model, and every strategy, at least once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shardwright import Strategy

STEPS = 2


@dataclass(frozen=True)
class Case:
    model: str
    strategy: Strategy
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


ONE = {"layers": 1}
CASES = {
    "mlp dp4": Case("mlp", Strategy(dp=4, zero=0)),
    "mlp zero1": Case("mlp", Strategy(dp=4, zero=1)),
    "mlp zero2": Case("mlp", Strategy(dp=4, zero=2)),
    "mlp pp4": Case("mlp", Strategy(pp=4), {"layers": 5}),
    "mlp gpipe": Case("mlp", Strategy(pp=2, dp=2, schedule="gpipe"), {"batch": 7}),
    "mlp auto": Case("mlp", Strategy()),
    "gpt hsdp": Case("gpt", Strategy(dp_replicate=2, dp_shard=2), ONE),
    "gpt sp4": Case("gpt", Strategy(tp=4, sequence_parallel=True), ONE),
    "llama zero3tp2": Case("llama", Strategy(dp=2, tp=2, zero=3), ONE),
    "gpt2 dp2pp2": Case("gpt2", Strategy(dp=2, pp=2, microbatches=2), ONE),
    "bert dp2tp2": Case("bert", Strategy(dp=2, tp=2, zero=0), ONE),
    "t5 zero3": Case("t5", Strategy(dp=4, zero=3), ONE),
    "vit tp2pp2": Case("vit", Strategy(tp=2, pp=2, microbatches=2), ONE),
    "mixtral tp4": Case("mixtral", Strategy(tp=4), ONE, torch.float32),  # eager has no grouped product in float64
    "resnet dp4": Case("resnet", Strategy(dp=4, zero=1)),
}
FEATURES = {
    "sharded state": Case("gpt", Strategy(dp=2, tp=2, zero=3), ONE),
    "meta": Case("mlp", Strategy(dp=2, tp=2, zero=2)),
}
