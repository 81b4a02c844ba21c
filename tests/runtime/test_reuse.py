"""Results written over operands: what graphs give stays the same, and what they are given stays as it was."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_built import graph, one_rank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from shardwright.passes.ops.collectives import StaticCommunicator, ops, use_communicator
from shardwright.runtime import recycle
from shardwright.runtime.direct import direct
from shardwright.runtime.emit_python import compile_graph, graph_text
from shardwright.runtime.program import GraphSpec, InputSpec, OutputSpec, RankProgram
from shardwright.runtime.reuse import IN_PLACE, InPlace, donated, reused

aten = torch.ops.aten
SHAPE = (4, 6)


library = torch.library.Library("reuse_test", "DEF")
library.define("mark(Tensor x) -> Tensor")
library.impl("mark", lambda x: x, "CompositeExplicitAutograd")


class Builder:
    """A graph with the values of its nodes for one set of inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        self.graph, self.inputs = Graph(), inputs
        self.nodes = [self.graph.placeholder(f"x{i}") for i in range(len(inputs))]
        for node, x in zip(self.nodes, inputs, strict=True):
            node.meta["val"] = x

    def call(self, op: Any, *args: Any) -> Node:
        node = self.graph.call_function(op, args)
        values = map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = op(*values)
        self.nodes.append(node)
        return node

    def spec(self, *outputs: Node) -> GraphSpec:
        self.graph.output(tuple(outputs))
        inputs = [f"input.x{i}" for i in range(len(self.inputs))]
        return GraphSpec(
            GraphModule(torch.nn.Module(), self.graph), tuple(inputs), tuple(f"saved.{i}" for i in range(len(outputs)))
        )

    def over(self) -> dict[Node, int]:
        return reused(self.graph.nodes)


def batches(built: Builder, x: Node, y: Node) -> Node:
    """[2, 2, 6]: each half of the rows of `x`, times its products with those of `y`."""
    first, second = (built.call(aten.view.default, built.call(aten.clone.default, n), [2, 2, 6]) for n in (x, y))
    products = built.call(aten.bmm.default, first, built.call(aten.transpose.int, second, 1, 2))
    return built.call(aten.bmm.default, products, second)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def check(built: Builder, *outputs: Node) -> None:
    spec = built.spec(*outputs)
    given_ = [x.clone() for x in built.inputs]
    expected = Interpreter(spec.graph).run(*built.inputs)
    found = compile_graph(spec)(list(given_))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(given_, built.inputs, strict=True))


KINDS = (
    "mul",
    "addcmul",
    "neg",
    "pow",
    "addmm",
    "mm",
    "bmm",
    "cat",
    "silu",
    "tanh_backward",
    "view",
    "t",
    "split",
    "norm",
    "sum",
    "clone",
)


@pytest.fixture
def smallest_of_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "SMALLEST", 1)


@given(st.lists(st.tuples(st.sampled_from(KINDS), *[st.integers(0, 30)] * 3), min_size=3, max_size=14), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("smallest_of_a_byte")
def test_random_graphs_give_the_same(steps: list[tuple[str, int, int, int]], data: st.DataObject) -> None:
    torch.manual_seed(0)
    built = Builder(random(*SHAPE), random(*SHAPE), random(6, 6))
    for kind, *picks in steps:
        wide = [n for n in built.nodes if isinstance(n.meta["val"], Tensor) and n.meta["val"].shape == SHAPE]
        x, y, z = (wide[-1 - pick % min(len(wide), 4)] for pick in picks)
        match kind:
            case "mul" | "tanh_backward":
                built.call(getattr(aten, kind).Tensor if kind == "mul" else aten.tanh_backward.default, x, y)
            case "addcmul":
                built.call(aten.addcmul.default, x, y, z)
            case "neg" | "silu":
                built.call(getattr(aten, kind).default, x)
            case "mm":
                built.call(aten.mm.default, x, built.nodes[2])
            case "bmm":
                built.call(aten.view.default, batches(built, x, y), [*SHAPE])
            case "cat":
                halves = (built.call(aten.slice.Tensor, n, 0, start, start + 2) for n, start in ((x, 0), (y, 2)))
                built.call(aten.cat.default, [*halves])
            case "pow":
                built.call(aten.pow.Tensor_Scalar, x, 2)
            case "addmm":
                built.call(aten.addmm.default, x, y, built.nodes[2])
            case "view":
                built.call(
                    aten.view.default, built.call(aten._unsafe_view.default, built.call(aten.clone.default, x), [24]), [*SHAPE]
                )
            case "t":
                built.call(aten.t.default, built.call(aten.t.default, x))
            case "split":
                whole = built.call(aten.split.Tensor, built.call(aten.clone.default, x), 4)
                built.call(aten.alias.default, built.call(operator.getitem, whole, 0))
            case "norm":
                whole = built.call(aten.native_layer_norm.default, x, [6], None, None, 1e-5)
                built.call(operator.getitem, whole, 0)
                built.call(aten.mul.Tensor, y, built.call(operator.getitem, whole, 2))
            case "sum":
                built.call(aten.mul.Tensor, x, built.call(aten.sum.dim_IntList, y, [0], True))
            case _:
                built.call(aten.clone.default, x)
    tensors = [n for n in built.nodes[3:] if isinstance(n.meta["val"], Tensor)]
    count = data.draw(st.integers(1, min(4, len(tensors))))
    check(built, *tensors[-1:], *data.draw(st.lists(st.sampled_from(tensors), max_size=count)))


def test_a_chain_takes_memory_once() -> None:
    built = Builder(random(*SHAPE), random(*SHAPE))
    x, y = built.nodes
    first = built.call(aten.mul.Tensor, x, y)
    second = built.call(
        aten.addcmul.default, y, x, built.call(aten.view.default, built.call(aten.view.default, first, [24]), [*SHAPE])
    )
    third = built.call(aten.neg.default, second)
    assert built.over() == {second: 2, third: 0}
    check(built, third)


def test_each_result_of_several_is_written_over_by_itself() -> None:
    built = Builder(random(*SHAPE), random(*SHAPE))
    x, y = built.nodes
    whole = built.call(aten.native_layer_norm.default, x, [6], None, None, 1e-5)
    first, mean = (built.call(operator.getitem, whole, k) for k in (0, 1))
    second = built.call(aten.mul.Tensor, first, y)
    third = built.call(aten.add.Tensor, second, mean)
    assert built.over() == {second: 0, third: 0}, "the mean is read later, but lies elsewhere"
    check(built, third)


def cases() -> dict[str, tuple[Builder, Node, tuple[Node, ...]]]:
    """By what forbids it: a graph, the node that may not be written over an operand, and outputs."""
    found: dict[str, tuple[Builder, Node, tuple[Node, ...]]] = {}

    def make(name: str, body: Any) -> None:
        torch.manual_seed(0)
        built = Builder(random(*SHAPE), random(*SHAPE), random(6, 6))
        node, *outputs = body(built, *built.nodes)
        found[name] = (built, node, tuple(outputs) or (node,))

    def read_later(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        made = b.call(aten.mul.Tensor, x, y)
        result = b.call(aten.neg.default, made)
        return [result, result, b.call(aten.sum.default, made)]

    def view_read_later(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        made = b.call(aten.mul.Tensor, x, y)
        flat = b.call(aten._unsafe_view.default, made, [24])
        result = b.call(aten.neg.default, made)
        return [result, result, b.call(aten.sum.default, flat)]

    def view_given(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        made = b.call(aten.mul.Tensor, x, y)
        return [b.call(aten.neg.default, made), b.call(aten.t.default, made)]

    def part_of_a_split(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        parts = b.call(aten.split.Tensor, b.call(aten.mul.Tensor, x, y), 2)
        result = b.call(aten.neg.default, b.call(operator.getitem, parts, 0))
        return [result, result, b.call(aten.neg.default, b.call(operator.getitem, parts, 1))]

    def transposed_with_itself(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        made = b.call(aten.mul.Tensor, w, w)
        return [b.call(aten.mul.Tensor, made, b.call(aten.t.default, made))]

    def factor(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        square = b.call(aten.neg.default, w)
        return [b.call(aten.addmm.default, w, b.call(aten.neg.default, w), square)]

    def itself_a_factor(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        made = b.call(aten.neg.default, w)
        return [b.call(aten.addmm.default, made, made, w)]

    def broadcast(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        return [b.call(aten.mul.Tensor, b.call(aten.sum.dim_IntList, x, [0], True), y)]

    def expanded(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        row = b.call(aten.sum.dim_IntList, x, [0], True)
        return [b.call(aten.neg.default, b.call(aten.expand.default, row, [*SHAPE]))]

    def an_input(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        return [b.call(aten.mul.Tensor, x, y)]

    def a_view_of_an_input(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        return [b.call(aten.neg.default, b.call(aten.view.default, x, [24]))]

    def another_type(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        return [b.call(aten.mul.Tensor, b.call(aten.gt.Tensor, x, y), y)]

    def seen_by_a_users_op(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        made = b.call(aten.mul.Tensor, x, y)
        seen = b.call(torch.ops.reuse_test.mark.default, made)
        result = b.call(aten.neg.default, made)
        return [result, result, b.call(aten.sum.default, seen)]

    def made_by_a_users_op(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        return [b.call(aten.neg.default, b.call(torch.ops.reuse_test.mark.default, x))]

    def conjugate(b: Builder, x: Node, y: Node, w: Node) -> list[Node]:
        z = b.call(aten.view_as_complex.default, b.call(aten.view.default, b.call(aten.exp.default, x), [4, 3, 2]))
        other = b.call(aten.view_as_complex.default, b.call(aten.view.default, y, [4, 3, 2]))
        product = b.call(aten.mul.Tensor, b.call(aten._conj.default, z), other)
        return [product, b.call(aten.view_as_real.default, product)]

    for body in (
        read_later, view_read_later, view_given, part_of_a_split, transposed_with_itself, factor, itself_a_factor, broadcast,
        expanded, an_input, a_view_of_an_input, another_type, seen_by_a_users_op, made_by_a_users_op, conjugate,
    ):  # fmt: skip
        make(body.__name__, body)
    return found


@pytest.mark.parametrize("name", cases())
def test_not_where_it_would_change_something(name: str) -> None:
    built, node, outputs = cases()[name]
    check(built, *outputs)
    assert node not in built.over()


def test_the_printed_graph_says_what_not_where() -> None:
    built = Builder(random(*SHAPE))
    twice = built.call(aten.neg.default, built.call(aten.neg.default, built.nodes[0]))
    spec = built.spec(twice)
    assert "out=" not in graph_text(spec, "g")
    assert "neg_default_1 = torch.neg(neg_default, out=neg_default); del neg_default" in graph_text(spec, "g", donated=frozenset())


def function_of(how: InPlace) -> Any:
    """What the code of a graph calls."""
    return functools.reduce(getattr, how.callee.split(".")[1:], torch)


@pytest.mark.parametrize("op", [op for op in IN_PLACE if op.namespace == "aten"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_every_op_takes_its_own_operands_memory(op: Any, dtype: torch.dtype) -> None:
    """Each row of the table, over each operand."""
    how = IN_PLACE[op]
    shapes = [(5, 7), (5, 3), (3, 7)] if op is aten.addmm.default else [(5, 7)] * 3
    for over in how.operands:
        torch.manual_seed(0)
        tensors = [torch.rand(s).to(dtype) + 0.5 for s in shapes]
        names = [a.name for a in op._schema.arguments if not a.kwarg_only and not a.has_default_value()]
        args = [2 if name in ("exponent",) or op is aten.mul.Scalar and i == 1 else tensors[i] for i, name in enumerate(names)]
        try:
            expected = op(*args)
        except (RuntimeError, NotImplementedError, TypeError):
            assert dtype == torch.complex64
            return
        if expected.dtype != dtype:
            return  # the size of a complex number
        target = args[over]
        found = function_of(how)(*args, **{how.keyword: target})
        assert found.data_ptr() == target.data_ptr()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["logsumexp_backward", "softmax_minus_onehot", "softmax_minus_onehot_shard"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_logits_takes_their_memory(name: str, dtype: torch.dtype) -> None:
    """Over several chunks."""
    rows, size = 5, 1 << 16
    x, lse, index = random(rows, size).to(dtype), random(rows).float() + 12, torch.arange(rows)
    grads = (random(rows).float(), random(rows).float())
    args: tuple[Any, ...] = (x, lse, index, *grads) if name != "logsumexp_backward" else (grads[0], x, lse)
    args = (*args, "tp", []) if name.endswith("shard") else args
    op = getattr(ops, name).default
    with use_communicator(StaticCommunicator({"tp": 2}, {"tp": 0})):
        expected = op(*args)
        found = direct(op)(*args, **{IN_PLACE[op].keyword: args[IN_PLACE[op].operands[0]]})
    assert found.data_ptr() == x.data_ptr() and torch.equal(found, expected)


def saving(second_reader: bool = False, shown: bool = False, view: bool = False) -> RankProgram:
    """exp(x) saved for the backward, and what may stand against its reuse."""

    def forward(call: Any, x: Node) -> list[Node]:
        made = call(aten.exp.default, x)
        return [call(aten.sum.default, made), call(aten.view.default, x, [6]) if view else made, made if shown else x]

    def backward(call: Any, made: Node) -> list[Node]:
        return [call(aten.neg.default, made)]

    graphs = {
        "forward": graph(["input.x"], ["out.y", "saved.made", "out.z" if shown else "saved.x"], forward),
        "backward": graph(["saved.made"], ["grad.param.a"], backward),
    }
    if second_reader:
        graphs["more"] = graph(["saved.made"], ["grad.param.b"], backward)
    return one_rank(
        graphs,
        [("forward", 0), ("backward", 0), *([("more", 0)] if second_reader else [])],
        inputs=(InputSpec("input.x", (6,), torch.float64),),
        outputs=(OutputSpec("out.y", (), torch.float64),),
    )


def test_what_is_saved_for_one_graph_is_its_own() -> None:
    assert donated(saving()) == {"backward": frozenset({0})}
    for forbidden in ({"second_reader": True}, {"shown": True}, {"view": True}):
        assert donated(saving(**forbidden)) == {}


def test_a_graph_that_runs_twice_keeps_what_it_reads() -> None:
    program = saving()
    again = replace(program, schedule=(*program.schedule, program.schedule[-1]))
    assert donated(again) == {}
