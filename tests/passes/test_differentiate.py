"""The joint graph: gradients of every kind of use are right, and each distinct op is differentiated once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import compare, emit_all, prepare, problem_of, run
from programs import case, plan, program, shares
from torch import Tensor, nn

from shardwright.compiler.emit import emit
from shardwright.compiler.layout import with_layout
from shardwright.compiler.memory import temporary_bytes
from shardwright.passes.differentiate import Templates
from shardwright.passes.graph_tools import Values


class Uses(nn.Module):
    """Two weights and a function of them: `forward` is what a test is about."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.a, self.b)


def several_uses(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = x @ a
    return (h * h + h @ a + torch.relu(h) * b).pow(2).sum()


def one_result_of_several(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first, _, third = (x @ a).split([1, 2, 3], dim=-1)
    values, _ = (x @ a).topk(2, dim=-1)
    return first.sum() + (third * b[:3]).pow(2).sum() + values.tanh().sum()


def strided_views(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = (x @ a.t()).view(4, 2, 3).transpose(0, 1)
    wide = b.expand(2, 4, 6).permute(2, 0, 1)[::2]
    return (h.reshape(2, 12).sin().sum() + (h * wide.permute(1, 2, 0)).square().sum()) * a[1:3, ::2].sum()


def cotangent_of_another_layout(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = F.layer_norm(x @ a, (6,), b)
    return (h.t() @ h).exp().mean() + h.sum(0).expand(5, 6).prod(0).sum()


def unused_branch(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.relu(x @ a).sum()
    return (x * b).sum() + (x @ a).detach().sum() * b.sum() + a.sum() * 0.5


def complex_numbers(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    waves = torch.fft.rfft(x @ a, dim=-1) * torch.polar(b[:4], b[2:])
    return torch.fft.fft2(x @ a).real.pow(2).sum() + torch.fft.irfft(waves * waves.conj(), dim=-1).tanh().sum()


def gradient_in_other_strides_than_its_fake(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = (x @ a).view(2, 2, 6, 1).transpose(1, 3).reshape(2, 6, 2)
    return (h.detach() * F.layer_norm(h, (2,), b[:2])).sum()


def group_norm_of_other_strides_than_its_fake(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = (x @ a).view(1, 4, 6).transpose(1, 2).reshape(1, 6, 2, 2)
    return (F.group_norm(h + h.flip(1), 2, b) * h).exp().sum()


FUNCTIONS = [
    several_uses,
    one_result_of_several,
    strided_views,
    cotangent_of_another_layout,
    unused_branch,
    complex_numbers,
    gradient_in_other_strides_than_its_fake,
    group_norm_of_other_strides_than_its_fake,
]


@pytest.mark.parametrize("axes", [{}, {"dp_shard": 2}, {"tp": 2}], ids=["one", "dp2", "tp2"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_gradients(function: Callable[..., Tensor], axes: dict[str, int]) -> None:
    torch.manual_seed(0)
    found = prepare(Uses(function), {"x": torch.randn(4, 6)})
    wanted = plan(**axes)
    made = emit_all(found, wanted, shares(found, wanted))
    compare(found, made, run(found, made))


def test_gradients_of_one_value_do_not_wait_for_each_other() -> None:
    """However many read a value, its gradient lies in one memory, and beside it what is added to that."""

    class Reads(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.first = nn.Linear(8, 64, bias=False)
            self.heads = nn.ModuleList(nn.Linear(64, 2, bias=False) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return sum(head(h).exp().sum() for head in self.heads)  # type: ignore[return-value]

    few, many = (
        temporary_bytes(program(prepare(Reads(n), {"x": torch.randn(16, 8)}), plan()).graphs["backward"].graph) for n in (3, 9)
    )
    value = 16 * 64 * 4
    assert few < 3 * value and many < few + value, "each of them waits to be added"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_identical_blocks_are_differentiated_once(model: str) -> None:
    traced = []
    for layers in (2, 4):
        found, wanted = case(model, layers=layers), plan(tp=2)
        problem, templates = problem_of(found, shares(found, wanted)), Templates(Values())
        emit(problem, with_layout(problem, wanted), 0, templates)
        traced.append(templates.traced)
    assert traced[0] == traced[1]


def test_frozen_parameters_get_no_gradient() -> None:
    model, batch = zoo.mlp()
    model.get_submodule("layers.1").requires_grad_(False)
    found = prepare(model, batch)
    (made,) = emit_all(found, plan(), [found.batch])
    backward = made.graphs["backward"]
    assert set(backward.outputs) == {f"grad.param.layers.{k}.{n}" for k in (0, 2) for n in ("weight", "bias")}
    assert {s.name for s in made.parameters if not s.trainable} == {"layers.1.weight", "layers.1.bias"}
    compare(found, [made], run(found, [made]))


def test_what_precedes_frozen_parameters_only_is_not_differentiated() -> None:
    model, batch = zoo.mlp()
    model.get_submodule("layers.0").requires_grad_(False)
    model.get_submodule("layers.1").requires_grad_(False)
    backward = program(prepare(model, batch), plan()).graphs["backward"]
    targets = [str(n.target) for n in backward.graph.graph.nodes if n.op == "call_function"]
    assert set(backward.outputs) == {"grad.param.layers.2.weight", "grad.param.layers.2.bias"}
    assert not any("tanh" in t for t in targets) and sum("mm" in t for t in targets) == 1


def test_nodes_know_where_they_come_from() -> None:
    """Every backward node has the source line and the block of the forward node it is the gradient of."""
    found, wanted = case("llama", layers=2), plan(tp=2)
    made = program(found, wanted)
    lines = {n.meta.get("source") for n in problem_of(found, shares(found, wanted)).graph.graph.nodes}
    blocks = set()
    for node in made.graphs["backward"].graph.graph.nodes:
        if node.op == "call_function":
            assert node.meta.get("source") in lines, node
            blocks.add(node.meta.get("block"))
    assert blocks >= {0, 1}


@pytest.mark.parametrize("strategy", [{"tp": 2}, {"dp_shard": 2, "zero": 3}], ids=str)
def test_outputs_and_gradients_are_typed(strategy: dict[str, int]) -> None:
    axis = next(iter(strategy))
    for spec in program(case("llama", layers=2), plan(**strategy)).graphs.values():
        output = next(n for n in spec.graph.graph.nodes if n.op == "output")
        for key, node in zip(spec.outputs, output.args[0], strict=True):
            assert key.startswith("saved.") or axis in node.meta["types"], key


def test_no_type_is_shown_beside_what_is_within_an_op() -> None:
    """`t` of a linear's weight is not the linear's result, and has not its type."""
    forward = program(case("mlp"), plan(tp=2)).graphs["forward"]
    transposes = [n for n in forward.graph.graph.nodes if "aten.t." in str(n.target)]
    assert transposes and not any(n.meta["types"] for n in transposes)
