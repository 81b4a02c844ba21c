"""Control flow as ops: unrolled where it is static, as eager computes it and on many devices as on one; refused where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, compare, emit_all, mesh, prepare, run
from torch import Tensor, fx, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_op
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from shardwright.compiler import control_flow
from shardwright.compiler.capture import Captured, CaptureError, capture
from shardwright.compiler.fidelity import check_capture
from shardwright.compiler.plan import Plan
from shardwright.passes.types import balanced_sizes

Body = Callable[["Cell", Tensor], Tensor]


class Cell(nn.Module):
    """A linear layer to build cases from; `body(self, x)` is the forward, of `x` [time, batch, 4]."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.body = (body,)

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](self, x)

    def step(self, carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(carry + self.linear(x))
        return state, state * x

    def start(self, x: Tensor) -> Tensor:
        """With a gradient: from a start without one, the eager scan of torch 2.11 gives wrong gradients."""
        return self.linear(x[0])


def example() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 3, 4, dtype=torch.float64)


def captured(body: Body) -> Captured:
    return capture(Cell(body).double(), (example(),), {})


def loop(step: Any, carry: Any, xs: Any, reverse: bool = False) -> tuple[Any, Tensor]:
    """What `scan` computes, of one tensor a step."""
    outputs = []
    for x in reversed(xs) if reverse else xs:
        carry, y = step(carry, x)
        outputs.append(y)
    return carry, torch.stack(outputs[::-1] if reverse else outputs)


def _trees(self: Cell, x: Tensor) -> Tensor:
    def step(carry: Any, slices: Any) -> Any:
        state, (total,) = carry
        state = torch.tanh(self.linear(state) + slices["a"])
        return (state, (total + state.sum(-1),)), {"y": state * slices["b"], "parts": [state.mean(-1)]}

    start = (self.start(x), (self.start(x).sum(-1),))
    (state, (total,)), outputs = scan(step, start, {"a": x, "b": self.linear(x)})
    return (state.sum(-1) * total).sum() + outputs["y"].square().sum() + outputs["parts"][0].sin().sum()


def _without_gradient(self: Cell, x: Tensor) -> Tensor:
    with torch.no_grad():
        seen = scan(self.step, self.start(x), x)[1]
    return (seen * self.linear(x)).sum()


EAGER: dict[str, Body] = {
    "scan": lambda self, x: scan(self.step, self.start(x), x)[1].square().sum(),
    "scan backwards over dim 1": lambda self, x: scan(self.step, self.linear(x[:, 0]), x, dim=1, reverse=True)[1].square().sum(),
    "scan of trees": _trees,
    "scan without a gradient": _without_gradient,
    "map": lambda self, x: map_op(lambda y, z: {"a": self.linear(y) * z}, x, x.new_ones(4))["a"].square().sum(),
    "associative scan": lambda self, x: (
        associative_scan(lambda a, b: a * b, self.linear(x), 0, combine_mode="generic").square().sum()
    ),
    "loop": lambda self, x: torch.while_loop(
        lambda i, y: i < 3, lambda i, y: (i + 1, self.linear(y)), (torch.tensor(0), self.linear(x))
    )[1].sum(),
    "branch": lambda self, x: torch.cond(x.shape[0] > 4, self.linear, lambda y: self.linear(y) * 2, (x,)).sum(),
}


@pytest.mark.parametrize("case", sorted(EAGER))
def test_captured_equals_eager(case: str) -> None:
    model, x = Cell(EAGER[case]).double(), example()
    check_capture(capture(model, (x,), {}), model, (x,), {})


def _nested(self: Cell, x: Tensor) -> Tensor:
    def step(carry: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        carry, inner = scan(self.step, carry, torch.stack([y, y * 2]))
        return carry, inner.sum(0)

    return scan(step, self.start(x), x)[1].sum()


def _nested_loops(self: Cell, x: Tensor) -> Tensor:
    def step(carry: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        carry, inner = loop(self.step, carry, torch.stack([y, y * 2]))
        return carry, inner.sum(0)

    return loop(step, self.start(x), x)[1].sum()


@torch.compiler.nested_compile_region
def _region(self: Cell, x: Tensor) -> Any:
    return self.linear(x)


WRITTEN_OUT: dict[str, tuple[Body, Body]] = {
    "scan in a scan": (_nested, _nested_loops),
    "scan in a checkpoint": (
        lambda self, x: checkpoint(lambda y: scan(self.step, self.start(y), y)[1], x * 2, use_reentrant=False).sum(),
        lambda self, x: loop(self.step, self.start(x * 2), x * 2)[1].sum(),
    ),
    "checkpoint in a scan": (
        lambda self, x: scan(lambda c, y: checkpoint(self.step, c, y, use_reentrant=False), self.start(x), x)[1].sum(),
        lambda self, x: loop(self.step, self.start(x), x)[1].sum(),
    ),
    "dropout in a scan": (
        lambda self, x: scan(lambda c, y: (F.dropout(self.step(c, y)[0], 0.5), c * y), self.start(x), x)[1].sum(),
        lambda self, x: loop(lambda c, y: (F.dropout(self.step(c, y)[0], 0.5), c * y), self.start(x), x)[1].sum(),
    ),
    "map in a scan": (
        lambda self, x: scan(lambda c, y: self.step(c, map_op(lambda z: z * 2, y)), self.start(x), x)[1].sum(),
        lambda self, x: loop(lambda c, y: self.step(c, y * 2), self.start(x), x)[1].sum(),
    ),
    "loop of numbers": (
        lambda self, x: torch.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.linear(y)), (0, x))[1].sum(),
        lambda self, x: self.linear(self.linear(self.linear(x))).sum(),
    ),
    "loop of no steps": (
        lambda self, x: torch.while_loop(lambda i, y: i < 0, lambda i, y: (i + 1, y * 2), (0, self.linear(x)))[1].sum(),
        lambda self, x: self.linear(x).sum(),
    ),
    "branch by a constant": (
        lambda self, x: torch.cond(torch.tensor(True), self.linear, lambda y: y * 2, (x,)).sum(),
        lambda self, x: self.linear(x).sum(),
    ),
    "compile region": (
        lambda self, x: _region(self, x).sum(),
        lambda self, x: self.linear(x).sum(),
    ),
    "custom function in a body": (
        lambda self, x: scan(lambda c, y: self.step(Fifth.apply(c), y), self.start(x), x)[1].sum(),
        lambda self, x: loop(lambda c, y: self.step(Fifth.apply(c), y), self.start(x), x)[1].sum(),
    ),
}


class Fifth(torch.autograd.Function):
    """Its own argument, with a fifth of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 5


class Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] + grads[0].mean()


@pytest.mark.parametrize("case", sorted(WRITTEN_OUT))
def test_captured_equals_what_it_stands_for(case: str) -> None:
    body, written_out = WRITTEN_OUT[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = captured(body)
    check_capture(found, Cell(written_out).double(), (example(),), {})


def test_an_exported_model_is_captured() -> None:
    """Its bodies are graphs, which give and take flat tuples."""

    def forward(self: Cell, x: Tensor) -> Tensor:
        (state, count), y = scan(lambda c, z: ((self.step(c[0], z)[0], c[1] + 1), z * 2), (self.start(x), x.new_zeros(2)), x)
        return (state * y).sum() + count.sum() + map_op(lambda z: self.linear(z) * 2, x).sum()

    x = example()
    model = torch.export.export(Cell(forward).double(), (x,)).module()
    found = capture(model, (x,), {})
    assert not [n for n in found.graph.graph.nodes if n.op == "get_attr"]
    check_capture(found, model, (x,), {})


def _pointwise(self: Cell, x: Tensor) -> Tensor:
    """Pairs of a decay and a value."""

    def combine(left: Any, right: Any) -> Any:
        return {"a": left["a"] * right["a"], "b": left["b"] * right["a"] + right["b"]}

    def scanned(y: Tensor) -> Tensor:
        return associative_scan(combine, {"a": torch.sigmoid(y), "b": self.linear(y)}, 0)["b"]

    return scanned(x).square().sum() + scanned(x[:1]).sum()


def test_a_pointwise_associative_scan_is_captured_where_torch_has_it_on_the_cpu() -> None:
    model, x = Cell(_pointwise).double(), example()
    try:
        found = capture(model, (x,), {})
    except CaptureError as error:
        assert "combine_mode='pointwise', which torch before 2.14 has on GPUs alone" in error.cause
        assert error.source is not None and "associative_scan(combine" in error.source and "'generic'" in error.way_out
    else:
        check_capture(found, model, (x,), {})


def test_an_associative_scan_as_a_graph_is_captured() -> None:
    """As torch traces it on a GPU: called on slices."""
    graph = fx.symbolic_trace(lambda a, b, c: (a + b + c,))

    def written_out(self: Cell, x: Tensor) -> Tensor:
        return loop(lambda c, y: (c + y + 0.5,) * 2, x.new_full((3, 4), -0.5), self.linear(x))[1].square().sum()

    found = captured(
        lambda self, x: torch.ops.higher_order.associative_scan(graph, [self.linear(x)], (x.new_full((4,), 0.5),))[0].square().sum()
    )
    check_capture(found, Cell(written_out).double(), (example(),), {})


@pytest.mark.skipif(not hasattr(torch._higher_order_ops, "switch"), reason="torch before 2.14 has no switch")
def test_a_switch_is_followed_by_a_number_and_refused_by_data() -> None:
    def body(self: Cell, x: Tensor, index: Any) -> Tensor:
        return torch._higher_order_ops.switch(index, (self.linear, lambda y: self.linear(y) * 2), (x,)).sum()

    for index in (1, 7):
        check_capture(
            captured(lambda self, x, i=index: body(self, x, i)),
            Cell(lambda self, x: 2 * self.linear(x).sum()).double(),
            (example(),),
            {},
        )
    with pytest.raises(CaptureError, match="switch takes the branch"):
        captured(lambda self, x: body(self, x, (x.sum() > 0).long()))


def test_nodes_know_the_line_of_their_body() -> None:
    found = captured(lambda self, x: scan(self.step, self.start(x), x)[1].sum())
    first, *steps = [n for n in found.graph.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert "self.linear(x[0])" in first.meta["source"] and len(steps) == 5
    assert all("torch.tanh(carry + self.linear(x))" in n.meta["source"] and n.meta["module"] == "linear" for n in steps)
    (stacked,) = [n for n in found.graph.graph.nodes if n.target is torch.ops.aten.stack.default]
    assert "scan(self.step" in stacked.meta["source"]


def test_a_long_unroll_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_flow, "LONG", 14)
    with pytest.warns(UserWarning, match=r"scan is unrolled.*15 or more.*test_control_flow.py"):
        captured(_nested)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured(EAGER["scan"])


def test_eager_scans_are_torchs_own_again() -> None:
    captured(EAGER["scan"])
    x = example()
    assert scan(lambda c, y: (c + y, c * y), torch.zeros_like(x[0]), x)[0].grad_fn is None
    torch.testing.assert_close(torch.compile(lambda y: map_op(lambda z: z * 2, y), backend="eager")(x), x * 2)


def _hooked(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    carry = carry + x
    carry.register_hook(lambda g: g * 2)
    return carry, carry * x


REFUSED: dict[str, tuple[Body, str, str, str]] = {
    "branch on data": (
        lambda self, x: torch.cond(x.sum() > 0, self.linear, lambda y: self.linear(y) * 2, (x,)),
        "torch.cond takes the branch that the values of a tensor say",
        "torch.cond(",
        "torch.where",
    ),
    "loop on data": (
        lambda self, x: torch.while_loop(lambda i, y: y.sum() < 3, lambda i, y: (i + 1, self.linear(y)), (0, x))[1],
        "torch.while_loop takes as many steps as the values of tensors say",
        "torch.while_loop(",
        "fixed number of steps",
    ),
    "branch in a scan": (
        lambda self, x: scan(lambda c, y: (torch.cond(c.sum() > 0, torch.sin, torch.cos, (c,)), c * y), x[0], self.linear(x))[1],
        "torch.cond takes the branch",
        "torch.cond(",
        "torch.where",
    ),
    "other carry": (
        lambda self, x: scan(lambda c, y: ((c + y)[:1], c * y), self.start(x), self.linear(x))[1],
        "given a carry of torch.float64 [3, 4] and returns one of torch.float64 [1, 4]",
        "scan(lambda",
        "like the one given",
    ),
    "other structure": (
        lambda self, x: scan(lambda c, y: (c[0] + y, c[1] * y), (self.start(x), self.start(x)), self.linear(x))[1],
        "carry of torch.float64 [3, 4], torch.float64 [3, 4] and returns one of torch.float64 [3, 4]",
        "scan(lambda",
        "like the one given",
    ),
    "number from a body": (
        lambda self, x: map_op(lambda y: (self.linear(y), 2.0), x)[0],
        "the body of map returns a float",
        "map_op(",
        "return tensors",
    ),
    "custom function in a scan": (
        lambda self, x: scan(lambda c, y: self.step(Mixed.apply(c), y), self.start(x), x)[1],
        "custom autograd function Mixed",
        "Mixed.apply(c)",
        "ordinary differentiable operations",
    ),
    "custom function in a map": (
        lambda self, x: map_op(lambda y: Mixed.apply(self.linear(y)), x),
        "custom autograd function Mixed",
        "Mixed.apply(self.linear(y))",
        "ordinary differentiable operations",
    ),
    "custom function in an associative scan": (
        lambda self, x: associative_scan(lambda a, b: Fifth.apply(a) + b, self.linear(x), 0, combine_mode="generic"),
        "Fifth is called within torch.vmap",
        "Fifth.apply(a)",
        "ordinary differentiable operations",
    ),
    "hook in a scan": (
        lambda self, x: scan(_hooked, self.start(x), self.linear(x))[1],
        "register_hook",
        "carry.register_hook(lambda g: g * 2)",
        "into the forward",
    ),
    "reentrant checkpoint in a scan": (
        lambda self, x: scan(lambda c, y: (checkpoint(self.linear, c + y, use_reentrant=True), c * y), x[0], self.linear(x))[1],
        "reentrant activation checkpointing",
        "use_reentrant=True",
        "use_reentrant=False",
    ),
    "another op with a body": (
        lambda self, x: torch.ops.higher_order.foreach_map(fx.symbolic_trace(lambda y: (y.sin(),)), self.linear(x))[0],
        "higher-order op foreach_map",
        "foreach_map(",
        "ordinary operations",
    ),
    "attention on GPUs": (
        lambda self, x: flex_attention(*[self.linear(x)[None]] * 3),
        "flex_attention, whose backward torch has on GPUs alone",
        "flex_attention(",
        "scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_is_told_with_its_line_and_the_way_out(case: str) -> None:
    body, cause, line, way_out = REFUSED[case]
    with pytest.raises(CaptureError) as caught:
        captured(lambda self, x: body(self, x).sum())
    error = caught.value
    assert cause in error.cause, str(error)
    assert error.source is not None and "test_control_flow.py:" in error.source and line in error.source, str(error)
    assert way_out in error.way_out


class Recurrent(nn.Module):
    """Two recurrent layers over time with gates, and a head that is mapped over tokens; samples are dim 0."""

    def __init__(self, width: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.inputs = nn.ModuleList(nn.Linear(width, 2 * inner) for _ in range(2))
        self.hidden = nn.ModuleList(nn.Linear(inner, inner) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(inner, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)

    def layer(self, k: int, x: Tensor) -> Tensor:
        def step(state: Tensor, slices: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            gate, value = slices
            state = torch.sigmoid(gate) * torch.tanh(self.hidden[k](state)) + value
            return state, self.outputs[k](state)

        gate, value = self.inputs[k](x).transpose(0, 1).chunk(2, dim=-1)
        return x + scan(step, torch.zeros_like(value[0]), (gate, value), reverse=bool(k))[1].transpose(0, 1)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for k in range(2):
            x = self.layer(k, x)
        logits = map_op(lambda token: self.head(self.norm(token)), x.transpose(0, 1))
        return F.cross_entropy(logits.flatten(0, 1), labels.t().flatten())


class PerSample(nn.Module):
    """A map over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found = map_op(lambda sample, scale: self.second(torch.tanh(self.first(sample)) * scale), x, x.new_full((8,), 0.5))
        return F.mse_loss(found, y)


def _case(model: type[nn.Module]) -> Case:
    torch.manual_seed(0)
    if model is Recurrent:
        return prepare(Recurrent(), {"ids": torch.randint(0, 11, (4, 5)), "labels": torch.randint(0, 11, (4, 5))})
    return prepare(PerSample(), {"x": torch.randn(4, 6, 5), "y": torch.randn(4, 6, 3)})


@pytest.fixture(scope="module")
def cases() -> dict[type[nn.Module], Case]:
    return {model: _case(model) for model in (Recurrent, PerSample)}


STRATEGIES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2": ({"dp_shard": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "dp2tp2": ({"dp_shard": 2, "tp": 2}, {}),
    "zero3tp2": ({"dp_shard": 2, "tp": 2}, {"zero": 3}),
    "pp2": ({"pp": 2}, {"microbatches": 2}),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", [Recurrent, PerSample])
def test_equals_one_device(cases: dict[type[nn.Module], Case], model: type[nn.Module], strategy: str) -> None:
    """A scan over time keeps its samples cut over the data axis. A map over samples has one micro-batch."""
    case, (axes, options) = cases[model], STRATEGIES[strategy]
    if model is PerSample:
        options = {k: v for k, v in options.items() if k != "microbatches"}
    plan = Plan(mesh(**axes), **options)
    programs = emit_all(case, plan, balanced_sizes(case.batch, plan.data_size))
    if model is Recurrent and strategy == "dp2":
        calls = [str(n.target) for g in programs[0].graphs.values() for n in g.graph.graph.nodes if n.op == "call_function"]
        assert not [name for name in calls if "gather" in name or "all_to_all" in name]
    compare(case, programs, run(case, programs))
