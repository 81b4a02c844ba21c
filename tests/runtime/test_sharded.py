from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.runtime.errors import ShardwrightError
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.program import Cut, Mesh
from shardwright.runtime.sharded import Layout, ShardedTensor, full_tensor, local_tensor

MESH = Mesh(("dp", "tp"), (2, 2))
CUTS = {
    "whole": ((7, 3), ()),
    "uneven": ((7, 3), (Cut("dp", 0, ((4, 3),)),)),
    "empty": ((1, 3), (Cut("dp", 0, ((1, 0),)),)),
    "split": ((12, 5), (Cut("tp", 0, ((2, 2), (2, 2), (1, 3))),)),
    "both": ((7, 5), (Cut("tp", 1, ((3, 2),)), Cut("dp", 1, ((2, 1),)))),
    "flat": ((7,), (Cut("dp+tp", 0, ((2, 2, 2, 1),)),)),
    "scalar": ((), ()),
}
"""name -> shape, cuts. The second cut of "both" is of what its tp index 0 holds."""

RANKS = {name: (0, 2) if name == "both" else range(4) for name in CUTS}

torch.set_num_threads(1)


def layouts(rank: int) -> list[tuple[Layout, tuple[int, ...]]]:
    return [(Layout(MESH, rank, cuts), shape) for name, (shape, cuts) in CUTS.items() if rank in RANKS[name]]


def pairs(rank: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Sharded tensors of every layout, and ordinary ones of the same local values."""
    generator = torch.Generator().manual_seed(seed)
    sharded, plain = [], []
    for layout, shape in layouts(rank):
        local = layout.take(torch.randn(shape, generator=generator)).clone()
        sharded.append(ShardedTensor(local.clone(), layout, shape))
        plain.append(local)
    return sharded, plain


class Lion(torch.optim.Optimizer):
    """An optimizer of a user's own, elementwise."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = torch.where(p.grad > 0, momentum * 0.9 + p.grad * 0.1, momentum.clone().lerp_(p.grad, 0.1)).sign()
                p.add_(update, alpha=-group["lr"])
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


def clipped_sgd(params: Any, lr: float) -> torch.optim.Optimizer:
    """SGD with torch's clipping of values."""
    found = list(params)
    made = torch.optim.SGD(found, lr=lr)
    made.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(found, 0.5))
    return made


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ELEMENTWISE: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "Adam": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, "default loop foreach fused"),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, "default loop foreach fused"),
    "AdamW-tensor-lr": (torch.optim.AdamW, {"lr": torch.tensor(0.1)}, "default loop fused"),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "default loop foreach fused"),
    "SGD-max": (torch.optim.SGD, {"maximize": True}, "default foreach"),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}, "default loop foreach fused"),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}, "default foreach"),
    "NAdam": (torch.optim.NAdam, {"decoupled_weight_decay": True}, "default foreach"),
    "RAdam": (torch.optim.RAdam, {}, "default foreach"),
    "Adamax": (torch.optim.Adamax, {}, "default foreach"),
    "Adadelta": (torch.optim.Adadelta, {}, "default foreach"),
    "ASGD": (torch.optim.ASGD, {}, "default foreach"),
    "Rprop": (torch.optim.Rprop, {}, "default foreach"),
    "Lion": (Lion, {}, "default"),
    "clipped": (clipped_sgd, {}, "default"),
}
CASES = [(name, variant) for name, (_, _, variants) in ELEMENTWISE.items() for variant in variants.split()]


def train(
    parameters: list[nn.Parameter], make: Callable[..., Any], options: dict[str, Any], gradients: Callable[[int], list[Tensor]]
) -> Any:
    """Seven steps over two groups, a scheduler and an accumulated gradient, with a state dict saved and loaded."""
    groups = [{"params": parameters[:3], "lr": 0.03}, {"params": parameters[3:]}]
    grouped = make is not clipped_sgd
    optimizer = make(groups if grouped else parameters, **{"lr": 0.1, **copy.deepcopy(options)})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for step in range(7):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g if p.grad is None else p.grad.add_(g)
        optimizer.step()
        schedule.step()
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
    return optimizer


@pytest.mark.parametrize("name,variant", CASES, ids=["-".join(case) for case in CASES])
def test_elementwise_optimizers_are_exact(name: str, variant: str) -> None:
    make, options, _ = ELEMENTWISE[name]
    options = {**options, **VARIANTS[variant]}
    for rank in range(4):
        # Rprop indexes: what is elementwise of [n] is none of [], and refused.
        kept = [i for i, (_, shape) in enumerate(layouts(rank)) if shape or name != "Rprop"]
        sharded, plain = ([nn.Parameter(found[i]) for i in kept] for found in pairs(rank))
        train(sharded, make, options, lambda step, rank=rank, kept=kept: [pairs(rank, step + 1)[0][i] for i in kept])
        train(plain, make, options, lambda step, rank=rank, kept=kept: [pairs(rank, step + 1)[1][i] for i in kept])
        for a, b in zip(sharded, plain, strict=True):
            assert isinstance(a, ShardedTensor) and isinstance(a, nn.Parameter)
            torch.testing.assert_close(a.to_local(), b.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon],
    ids=["Adafactor", "LBFGS", "Muon"],
)
def test_other_optimizers_raise(make: Any) -> None:
    sharded, _ = pairs(0)
    parameters = [nn.Parameter(p) for p in sharded if p.dim() == 2]
    with pytest.raises(ShardwrightError, match=r"An optimizer must be elementwise.*Adafactor, LBFGS, Muon"):
        optimizer = make(parameters)
        for p, g in zip(parameters, [p for p in pairs(0, 1)[0] if p.dim() == 2], strict=True):
            p.grad = g
        optimizer.step(*[lambda: 0.0] if make is torch.optim.LBFGS else [])


@pytest.mark.parametrize(
    "act",
    [
        lambda p: p.sum(),
        lambda p: p.norm(),
        lambda p: p @ p.t(),
        lambda p: p.view(-1),
        lambda p: p[0],
        lambda p: p.cumsum(0),
        lambda p: p.softmax(-1),
        lambda p: torch.cat([p, p]),
        lambda p: p.data.normal_(),
        lambda p: float(p.max()),
        lambda p: torch.equal(p, p.detach()),
        lambda p: torch.nn.utils.parameters_to_vector([p]),
        lambda p: torch.nn.utils.get_total_norm([p]),
    ],
)
def test_what_mixes_elements_raises(act: Callable[[Tensor], Any]) -> None:
    p = nn.Parameter(pairs(0)[0][1])
    with pytest.raises(ShardwrightError, match=r"only a shard.*parallel\.clip_grad_norm_.*full_tensor\(\).*to_local\(\)"):
        act(p)


def test_operands_must_lie_alike() -> None:
    sharded, plain = pairs(0)
    with pytest.raises(ShardwrightError, match="sharded differently"):
        torch.add(sharded[0], sharded[1])
    with pytest.raises(ShardwrightError, match="an ordinary one"):
        torch.add(sharded[1], plain[1])
    with pytest.raises(ShardwrightError, match="an ordinary one"):
        sharded[1].copy_(plain[1])
    assert torch.equal((sharded[1] * torch.tensor(2.0)).to_local(), plain[1] * 2)


def test_copying_a_whole_takes_the_shard() -> None:
    for layout, shape in layouts(2):
        whole = torch.randn(shape)
        x = ShardedTensor(layout.take(torch.zeros(shape)).clone(), layout, shape)
        x.copy_(whole)
        assert torch.equal(x.to_local(), layout.take(whole))
        assert layout.local_shape(shape) == tuple(x.to_local().shape)


def test_version_counts_every_write() -> None:
    p = nn.Parameter(pairs(0)[0][1])
    p.grad = pairs(0, 1)[0][1]
    seen = [p.version]

    def wrote() -> bool:
        seen.append(p.version)
        return seen[-1] != seen[-2]

    for options in VARIANTS.values():
        torch.optim.AdamW([p], **options).step()
        assert wrote()
    p.data.mul_(2)
    assert wrote()
    p.detach().add_(1)
    assert wrote()
    p.to_local().zero_()
    assert wrote()
    p.detach().clone().add_(1)
    torch.zeros_like(p).add_(1)
    assert not wrote()


def test_copies_and_repr() -> None:
    p = nn.Parameter(pairs(1)[0][1], requires_grad=False)
    q = copy.deepcopy({"a": p, "b": p})
    assert q["a"] is q["b"] and isinstance(q["a"], nn.Parameter) and not q["a"].requires_grad
    q["a"].add_(1)
    assert not torch.equal(q["a"].to_local(), p.to_local())
    assert repr(p).startswith("ShardedTensor(float32 [7, 3], Shard(0) 0 of 2 over dp: tensor(")


def test_amp_unscale_and_skip_on_all_ranks() -> None:
    """An infinite gradient on one rank makes every rank skip the step."""

    def run(rank: int, world: World) -> tuple[Tensor, float]:
        mesh = Mesh(("dp",), (2,))
        layout = Layout(mesh, rank, (Cut("dp", 0, ((2, 1),)),), world.communicator(mesh, rank))
        p = nn.Parameter(ShardedTensor(torch.ones(2 - rank, 4), layout, (3, 4)))
        optimizer = torch.optim.SGD([p], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
        for value in (1.0, float("inf") if rank == 1 else 1.0):
            scaler.scale(torch.ones(()))
            p.grad = ShardedTensor(torch.full((2 - rank, 4), 8 * value), layout, (3, 4))
            scaler.step(optimizer)
            scaler.update()
        return p.to_local(), scaler.get_scale()

    for local, scale in run_ranks(2, run):
        assert torch.equal(local, torch.zeros_like(local)) and scale == 4.0


def test_full_tensor_and_its_gradient() -> None:
    wholes = {name: torch.randn(shape) for name, (shape, _) in CUTS.items() if name != "both"}

    def run(rank: int, world: World) -> None:
        communicator = world.communicator(MESH, rank)
        for name, whole in wholes.items():
            layout = Layout(MESH, rank, CUTS[name][1], communicator)
            x = ShardedTensor(layout.take(whole).clone(), layout, whole.shape).requires_grad_()
            found = full_tensor(x)
            assert type(found) is Tensor and torch.equal(found, whole)
            (found * whole).sum().backward()
            assert isinstance(x.grad, ShardedTensor) and torch.equal(x.grad.to_local(), layout.take(whole))
            assert full_tensor(whole) is whole and local_tensor(whole) is whole

    run_ranks(4, run)


def test_loading_a_file_gives_no_peers() -> None:
    file = io.BytesIO()
    torch.save(pairs(0)[0], file)
    file.seek(0)
    for loaded, original in zip(torch.load(file, weights_only=True), pairs(0)[0], strict=True):
        assert loaded.sharding == original.sharding and torch.equal(loaded.to_local(), original.to_local())
        if loaded.sharding.cuts:
            with pytest.raises(ShardwrightError, match="loaded from a file"):
                loaded.full_tensor()
