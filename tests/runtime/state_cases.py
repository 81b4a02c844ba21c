"""A model with tied weights, odd sizes and buffers, and the ways it is sharded in the tests of state dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwright.runtime.parameters import ParameterStore
from shardwright.runtime.program import Cut, Mesh, TensorSpec


class Tied(nn.Module):
    """`head.weight` is `embed.weight`; `positions` is a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.scale = weight()
        self.register_buffer("positions", torch.arange(5), persistent=False)
        self.embed = nn.Embedding(10, 6, _weight=weight(10, 6).detach())
        self.rows = nn.Linear(6, 12, bias=True)
        self.rows.weight, self.rows.bias = weight(12, 6), weight(12, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight


def moved(model: nn.Module) -> nn.Module:
    """The model with other values."""
    with torch.no_grad():
        for p in model.state_dict().values():
            p.add_(1)
    return model


MESHES = {
    "data": Mesh(("dp",), (4,)),
    "zero_tp": Mesh(("dp_shard", "tp"), (2, 2)),
    "uneven": Mesh(("dp_shard",), (4,)),
    "pipeline": Mesh(("pp", "tp"), (2, 2)),
}


def cuts_of(name: str, tp: int) -> dict[str, tuple[Cut, ...]]:
    """Parameter -> cuts. In "zero_tp" the data axis comes last, on what tp left: no DTensor lies like that."""
    if name == "zero_tp":
        return {
            "embed.weight": (Cut("tp", 0, ((5, 5),)), Cut("dp_shard", 0, ((3, 2),))),
            "rows.weight": (Cut("tp", 0, ((2, 2), (2, 2), (2, 2))), Cut("dp_shard", 0, ((3, 3),))),
            "rows.bias": (Cut("tp", 0, ((2, 2), (2, 2), (2, 2))), Cut("dp_shard", 0, ((3, 3),))),
            "norm.running_mean": (Cut("tp", 0, ((6, 6),)),),
        }
    if name == "uneven":
        return {
            "embed.weight": (Cut("dp_shard", 0, ((3, 3, 2, 2),)),),
            "rows.weight": (Cut("dp_shard", 1, ((2, 2, 1, 1),)),),
            "rows.bias": (Cut("dp_shard", 0, ((3, 3, 3, 3),)),),
            "norm.weight": (Cut("dp_shard", 0, ((12, 0, 0, 0),)),),
        }
    if name == "pipeline":
        return {"embed.weight": (Cut("tp", 1, ((3, 3),)),)}
    return {}


STAGES = {0: ("scale", "embed.weight", "positions"), 1: ("rows.", "norm.", "embed.weight", "positions")}


def make(name: str, communicator: Any, model: nn.Module | None = None) -> ParameterStore:
    """The store of one rank, filled from `model`."""
    model = model or Tied()
    mesh = MESHES[name]
    here = mesh.coordinates(communicator.rank)
    cuts = cuts_of(name, here.get("tp", 0))
    kept = STAGES[here["pp"]] if name == "pipeline" else ("",)

    def spec(key: str, x: torch.Tensor, persistent: bool = True) -> TensorSpec:
        own = cuts.get(key, ())
        gathered = ("dp_shard",) if name == "zero_tp" and any(cut.axis == "dp_shard" for cut in own) else ()
        aliases = ("head.weight",) if key == "embed.weight" else ()
        return TensorSpec(key, tuple(x.shape), x.dtype, own, gathered, (), aliases, persistent=persistent)

    parameters = [spec(k, p) for k, p in model.named_parameters() if k.startswith(kept)]
    buffers = [spec(k, b, k != "positions") for k, b in model.named_buffers() if k.startswith(kept)]
    store = ParameterStore(parameters, buffers, communicator, "cpu")
    for key, x in (*model.named_parameters(), *model.named_buffers()):
        if key in store.slots or key in store.buffers:
            store.set_whole(key, x.detach())
    return store
