"""Capture: what comes out is the model, under its own names; what would change in silence is refused with its place."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwright.compiler.capture import CaptureError, capture, signature
from shardwright.compiler.fidelity import check_capture
from shardwright.compiler.torch_compat import FakeTensor
from shardwright.passes.normalize import normalize
from tests.zoo import MODELS

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:outputs that are not tensors")


class Small(nn.Module):
    """A linear layer and a buffer to build cases from; `body(self, x)` is the forward."""

    def __init__(self, body: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Buffer(torch.full((4,), 1.5), persistent=False)
        self.body = (body,)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, x)


def small(body: Any, **options: Any) -> Any:
    model = Small(body)
    x = torch.randn(3, 4)
    captured = capture(model, (x,), {}, **options)
    check_capture(captured, model, (x,), {}, options.get("loss_fn"))
    return captured


def keys(captured: Any) -> list[str]:
    return [n.meta["key"] for n in captured.graph.graph.nodes if n.op == "placeholder"]


def targets(captured: Any) -> list[str]:
    return [str(n.target) for n in captured.graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_captured_model_equals_eager(name: str) -> None:
    model, batch = MODELS[name]()
    double = name != "mixtral"  # its eager experts have no float64 kernel
    if double:
        model = model.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    captured = capture(model, (), batch)
    found = check_capture(captured, model, (), batch)
    assert captured.loss == "out.0"
    assert found.gradients < (1e-12 if double else 1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5", "gpt"])
def test_captured_dropout_draws_as_eager_does(name: str) -> None:
    model, batch = MODELS[name](dropout=0.2)
    check_capture(capture(model, (), batch), model, (), batch)


def test_evaluation_mode_is_captured_and_the_mode_restored() -> None:
    model, batch = MODELS["resnet"]()
    model.double()
    batch["pixel_values"] = batch["pixel_values"].double()
    captured = capture(model, (), batch, training=False)
    assert model.training and not captured.training
    assert all(k.startswith("out.") for k in captured.outputs)
    check_capture(captured, model, (), batch)
    assert any(k.startswith("buffer.") for k in capture(model, (), batch).outputs)


def test_the_model_is_left_as_it_was() -> None:
    model, batch = MODELS["gpt2"](dropout=0.1)
    model.transformer.ln_f.eval()
    before = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    capture(model, (), batch)
    assert model.training and not model.transformer.ln_f.training
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])


def test_names_are_the_models_own_and_tied_ones_are_aliases() -> None:
    model, batch = MODELS["t5"]()
    captured = capture(model, (), batch)
    named = {k.removeprefix("param.") for k in keys(captured) if k.startswith("param.")}
    assert named == {n for n, _ in model.named_parameters()}
    assert captured.aliases["shared.weight"] == ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    llama = capture(*_call("llama"))
    assert "buffer.model.rotary_emb.inv_freq" in keys(llama)


def _call(name: str) -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    model, batch = MODELS[name]()
    return model, (), batch


def test_nodes_know_their_source_module_and_gradient() -> None:
    captured = capture(*_call("llama"))
    node = next(n for n in captured.graph.graph.nodes if n.name.startswith("linear"))
    assert "modeling_llama.py:" in node.meta["source"] and "q_proj" in node.meta["source"]
    assert node.meta["module"] == "model.layers.0.self_attn.q_proj"
    assert node.meta["grad"]
    assert not any(n.meta["grad"] for n in captured.graph.graph.nodes if str(n.target).startswith("aten.le"))


def test_a_meta_model_is_captured_without_storage() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 15, 1 << 15), nn.Linear(1 << 15, 1 << 15))
    start = time.perf_counter()
    captured = capture(model, (torch.empty(8, 1 << 15, device="meta"),), {})
    assert time.perf_counter() - start < 20
    assert all(n.meta["val"].device.type == "cpu" for n in captured.graph.graph.nodes if n.op == "placeholder")
    assert all(p.is_meta for p in model.parameters())


def test_one_tensor_passed_twice_stays_two_inputs() -> None:
    model, batch = MODELS["llama"]()
    ids = batch["input_ids"]
    captured = capture(model, (), {"input_ids": ids, "labels": ids})
    assert {"input.input_ids", "input.labels"} <= set(keys(captured))
    used = {n.meta["key"] for n in captured.graph.graph.nodes if n.op == "placeholder" and n.users}
    assert {"input.input_ids", "input.labels"} <= used


@dataclass
class Batch:
    x: Tensor
    extra: list[Tensor | None]
    factor: float = 2.0


@dataclass
class Result:
    loss: Tensor | None
    parts: dict[str, Any]
    note: str = ""


Pair = namedtuple("Pair", "a b")


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, batch: Batch, *, pair: Pair, flag: bool = True, nothing: None = None) -> Result:
        y = self.linear(batch.x) * batch.factor + batch.extra[0] + pair.a
        return Result(y.sum() if flag else None, {"y": [y, None], "pair": Pair(y * 2, "text"), "lost": object()}, note="kept")


def test_nested_inputs_and_outputs() -> None:
    model = Nested()
    batch = Batch(torch.randn(3, 4), [torch.randn(3, 4), None])
    kwargs = {"pair": Pair(torch.randn(4), 1)}
    with pytest.warns(UserWarning, match=r"parts\.lost \(object\)"):
        captured = capture(model, (batch,), kwargs)
    assert captured.call.keys == ("input.0.x", "input.0.extra.0", "input.pair.a")
    tensors = captured.call.flatten((batch,), kwargs)
    assert tensors["input.0.x"] is batch.x
    result = captured.call.rebuild({"out.0": torch.tensor(1.0), "out.1": torch.ones(2), "out.2": torch.zeros(2)})
    assert isinstance(result, Result) and result.note == "kept" and result.loss == 1
    assert result.parts["y"][1] is None and isinstance(result.parts["pair"], Pair) and result.parts["pair"].b == "text"
    assert result.parts["lost"] is None
    check_capture(captured, model, (batch,), kwargs)


def test_the_signature_tells_calls_apart_that_need_different_graphs() -> None:
    x = torch.randn(3, 4)
    base = signature((x,), {"flag": True})
    assert base == signature((torch.zeros(3, 4),), {"flag": True}) and hash(base) == hash(signature((x,), {"flag": True}))
    others = [
        signature((x,), {"flag": 1}),
        signature((x,), {"flag": False}),
        signature((x[:2],), {"flag": True}),
        signature((x.double(),), {"flag": True}),
        signature((x.clone().requires_grad_(),), {"flag": True}),
        signature(([x],), {"flag": True}),
        signature((x, None), {"flag": True}),
    ]
    assert len({base, *others}) == 1 + len(others)
    captured = small(lambda self, x: self.linear(x))
    with pytest.raises(ValueError, match="another structure"):
        captured.call.flatten((x, 2), {})


def test_an_argument_that_cannot_be_compared_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"argument '1' is a .*object"):
        capture(Small(lambda self, x: x), (torch.randn(3, 4), object()), {})


def test_a_changed_constant_gives_another_graph() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return (x**n).sum()

    x = torch.randn(3)
    two, three = (capture(Power(), (x, n), {}) for n in (2, 3))
    assert two.call.signature != three.call.signature
    values = [g.graph(x)[0] for g in (two, three)]
    torch.testing.assert_close(values, [(x**2).sum(), (x**3).sum()])


def test_loss_fn_takes_the_target_keyword_or_the_last_argument() -> None:
    model = nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    for args, kwargs in [((x, y), {}), ((x,), {"target": y})]:
        captured = capture(model, args, kwargs, loss_fn=F.cross_entropy)
        assert captured.loss == "out.1" and captured.outputs == ("out.0", "out.1")
        check_capture(captured, model, args, kwargs, F.cross_entropy)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    check_capture(capture(model, (x, y), {}, loss_fn=weighted), model, (x, y), {}, weighted)
    with pytest.raises(CaptureError, match="no target"):
        capture(model, (), {"input": x}, loss_fn=F.cross_entropy)
    with pytest.raises(CaptureError, match="0-dim"):
        capture(model, (x, y), {}, loss_fn=lambda out, target: out)


def test_the_loss_is_found_in_the_output() -> None:
    assert small(lambda self, x: self.linear(x).sum()).loss == "out.0"
    assert small(lambda self, x: {"a": self.linear(x), "loss": self.linear(x).mean()}).loss == "out.1"
    assert small(lambda self, x: (x.sum(), self.linear(x), self.linear(x).mean())).loss == "out.2"
    assert small(lambda self, x: self.linear(x)).loss is None


def test_buffers_are_updated_as_outputs() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return (self.linear(x) * self.scale).sum()

    captured = small(body)
    assert "buffer.scale" in captured.outputs
    assert "buffer.scale" in keys(captured)


class Statistics(nn.Module):
    """`body(self, x, weight, bias, mean, var)` on something trained, with running statistics."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(4)
        self.body = (body,)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return self.body[0](self.first(x), norm.weight, norm.bias, norm.running_mean, norm.running_var).square().sum()


def _without_gradients(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    with torch.no_grad():
        torch.instance_norm(x, weight, bias, mean, var, True, 0.2, 1e-3, False)
        aten.native_batch_norm(x, weight, bias, mean, var, True, 0.2, 1e-3)
    return aten.native_batch_norm(x, weight, bias, mean, var, False, 0.2, 1e-3)[0]


WRITES: dict[str, Any] = {
    "batch_norm": lambda x, *given: torch.batch_norm(x, *given, True, 0.2, 1e-3, False),
    "native_batch_norm": lambda x, *given: aten.native_batch_norm(x, *given, True, 0.2, 1e-3)[0],
    "legit": lambda x, *given: aten._native_batch_norm_legit(x, *given, True, 0.2, 1e-3)[0],
    "with_update": lambda x, *given: aten._batch_norm_with_update(x, *given, 0.2, 1e-3)[0],
    "instance_norm": lambda x, *given: torch.instance_norm(x, *given, True, 0.2, 1e-3, False),
    "without gradients": _without_gradients,
}
READS: dict[str, Any] = {
    "native_batch_norm": lambda x, *given: aten.native_batch_norm(x, *given, False, 0.2, 1e-3)[0],
    "native_batch_norm of nothing": lambda x, *given: aten.native_batch_norm(x, None, None, None, None, True, 0.2, 1e-3)[0],
    "instance_norm": lambda x, *given: torch.instance_norm(x, *given, False, 0.2, 1e-3, False),
    "instance_norm of a computed mean": lambda x, *given: torch.instance_norm(x, *(t * 2 for t in given), True, 0.2, 1e-3, False),
}


@pytest.mark.parametrize("training", [False, True], ids=["reads", "writes"])
def test_running_statistics_of_ops_called_by_name(training: bool) -> None:
    """What they write is an output, to whatever op; check_capture compares it."""
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    for name, body in (WRITES if training else READS).items():
        model = Statistics(body).double()
        captured = capture(model, (x,), {})
        check_capture(captured, model, (x,), {})
        kept = {"buffer.norm.running_mean", "buffer.norm.running_var"} if training else set()
        assert {k for k in captured.outputs if k.startswith("buffer.")} == kept, name
        found = [n.target for n in normalize(captured.graph).graph.nodes]
        assert not [t for t in found if "batch_norm" in str(t) or "instance_norm" in str(t)], name


def test_writes_that_cannot_be_shown_are_refused() -> None:
    def body(x: Tensor, *given: Tensor) -> Tensor:
        return aten._batch_norm_impl_index(x, *given, True, 0.2, 1e-3, False)[0]

    with pytest.raises(CaptureError, match=r"writes to running statistics in secret.*\n.*test_capture\.py") as error:
        capture(Statistics(body), (torch.randn(3, 4, 6),), {})
    assert "torch.nn.functional.batch_norm" in str(error.value)


def test_gradients_are_cut_where_the_model_cuts_them() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.no_grad():
            z = y * self.linear.weight.sum()
            with torch.enable_grad():
                w = self.linear.weight * 3
        return (y * z + w.sum() + y.detach() * self.linear.bias + y.data).sum()

    small(body)  # check_capture compares the gradients


@pytest.mark.parametrize("made", [torch.rand, torch.randn, lambda n: torch.linspace(0, 1, n), torch.ones])
def test_a_float64_model_may_make_tensors_of_the_default_dtype(made: Any) -> None:
    """Which are float32: numbers drawn in float64 would be others."""
    model, x = Small(lambda self, x: (self.linear(x) * made(4)).square().sum()).double(), torch.randn(3, 4, dtype=torch.float64)
    check_capture(capture(model, (x,), {}), model, (x,), {})


def test_autocast_regions_leave_their_casts() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x).float().sum()

    captured = small(body)
    assert "aten._to_copy.default" in targets(captured)
    linear = next(n for n in captured.graph.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert linear.meta["val"].dtype is torch.bfloat16


def test_ambient_autocast_is_captured_on_cpu_and_refused_on_cuda() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(model, (x,), {})
        assert captured.call.signature == signature((x,), {})
    assert captured.call.signature != signature((x,), {})
    assert captured.graph(*[n.meta["val"] for n in captured.graph.graph.find_nodes(op="placeholder")])[0].dtype is torch.bfloat16
    if torch.cuda.is_available():
        with torch.autocast("cuda", dtype=torch.bfloat16), pytest.raises(CaptureError, match="autocast"):
            capture(model, (x,), {})


def test_lifted_constants_keep_their_values() -> None:
    captured = small(lambda self, x: (self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum())
    (value,) = captured.constants.values()
    assert value.tolist() == [1, 2, 3, 4]
    assert set(captured.constants) <= set(keys(captured))


def test_frozen_parameters_carry_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    captured = capture(model, (torch.randn(3, 4),), {})
    assert captured.trainable == {"1.weight", "1.bias"}
    first, second = [n for n in captured.graph.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert not first.meta["grad"] and second.meta["grad"]


def test_forward_hooks_are_traced() -> None:
    model = Small(lambda self, x: self.linear(x).sum())
    model.linear.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.linear.register_forward_hook(lambda module, args, output: torch.mul(output, 2))
    x = torch.randn(3, 4)
    check_capture(capture(model, (x,), {}), model, (x,), {})


def test_checkpointing_without_reentry_is_plain_ops() -> None:
    small(lambda self, x: checkpoint(lambda y: self.linear(y).relu(), x * self.scale, use_reentrant=False).sum())


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * -5


class Silent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


silent = Silent.apply
"""A name from before the capture."""


class Gate(torch.autograd.Function):
    """x * (y > 0), whose gradient reaches y as if the gate were y itself; the gradient of x is a third."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x * (y > 0) * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y = ctx.saved_tensors
        (grad,) = grads
        assert grad.shape == x.shape
        return torch.where(y > 0, grad, 0) / 3 if ctx.needs_input_grad[0] else None, ctx.factor * grad.clone() * x, None


class Clamped(torch.autograd.Function):
    """A square root with a bounded slope, in the style that has its context set up apart."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.abs().sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grads[0] / root.clamp(min=0.5)


class Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] + grads[0].mean()


class Mapped(Clamped):
    """A function that torch.vmap knows: within it, tensors do not tell that they carry a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.abs().sqrt()


KEPT = {
    "multiplied": lambda self, x: Backwards.apply(self.linear(x)).square().sum(),
    "nothing computed": lambda self, x: Silent.apply(self.linear(x)).square().sum(),
    "two operands": lambda self, x: Gate.apply(self.linear(x), self.scale * x, 0.7).square().sum(),
    "one without a gradient": lambda self, x: Gate.apply(x, self.linear(x), 0.7).square().sum(),
    "context apart": lambda self, x: Clamped.apply(self.linear(x)).sum(),
}


@pytest.mark.parametrize("case", sorted(KEPT))
def test_custom_functions_that_multiply_their_gradient_keep_it(case: str) -> None:
    torch.manual_seed(0)
    small(KEPT[case])
    assert not any("apply" in vars(f) for f in (Backwards, Silent, Gate, Clamped))


def _branch(self: Small, x: Tensor) -> Tensor:
    y = self.linear(x)
    if y.sum() > 0:  # the branch
        y = y * 2
    return y


def _hooked(self: Small, x: Tensor) -> Tensor:
    y = self.linear(x)
    y.register_hook(lambda g: g * 2)
    return y


def _in_place(self: Small, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.linear.weight.mul_(0.9)
    return self.linear(x)


def _data(self: Small, x: Tensor) -> Tensor:
    self.linear.weight.data = self.linear.weight.data * 2
    return self.linear(x)


def _hidden_write(self: Small, x: Tensor) -> Tensor:
    y = self.linear(x)
    with torch.no_grad():
        y.mul_(2)
    return y


def _data_write(self: Small, x: Tensor) -> Tensor:
    y = self.linear(x)
    y.data.mul_(2)
    return y


REFUSED = {
    "custom function": (lambda self, x: Mixed.apply(self.linear(x)), "Mixed", "Mixed.apply(self.linear(x))"),
    "custom function by another name": (lambda self, x: silent(self.linear(x)), "Silent", "silent(self.linear(x))"),
    "tensor hook": (_hooked, "register_hook", "y.register_hook(lambda g: g * 2)"),
    "reentrant checkpoint": (
        lambda self, x: checkpoint(self.linear, x * self.scale, use_reentrant=True),
        "reentrant",
        "use_reentrant=True",
    ),
    "branch": (_branch, "depends on the values", "if y.sum() > 0:"),
    "item": (lambda self, x: self.linear(x) * x.sum().item(), "depends on the values", "x.sum().item()"),
    "boolean index": (lambda self, x: self.linear(x)[x > 0], "depends on the values", "[x > 0]"),
    "parameter in place": (_in_place, "parameter in place", "self.linear.weight.mul_(0.9)"),
    "parameter data": (_data, "parameter in place", "self.linear.weight.data ="),
    "write under no_grad": (_hidden_write, "behind autograd's back", "y.mul_(2)"),
    "write to data": (_data_write, "behind autograd's back", "y.data.mul_(2)"),
    "gradient in forward": (
        lambda self, x: torch.autograd.grad(self.linear(x).sum(), self.linear.weight)[0],
        "gradients itself",
        "autograd.grad",
    ),
    "input in place": (lambda self, x: self.linear(x.mul_(2)), "an input in place", "x.mul_(2)"),
    "custom function in a transform": (
        lambda self, x: torch.vmap(lambda y: Mapped.apply(self.linear(y)))(x),
        "Mapped is called within torch.vmap",
        "Mapped.apply(self.linear(y))",
    ),
    "truncated normal": (
        lambda self, x: self.linear(x) + nn.init.trunc_normal_(torch.empty(3, 4)),
        "truncated normal",
        "trunc_normal_",
    ),
    "integers in place": (lambda self, x: self.linear(x) + torch.empty(3, 4).random_(1, 3), "random_", "random_(1, 3)"),
    "other error": (lambda self, x: self.linear(x[:, :2]), "could not be traced", "x[:, :2]"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_captured_is_refused_with_its_line(case: str) -> None:
    body, cause, line = REFUSED[case]
    model = Small(body)
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(3, 4),), {})
    error = caught.value
    assert cause in error.cause, str(error)
    assert error.source is not None and "test_capture.py:" in error.source and line in error.source, str(error)
    assert error.way_out
    assert not any(isinstance(p, FakeTensor) for p in model.parameters())


def test_hooks_and_compilation_are_refused_by_name() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="module '0' has a backward hook"):
        capture(model, (x,), {})
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.register_hook(lambda g: g)
    with pytest.raises(CaptureError, match=r"parameter '0.weight' has a gradient hook"):
        capture(model, (x,), {})
    with pytest.raises(CaptureError, match="compiled by torch.compile"):
        capture(torch.compile(nn.Linear(4, 4)), (x,), {})
    inner = nn.Sequential(nn.Linear(4, 4))
    inner[0].compile()
    with pytest.raises(CaptureError, match="module '0' is already compiled"):
        capture(inner, (x,), {})


def test_attributes_set_in_the_forward_are_put_back_with_a_warning() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last.sum()

    model = Small(body)
    with pytest.warns(UserWarning, match="last"):
        capture(model, (torch.randn(3, 4),), {})
    assert not hasattr(model, "last")


def test_hooks_and_lists_that_the_forward_fills_are_put_back() -> None:
    """Hooks that a model registers in its first call would act twice in its second capture, and a list would keep fake tensors."""

    def body(self: Small, x: Tensor) -> Tensor:
        if not hasattr(self, "hooked"):
            self.hooked = True
            self.linear.register_forward_hook(lambda module, args, output: output * 2)
        self.seen.append(x)
        return self.linear(x).sum()

    model, x = Small(body), torch.randn(3, 4)
    model.seen = []
    captured = [capture(model, (x,), {}) for _ in range(2)]
    assert not model.seen and not model.linear._forward_hooks
    assert len(captured[0].graph.graph.nodes) == len(captured[1].graph.graph.nodes)


def test_what_a_model_asserts_of_data_is_left_out() -> None:
    def body(self: Small, x: Tensor) -> Tensor:
        torch._check_tensor_all(x.abs().sum() < 100)
        return self.linear(x).sum()

    model, x = Small(body), torch.randn(3, 4)
    captured = capture(model, (x,), {})
    check_capture(captured, model, (x,), {})
    assert not [n for n in captured.graph.graph.nodes if n.op == "call_function" and not isinstance(n.meta["val"], Tensor)]


def test_check_capture_finds_a_wrong_gradient() -> None:
    model = Small(lambda self, x: (self.linear(x) ** 2).sum())
    x = torch.randn(3, 4)
    captured = capture(model, (x,), {})
    graph = torch.fx.GraphModule(nn.Module(), captured.graph.graph.__deepcopy__({}))
    power = next(n for n in graph.graph.nodes if "pow" in str(n.target))
    with graph.graph.inserting_before(power):
        power.args = (graph.graph.call_function(torch.ops.aten.detach.default, (power.args[0],)), 2)
    graph.recompile()
    with pytest.raises(CaptureError, match=r"grad\.linear"):
        check_capture(dataclasses.replace(captured, graph=graph), model, (x,), {})


def test_only_one_warning_names_what_is_lost() -> None:
    model, batch = MODELS["llama"]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture(model, (), batch)
    messages = [str(w.message) for w in caught if "come back as None" in str(w.message)]
    assert len(messages) == 1 and "past_key_values (DynamicCache)" in messages[0]
