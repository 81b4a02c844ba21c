"""Results written into memory of values that have died. That random graphs give the same is in test_reuse.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_reuse import Builder, check, function_of, random
from torch.fx import Node

from shardwright.runtime import recycle
from shardwright.runtime.emit_python import graph_text
from shardwright.runtime.recycle import INTO, recycled
from shardwright.runtime.reuse import IN_PLACE, reused

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def smallest_of_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "SMALLEST", 1)


def found(built: Builder, given: tuple[Node, ...] = (), apart: tuple[Node, ...] = ()) -> dict[Node, Node]:
    return recycled(built.graph.nodes, reused(built.graph.nodes, given), given, apart)


def chain(built: Builder, *lengths: int) -> list[Node]:
    """Products of matrices, [4, n] for each length: of the one before with a square of ones."""
    last, made = built.nodes[0], []
    for n in lengths:
        last = built.call(aten.mm.default, last, built.call(aten.full.default, [last.meta["val"].shape[1], n], 1.0))
        made.append(last)
    return made


def test_a_product_takes_the_memory_of_the_one_before_the_last() -> None:
    built = Builder(random(4, 6).float())
    made = chain(built, 5, 5, 5, 5)
    check(built, made[-1])
    into = found(built)
    assert {n: into.get(n) for n in made} == {made[0]: None, made[1]: None, made[2]: made[0], made[3]: made[1]}


def test_another_shape_of_the_same_size() -> None:
    built = Builder(random(4, 6))
    first = built.call(aten.mm.default, built.call(aten.t.default, built.nodes[0]), built.nodes[0])
    row = built.call(aten.sum.dim_IntList, first, [0])
    second = built.call(aten.cat.default, [built.call(aten.unsqueeze.default, row, 1)] * 6)
    third = built.call(aten.sum.dim_IntList, second, [0])
    check(built, third)
    spec = built.spec(third)
    assert found(built) == {second: first}
    assert f"out={first.name}.view((36, 1))" in graph_text(spec, "g", donated=frozenset())
    assert "out=" not in graph_text(spec, "g", device="cuda", donated=frozenset())  # whose allocator does it


def test_what_a_user_is_given_lies_in_memory_of_its_own() -> None:
    built = Builder(random(4, 6).float())
    made = chain(built, 5, 5, 5)
    spec = built.spec(built.call(aten.view.default, made[-1], [20]))
    assert found(built) == {made[2]: made[0]}
    assert "out=" in graph_text(spec, "g", donated=frozenset())
    assert "out=" not in graph_text(replace(spec, outputs=("out.x",)), "g", donated=frozenset())


def cases() -> dict[str, tuple[Builder, tuple[Node, ...]]]:
    """By what forbids it: a graph in which no memory may be taken, and outputs."""
    built: dict[str, tuple[Builder, tuple[Node, ...]]] = {}

    def make(name: str, body: Any) -> None:
        torch.manual_seed(0)
        b = Builder(random(6, 6))
        built[name] = (b, tuple(body(b, *b.nodes)))

    def product(b: Builder, x: Node) -> Node:
        return b.call(aten.mm.default, x, b.nodes[0])

    def an_input(b: Builder, x: Node) -> list[Node]:
        return [product(b, b.call(aten.sum.dim_IntList, x, [0], True))]

    def given_back(b: Builder, x: Node) -> list[Node]:
        made = product(b, x)
        return [made, b.call(aten.mm.default, b.call(aten.sum.dim_IntList, made, [0], True), x), product(b, x)]

    def shown_by_a_view(b: Builder, x: Node) -> list[Node]:
        made = product(b, x)
        return [b.call(aten.select.int, made, 0, 0), product(b, x)]

    def its_own_operand(b: Builder, x: Node) -> list[Node]:
        return [product(b, product(b, x))]

    def another_dtype(b: Builder, x: Node) -> list[Node]:
        order = b.call(aten.argsort.default, x)
        return [b.call(aten.sum.default, order), product(b, x)]

    def seen_by_a_users_op(b: Builder, x: Node) -> list[Node]:
        seen = b.call(torch.ops.reuse_test.mark.default, product(b, x))
        return [b.call(aten.sum.default, seen), product(b, x)]

    def transposed(b: Builder, x: Node) -> list[Node]:
        made = b.call(aten.mul.Tensor, b.call(aten.t.default, x), 2.0)
        return [b.call(aten.sum.default, made), product(b, x)]

    def more_at_once(b: Builder, x: Node) -> list[Node]:
        """Between the death of the first and the second the graph holds the most it ever does."""
        first = b.call(aten.sum.default, product(b, x))
        wide = b.call(aten.full.default, [36, 36], 1.0)
        twice = b.call(aten.mm.default, wide, wide)
        return [first, b.call(aten.sum.default, twice), product(b, x)]

    for body in (
        an_input, given_back, shown_by_a_view, its_own_operand, another_dtype, seen_by_a_users_op, transposed, more_at_once,
    ):  # fmt: skip
        make(body.__name__, body)
    return built


@pytest.mark.parametrize("name", cases())
def test_not_memory_that_is_not_free(name: str) -> None:
    built, outputs = cases()[name]
    check(built, *outputs)
    assert found(built) == {}


def test_what_was_saved_for_the_graph_alone_is_its_own() -> None:
    built = Builder(random(6, 6), random(6, 6))
    saved, x = built.nodes
    total = built.call(aten.sum.default, saved)
    result = built.call(aten.mm.default, x, x)
    check(built, total, result)
    assert found(built) == {}
    assert found(built, given=(saved,)) == {result: saved}
    assert found(built, given=(saved,), apart=(result,)) == {}


def test_what_was_written_over_an_operand_hands_on_its_memory() -> None:
    built = Builder(random(6, 6))
    (x,) = built.nodes
    twice = built.call(aten.neg.default, built.call(aten.neg.default, x))
    total = built.call(aten.sum.default, twice)
    result = built.call(aten.mm.default, x, x)
    check(built, total, result)
    assert found(built) == {result: twice}


TYPES = (torch.float32, torch.bfloat16, torch.complex64)
ROWS = [(op, dtype) for op in INTO if op not in IN_PLACE for dtype in TYPES if op is not aten.silu.default or not dtype.is_complex]


@pytest.mark.parametrize(("op", "dtype"), ROWS, ids=str)
def test_every_op_takes_memory(op: Any, dtype: torch.dtype) -> None:
    """Each row of the table that is not of ops in place (test_reuse.py), into memory of another shape."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 7).to(dtype), torch.randn(3, 7, 4).to(dtype)
    arguments: dict[Any, tuple[Any, ...]] = {
        aten.bmm.default: (a, b),
        aten.cat.default: ([a, a * 2], -1),
        aten.mm.default: (a[0], b[0]),
        aten.silu.default: (a,),
        aten.sum.dim_IntList: (a, [1], True),
    }
    args = arguments[op]
    expected = op(*args)
    memory = torch.full((expected.numel(),), torch.nan, dtype=dtype)
    result = function_of(INTO[op])(*args, out=memory.view(tuple(expected.shape)))
    assert result.data_ptr() == memory.data_ptr()
    assert torch.equal(result, expected)
