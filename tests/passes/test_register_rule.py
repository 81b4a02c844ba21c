"""A user's own op: replicated, with a warning, until it is given a rule, which is checked as ours are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lockstep_module import assert_same, on_ranks, wholes
from torch import Tensor, nn

import shardwright
from shardwright import Strategy, Topology
from shardwright.compiler.units import seconds_text
from shardwright.compiler.verify import VerificationError
from shardwright.passes.rules import notation
from shardwright.passes.rules.base import RULES
from shardwright.runtime.module import ParallelModule


@torch.library.custom_op("shardwright_tests::scale_rows", mutates_args=())
def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """x [r, c] times scale [r]."""
    return x * scale[:, None]


@scale_rows.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, scale = ctx.saved_tensors
    return grad * scale[:, None], (grad * x).sum(1)


scale_rows.register_autograd(_gradients, setup_context=_save)
OP = torch.ops.shardwright_tests.scale_rows


def example() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)


@pytest.fixture(autouse=True)
def without_the_rule() -> Iterator[None]:
    yield
    RULES.pop(OP.default, None)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(OP(self.first(x).tanh(), x.sum(1))).square().mean()


class Weighted(nn.Module):
    """The op on parameters alone, as normalizations of weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, OP(self.weight, self.scale)).square().mean()


def train(strategy: Strategy, make: type[nn.Module] = Model) -> int:
    """Train on every rank as on one. How many ranks' graphs call the op on less than the whole batch."""
    torch.manual_seed(0)
    plain, x = make().double(), torch.randn(4, 6, dtype=torch.float64)
    model = copy.deepcopy(plain)
    plain(x).backward()

    def body(parallel: ParallelModule, rank: int) -> tuple[dict[str, Tensor], int]:
        parallel.train_step(x)
        (node,) = [n for n in parallel.program.graphs["forward"].graph.graph.nodes if n.target is OP.default]
        return wholes(parallel, "grad"), int(node.meta["val"].numel() < 4 * 8)

    results = on_ranks(model, strategy, body, example=(x,), batch="global")
    assert_same([grads for grads, _ in results], {k: p.grad for k, p in plain.named_parameters() if p.grad is not None})
    return sum(sharded for _, sharded in results)


STRATEGIES = [Strategy(dp=4, zero=1), Strategy(dp=2, tp=2)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_without_a_rule_it_is_replicated_with_a_warning(strategy: Strategy) -> None:
    assert shardwright.check_rule(OP, *example()) == 0
    with pytest.warns(UserWarning, match=r"without a sharding rule.*scale_rows.*test_register_rule\.py.*register_rule"):
        assert train(strategy) == 0


@pytest.mark.filterwarnings("ignore:ops without a sharding rule")
def test_the_plan_says_what_it_takes() -> None:
    """Forward and backward of all rows on each rank: both read x and scale, or a gradient as large, and write as much."""
    topology = Topology.preset("h100", devices=2)
    model = Model().to("meta")
    found = shardwright.plan(model, topology, example_inputs=(torch.empty(4096, 6, device="meta"),), strategy=Strategy(dp=2))
    device, rows, width = topology.device, 2 * 4096, 8
    once = 4 * rows * (2 * width + 1) / (device.bandwidth * device.memory_efficiency) + device.launch
    assert f"1 x {OP.default} run replicated for want of a rule: {seconds_text(2 * once)} of the step." in found.plan.reasons
    assert "run replicated" in found.explain()


@pytest.mark.parametrize("strategy", [*STRATEGIES, Strategy(dp=4, zero=3)], ids=str)
@pytest.mark.filterwarnings("ignore:ops without a sharding rule")
def test_parameters_go_through_an_op_without_a_rule(strategy: Strategy) -> None:
    train(strategy, Weighted)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.filterwarnings("error:ops without a sharding rule")
def test_with_a_rule_it_is_sharded(strategy: Strategy) -> None:
    shardwright.register_rule(OP, "r c, r -> r c")
    assert shardwright.check_rule(OP, *example()) > 8
    assert train(strategy) == 4


@pytest.mark.parametrize("example", [None, (torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64))])
@pytest.mark.parametrize("text", ["r c, c -> r c", "r c, k -> r c"])
def test_a_wrong_rule_is_found_when_it_is_given(text: str, example: tuple[Tensor, Tensor] | None) -> None:
    with pytest.raises((VerificationError, RuntimeError)) as error:
        shardwright.register_rule(OP, text, example)
    assert any("under strategy" in note for note in error.value.__notes__)
    assert OP.default not in RULES


def test_an_example_that_the_op_does_not_take_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        shardwright.register_rule(OP, "r c, r -> r c", (torch.randn(4, 5), torch.randn(3)))
    assert OP.default not in RULES


@torch.library.custom_op("shardwright_tests::power_rows", mutates_args=())
def power_rows(x: Tensor, exponent: float) -> Tensor:
    return x**exponent


def test_a_rule_that_nothing_is_known_to_run_with_is_not_proven_until_there_is_an_example() -> None:
    op = torch.ops.shardwright_tests.power_rows
    try:
        with pytest.warns(UserWarning, match=r"power_rows.* is used but not proven.*it takes more than tensors.*example="):
            shardwright.register_rule(op, "r c -> r c")
        assert RULES.pop(op.default)
        shardwright.register_rule(op, "r c -> r c", example=(torch.randn(4, 5, dtype=torch.float64), 2.0))
    finally:
        RULES.pop(op.default, None)


@pytest.mark.parametrize(("text", "message"), [("r c, r", "reads 'dims of operands"), ("r c -> r c -> r", "reads 'dims")])
def test_text_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shardwright.register_rule(OP, text)


def test_a_rule_that_does_not_fit_the_call_is_named() -> None:
    notation.register_rule(OP.default, "r c d, r -> r c d")
    with pytest.raises(ValueError, match=r"'r c d, r -> r c d' of .*scale_rows.* does not fit a call with \[7, 5\], \[7\]"):
        shardwright.check_rule(OP, *example())


def test_an_op_has_one_rule() -> None:
    with pytest.raises(ValueError, match="has a sharding rule already"):
        shardwright.register_rule(torch.ops.aten.mm, "m k, k n -> m n")


@torch.library.custom_op("shardwright_tests::halves", mutates_args=())
def halves(x: Tensor) -> Tensor:
    """Half of x, without a derivative."""
    return x / 2


@halves.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_without_a_derivative_is_checked_forward() -> None:
    op = torch.ops.shardwright_tests.halves
    try:
        shardwright.register_rule(op, "r c -> r c")
        assert shardwright.check_rule(op, example()[0]) > 4
    finally:
        RULES.pop(op.default, None)


@torch.library.custom_op("shardwright_tests::ramp", mutates_args=())
def ramp(size: int) -> Tensor:
    """0, 1, ... size - 1 over size."""
    return torch.arange(size) / size


@ramp.register_fake
def _(size: int) -> Tensor:
    return torch.empty(size)


def test_an_op_without_operands_is_warned_of_too() -> None:
    class Ramped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) * torch.ops.shardwright_tests.ramp(8)).square().mean()

    topology = shardwright.Topology.preset("cpu", devices=2)
    with pytest.warns(UserWarning, match=r"without a sharding rule.*ramp"):
        shardwright.plan(Ramped(), topology, example_inputs=(torch.randn(4, 6),), strategy=Strategy(dp=2))
