"""Control flow as ops: unrolled where it is static, as eager computes it and on many devices as on one; refused where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, compare, emit_all, mesh, prepare, run
from torch import Tensor, _foreach_add_, fx, nn  # type: ignore[attr-defined]
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
    "branch on data": lambda self, x: torch.cond(self.linear(x).sum() > 0, self.linear, lambda y: self.linear(y) * 2, (x,)).sum(),
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


def _cond(condition: Any, if_true: Any, if_false: Any, *operands: Any) -> Any:
    return torch.cond(condition, if_true, if_false, operands)


def _overflows(self: Cell, x: Tensor) -> Tensor:
    """What is not taken has no value for what it reads: operands, parameters, and a value from outside."""
    outside = self.linear(x).sum(-1) - 1e3
    return _cond(
        x.sum() > 1e3,
        lambda y: self.linear(y) * (y - 1e3).log() * outside.sqrt()[..., None],
        lambda y: y * outside[..., None],
        x * 2,
    )


def _branch_in_a_branch(self: Cell, x: Tensor) -> Tensor:
    y = self.linear(x)

    def inner(z: Tensor) -> Tensor:
        return _cond(y.mean() > -5, lambda t: t * y, lambda t: (t * y - 1e3).log(), z.sin())

    return _cond(x.sum() > 1e3, torch.log, inner, y)


def _scan_in_a_branch(self: Cell, x: Tensor) -> Tensor:
    return _cond(x.sum() > 1e3, torch.sqrt, lambda y: scan(self.step, self.start(x), y)[1], self.linear(x) * 2)


def _trees_of_branches(self: Cell, x: Tensor) -> Tensor:
    found = _cond(
        x[0, 0, :1] < 9, lambda y: {"a": (y, None), "b": y > 0}, lambda y: {"a": (y * 2, None), "b": y > 1}, self.linear(x)
    )
    return found["a"][0].where(found["b"], 0.0)


def _until_small(self: Cell, x: Tensor) -> Tensor:
    """What depends on nothing carried is computed once; the mean is read in the condition."""
    y, k = torch.while_loop(
        lambda y, k: y.square().mean() > 1e-3,
        lambda y, k: (torch.tanh(y @ self.linear.weight) * 0.5 * x.mean(0), k + 1),
        (self.linear(x), torch.tensor(0)),
    )
    return y.sum() + k * self.linear.bias.sum()


def _until_small_written_out(self: Cell, x: Tensor) -> Tensor:
    y, k = self.linear(x), 0
    while y.square().mean() > 1e-3:
        y, k = torch.tanh(y @ self.linear.weight) * 0.5 * x.mean(0), k + 1
    assert k > 1
    return y.sum() + k * self.linear.bias.sum()


def _known_at_first(self: Cell, x: Tensor) -> Tensor:
    """Two steps are known to be taken; a number is carried, and a branch depends on data."""

    def body(k: Any, y: Tensor) -> tuple[Any, Tensor]:
        return k + 1, torch.cond(y.sum() > 0, self.linear, lambda z: self.linear(z) * 2, (y * 0.3,))

    return torch.while_loop(lambda k, y: k < 2 or y.abs().max() > 0.6, body, (0, x * 3))[1].sum()


def _known_at_first_written_out(self: Cell, x: Tensor) -> Tensor:
    k, y = 0, x * 3
    while k < 2 or y.abs().max() > 0.6:
        k, z = k + 1, y * 0.3
        y = self.linear(z) if y.sum() > 0 else self.linear(z) * 2
    assert k > 2
    return y.sum()


def _loop_in_a_loop(self: Cell, x: Tensor) -> Tensor:
    def body(y: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (z,) = torch.while_loop(lambda z: z.abs().max() > 1, lambda z: (z * 0.7 * y.cos(),), (self.linear(y * 9),))
        return z * 0.6, k + 1

    return torch.while_loop(lambda y, k: (k < 3) & (y.abs().max() > 0), body, (x, torch.tensor(0)))[0].sum()


def _loop_in_a_loop_written_out(self: Cell, x: Tensor) -> Tensor:
    outer = inner = 0
    y = x
    while outer < 3:
        z = self.linear(y * 9)
        while z.abs().max() > 1:
            z, inner = z * 0.7 * y.cos(), inner + 1
        y, outer = z * 0.6, outer + 1
    assert inner > outer
    return y.sum()


def _read_without_gradient_first(self: Cell, x: Tensor) -> Tensor:
    """What a branch reads twice, and the gradient counts the second time."""
    y = self.linear(x) - 1e3

    def overflows(z: Tensor) -> Tensor:
        with torch.no_grad():
            most = y.abs().max()
        return y.sqrt() * most * 0 + z

    return _cond(x.sum() > 1e3, overflows, lambda z: z * 2, self.linear(x)).sum()


def _endless_where_not_taken(self: Cell, x: Tensor) -> Tensor:
    def endless(y: Tensor) -> Tensor:
        return torch.while_loop(lambda z: z.abs().max() < 1e3, lambda z: (z * 0.5,), (y,))[0]

    return _cond(self.linear(x).abs().max() < 0, endless, lambda y: y * 2, self.linear(x)).sum()


def _steps(self: Cell, x: Tensor, step: Callable[[Tensor], Tensor], count: int = 3) -> Tensor:
    """So many steps, counted by a tensor."""
    return torch.while_loop(
        lambda y, k: (k < count) & (y.sum() < 1e9), lambda y, k: (step(y), k + 1), (self.linear(x), torch.tensor(0))
    )[0].sum()


def _steps_written_out(self: Cell, x: Tensor, step: Callable[[Tensor], Tensor], count: int = 3) -> Tensor:
    y = self.linear(x)
    for _ in range(count):
        y = step(y)
    return y.sum()


def _unchanged(self: Cell, y: Tensor) -> Tensor:
    """Casts that give the same tensor; a device that is named."""
    y = torch.tanh(self.linear(y.to(y.dtype).to("cpu").type_as(y)))
    return y.to(self.linear.weight) + torch.ones(4, device=y.device, dtype=y.dtype)


def _attends(self: Cell, y: Tensor) -> Tensor:
    y = F.dropout(F.scaled_dot_product_attention(self.linear(y), y, y), 0.5, training=False)
    return F.batch_norm(y.flatten(0, 1), y.new_zeros(4), y.new_full((4,), 2.0)).view_as(y)


def _from_no_gradient(self: Cell, x: Tensor, loops: bool) -> Tensor:
    """What is carried has a gradient from the second step on: in a branch, behind a detach, and through a function of its own."""

    def step(y: Tensor) -> Tensor:
        taken = y.mean() < 1e3
        z = _cond(taken, lambda t: t * 2, lambda t: (t - 1e3).sqrt(), y) if loops else y * 2
        return torch.tanh(self.linear(Fifth.apply(z))) + 0.1 * y.detach() * y

    if not loops:
        return step(step(step(x))).sum()
    return torch.while_loop(lambda y, k: (k < 3) & (y.sum() < 1e9), lambda y, k: (step(y), k + 1), (x, torch.tensor(0)))[0].sum()


def _written(self: Cell, y: Tensor) -> Tensor:
    return y.mul_(0.9) + self.linear(y)


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
    "loop on data": (_until_small, _until_small_written_out),
    "loop on data, its first steps known": (_known_at_first, _known_at_first_written_out),
    "loop on data in a loop": (_loop_in_a_loop, _loop_in_a_loop_written_out),
    "loop on data with a cast": (
        lambda self, x: torch.while_loop(
            lambda y: y.sum() < 50, lambda y: ((y.float() * 1.1 + torch.ones(4)).to(x.dtype),), (self.linear(x),)
        )[0].sum(),
        lambda self, x: loop(lambda y, _: ((y.float() * 1.1 + torch.ones(4)).to(x.dtype), y), self.linear(x), [0] * 1)[0].sum(),
    ),
    "branch that reads without a gradient first": (
        _read_without_gradient_first,
        lambda self, x: 2 * self.linear(x).sum(),
    ),
    "branch whose loop would not end": (_endless_where_not_taken, lambda self, x: 2 * self.linear(x).sum()),
    "loop whose casts change nothing": (
        lambda self, x: _steps(self, x, lambda y: _unchanged(self, y)),
        lambda self, x: _steps_written_out(self, x, lambda y: _unchanged(self, y)),
    ),
    "loop of attention and a norm": (
        lambda self, x: _steps(self, x, lambda y: _attends(self, y)),
        lambda self, x: _steps_written_out(self, x, lambda y: _attends(self, y)),
    ),
    "loop that writes to what it carries": (
        lambda self, x: _steps(self, x, lambda y: _written(self, y)),
        lambda self, x: _steps_written_out(self, x, lambda y: _written(self, y * 1)),
    ),
    "loop on data from what has no gradient": (
        lambda self, x: _from_no_gradient(self, x, True),
        lambda self, x: _from_no_gradient(self, x, False),
    ),
    "loop on data of no steps": (
        lambda self, x: torch.while_loop(lambda y: y.sum() > 1e3, lambda y: (self.linear(y),), (self.linear(x),))[0].sum(),
        lambda self, x: self.linear(x).sum() + 0 * self.linear.weight.sum(),
    ),
    "loop on data without a gradient": (
        lambda self, x: (self.linear(x) * torch.while_loop(lambda k: k.sum() < 9, lambda k: (k * 2,), ((x > 0).long(),))[0]).sum(),
        lambda self, x: (self.linear(x) * (x > 0)).sum(),
    ),
    "branch by a constant": (
        lambda self, x: torch.cond(torch.tensor(True), self.linear, lambda y: y * 2, (x,)).sum(),
        lambda self, x: self.linear(x).sum(),
    ),
    "branch that overflows": (
        lambda self, x: _overflows(self, x).sum(),
        lambda self, x: (2 * x * (self.linear(x).sum(-1) - 1e3)[..., None]).sum(),
    ),
    "branch in a branch": (
        lambda self, x: _branch_in_a_branch(self, x).sum(),
        lambda self, x: (self.linear(x).sin() * self.linear(x)).sum(),
    ),
    "scan in a branch": (
        lambda self, x: _scan_in_a_branch(self, x).sum(),
        lambda self, x: loop(self.step, self.start(x), self.linear(x) * 2)[1].sum(),
    ),
    "branch in a scan": (
        lambda self, x: scan(lambda c, y: (_cond(c.sum() > 1e3, torch.log, torch.cos, c), c * y), self.start(x), x)[1].sum(),
        lambda self, x: loop(lambda c, y: (c.cos(), c * y), self.start(x), x)[1].sum(),
    ),
    "trees of branches": (
        lambda self, x: _trees_of_branches(self, x).sum(),
        lambda self, x: self.linear(x).relu().sum(),
    ),
    "custom function in a branch": (
        lambda self, x: _cond(x.sum() > 1e3, torch.log, lambda y: Fifth.apply(y), self.linear(x)).sum(),
        lambda self, x: Fifth.apply(self.linear(x)).sum(),
    ),
    "branch with a norm that writes nothing": (
        lambda self, x: _normalized(self.linear(x), F.batch_norm, training=False).sum(),
        lambda self, x: self.linear(x).sum() / (1 + 1e-5) ** 0.5,
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
        warnings.filterwarnings("ignore", "torch.cond chooses by the values")
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
def test_a_switch_is_followed_by_a_number_and_computed_whole_by_data() -> None:
    def body(self: Cell, x: Tensor, index: Any) -> Tensor:
        return torch._higher_order_ops.switch(index, (self.linear, lambda y: self.linear(y) * 2), (x,)).sum()

    for index in (1, 7):
        check_capture(
            captured(lambda self, x, i=index: body(self, x, i)),
            Cell(lambda self, x: 2 * self.linear(x).sum()).double(),
            (example(),),
            {},
        )
    for index, factor in ((-3, 1), (0, 1), (1, 2), (5, 2)):
        with pytest.warns(UserWarning, match="switch chooses by the values"):
            found = captured(lambda self, x, i=index: body(self, x, (x.sum() < 1e3).long() * i))
        check_capture(found, Cell(lambda self, x, f=factor: f * self.linear(x).sum()).double(), (example(),), {})


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


def _writing(y: Tensor, x: Tensor) -> Tensor:
    return torch.while_loop(lambda z: z.sum() < 3, lambda z: (z + y.mul_(2),), (x,))[0]


def _looked_into(self: Cell, x: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def body(y: Tensor) -> tuple[Tensor]:
        seen.append(self.linear(y))
        return (seen[-1] * 2,)

    (last,) = torch.while_loop(lambda y: y.sum() < 3, body, (x,))
    return last * seen[0]


def _sets_a_buffer(self: Cell, y: Tensor) -> Tensor:
    self.seen = y.detach() + 1
    return y * 2


def _normalized(x: Tensor, norm: Callable[..., Tensor], training: bool = True) -> Tensor:
    mean, scale = x.new_zeros(3), x.new_ones(3)
    return _cond(x.sum() < 1e3, lambda y: norm(y, mean, scale, training=training), torch.sin, x)


REFUSED: dict[str, tuple[Body, str, str, str]] = {
    "loop by a number of data": (
        lambda self, x: torch.while_loop(lambda y: y.sum().item() < 3, lambda y: (self.linear(y),), (x,))[0],
        "the condition of torch.while_loop gives no tensor of one element",
        "torch.while_loop(",
        "give one",
    ),
    "loop with other shapes": (
        lambda self, x: torch.while_loop(lambda y: y.sum() < 3, lambda y: (self.linear(y)[:1],), (x,))[0],
        "the body of torch.while_loop is given a carry of torch.float64 [5, 3, 4]",
        "torch.while_loop(",
        "like the one given",
    ),
    "loop that draws": (
        lambda self, x: torch.while_loop(lambda y: y.sum() < 3, lambda y: (y + torch.rand_like(x),), (x,))[0],
        "draws random numbers",
        "torch.rand_like(x)",
        "before the loop",
    ),
    "loop that writes": (
        lambda self, x: _writing(self.linear(x) * 1, x),
        "a body of torch.while_loop writes to a tensor from outside",
        "torch.while_loop(",
        "return the new value",
    ),
    "loop that is looked into": (
        _looked_into,
        "a value of a step of torch.while_loop is read outside of it",
        "seen[0]",
        "carry it",
    ),
    "branch by a number of data": (
        lambda self, x: _cond(x.sum().item() > 0, self.linear, torch.sin, x),
        "torch.cond chooses by a number that depends on the values of tensors",
        "torch.cond(",
        "no .item()",
    ),
    "branches of other shapes": (
        lambda self, x: _cond(x.sum() > 0, self.linear, lambda y: y[:1], x),
        "torch.float64 [5, 3, 4], torch.float64 [1, 3, 4]",
        "torch.cond(",
        "same dtype and shape",
    ),
    "branches of other structures": (
        lambda self, x: _cond(x.sum() > 0, lambda y: (y, y), self.linear, x)[0],
        "the branches of torch.cond return",
        "torch.cond(",
        "same structure",
    ),
    "branches with other numbers": (
        lambda self, x: _cond(x.sum() > 0, lambda y: (y, 2), lambda y: (y, 3), x)[0],
        "the branches of torch.cond return int, int",
        "torch.cond(",
        "return tensors",
    ),
    "branch that writes to an operand": (
        lambda self, x: _cond(self.linear(x).sum() > 0, lambda y: y.mul_(2), torch.sin, x * 1),
        "a body of torch.cond writes to a tensor from outside",
        "torch.cond(",
        "return the new value",
    ),
    "branch that writes through a view": (
        lambda self, x: _cond(x.sum() > 0, lambda y: y.view(-1)[3:].zero_().sum(), torch.sum, self.linear(x) * 1),
        "a body of torch.cond writes to a tensor from outside",
        "torch.cond(",
        "return the new value",
    ),
    "branch that writes to an argument by name": (
        lambda self, x: _cond(x.sum() > 0, lambda y: torch.sin(x, out=y), torch.sin, x * 1),
        "a body of torch.cond writes to a tensor from outside",
        "torch.cond(",
        "return the new value",
    ),
    "branch that writes to a list": (
        lambda self, x: _cond(x.sum() > 1e3, lambda y: _foreach_add_([y], 1) or y * 2, torch.sin, self.linear(x) * 1),
        "a body of torch.cond writes to a tensor from outside",
        "torch.cond(",
        "return the new value",
    ),
    "branch with torch's own batch norm": (
        lambda self, x: _normalized(
            x, lambda y, mean, scale, training: torch.native_batch_norm(y, None, None, mean, scale, training, 0.1, 1e-5)[0]
        ),
        "a body of torch.cond writes to a tensor from outside",
        "torch.cond(",
        "return the new value",
    ),
    "branch that sets a buffer": (
        lambda self, x: _cond(x.sum() < 1e3, lambda y: _sets_a_buffer(self, y), torch.sin, self.linear(x)),
        "a body of torch.cond sets the attribute 'seen' of a module to a tensor",
        "torch.cond(",
        "return the new value",
    ),
    "branch with a batch norm": (
        lambda self, x: _normalized(x, F.batch_norm),
        "a body of torch.cond writes to a tensor from outside",
        "torch.cond(",
        "return the new value",
    ),
    "branch with an instance norm": (
        lambda self, x: _normalized(
            x, lambda y, mean, scale, training: torch.instance_norm(y, None, None, mean, scale, training, 0.1, 1e-5, False)
        ),
        "a body of torch.cond writes to a tensor from outside",
        "torch.cond(",
        "return the new value",
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


class Gated(nn.Module):
    """Layers that are left out where the batch says so. What is not taken divides by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for k, layer in enumerate(self.layers):
            x = torch.cond(
                (ids == k).sum() % 2 == 0,
                lambda y, layer=layer: y + layer(y),
                lambda y, layer=layer: y / (layer(y) - layer(y)),
                (x,),
            )
            x = torch.cond(x.square().sum() < 1e4, torch.clone, torch.sin, (x,))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Settling(nn.Module):
    """A layer that is applied until it changes little: of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        start = self.first(x)

        def body(state: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tanh(self.inner(state) * 0.5 + start), state

        state, _ = torch.while_loop(lambda a, b: (a - b).abs().max() > 1e-2, body, (start, start + 1))
        return F.mse_loss(self.last(state), y)


def _case(model: type[nn.Module]) -> Case:
    torch.manual_seed(0)
    if model is Settling:
        return prepare(Settling(), {"x": torch.randn(4, 6), "y": torch.randn(4, 3)})
    if model is Gated:
        ids = torch.tensor([[0, 0, 5, 1], [6, 1, 7, 2], [2, 2, 8, 2], [3, 9, 10, 4]])
        return prepare(Gated(), {"ids": ids, "labels": torch.randint(0, 11, (4, 4))})
    if model is Recurrent:
        return prepare(Recurrent(), {"ids": torch.randint(0, 11, (4, 5)), "labels": torch.randint(0, 11, (4, 5))})
    return prepare(PerSample(), {"x": torch.randn(4, 6, 5), "y": torch.randn(4, 6, 3)})


@pytest.fixture(scope="module")
def cases() -> dict[type[nn.Module], Case]:
    return {model: _case(model) for model in (Recurrent, PerSample, Gated, Settling)}


STRATEGIES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2": ({"dp_shard": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "dp2tp2": ({"dp_shard": 2, "tp": 2}, {}),
    "zero3tp2": ({"dp_shard": 2, "tp": 2}, {"zero": 3}),
    "pp2": ({"pp": 2}, {"microbatches": 2}),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", [Recurrent, PerSample, Gated, Settling])
def test_equals_one_device(cases: dict[type[nn.Module], Case], model: type[nn.Module], strategy: str) -> None:
    """A scan over time keeps its samples cut over the data axis. What couples samples, as a map over
    them or a branch by their values, has one micro-batch."""
    case, (axes, options) = cases[model], STRATEGIES[strategy]
    if model is not Recurrent:
        options = {k: v for k, v in options.items() if k != "microbatches"}
    plan = Plan(mesh(**axes), **options)
    programs = emit_all(case, plan, balanced_sizes(case.batch, plan.data_size))
    if model is Recurrent and strategy == "dp2":
        calls = [str(n.target) for g in programs[0].graphs.values() for n in g.graph.graph.nodes if n.op == "call_function"]
        assert not [name for name in calls if "gather" in name or "all_to_all" in name]
    compare(case, programs, run(case, programs))
