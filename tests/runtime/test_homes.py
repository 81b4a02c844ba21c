"""Gradients are made where they are summed: nothing is packed, nothing is added in a pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compare, emit_all, run
from programs import case, plan, shares

from shardwright.compiler import verify
from shardwright.runtime import emit_python, executor, homes
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.steps import plan_steps

MODELS = ["mlp", "gpt", "llama"]


def places(monkeypatch: pytest.MonkeyPatch) -> list[homes.Place]:
    """Where products were written, as they run."""
    seen: list[homes.Place] = []
    honest = homes.product_into

    def product_into(a: torch.Tensor, b: torch.Tensor, place: homes.Place) -> torch.Tensor:
        seen.append(place)
        return honest(a, b, place)

    monkeypatch.setattr(emit_python, "product_into", product_into)
    return seen


@pytest.mark.parametrize("model", MODELS)
def test_no_gradient_is_packed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_loss(tensors: Any) -> Any:
        assert [tuple(x.shape) for x in tensors] == [()], "a gradient was packed"
        return honest(tensors)

    honest = executor.pack
    monkeypatch.setattr(executor, "pack", only_the_loss)
    seen = places(monkeypatch)
    found, wanted = case(model), plan(dp_replicate=4)
    programs = emit_all(found, wanted, shares(found, wanted))
    compare(found, programs, run(found, programs))
    assert seen and all(place is not None and not place[1] for place in seen)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{"pp": 2, "microbatches": 4}, {"pp": 2, "dp_replicate": 2, "microbatches": 2}], ids=str)
def test_microbatches_add_where_the_first_has_written(model: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = places(monkeypatch)
    found, wanted = case(model), plan(**options)
    programs = emit_all(found, wanted, shares(found, wanted))
    compare(found, programs, run(found, programs))
    added = sum(place is not None and place[1] for place in seen)
    assert added == len(seen) * (wanted.microbatches - 1) / wanted.microbatches > 0


def test_a_bucket_holds_its_gradients_one_after_the_other() -> None:
    found, wanted = case("llama"), plan(dp_replicate=2)
    (program, _) = emit_all(found, wanted, shares(found, wanted))
    steps = plan_steps(program).steps
    (reduction,) = (s for s in steps if s.bucket is not None)
    given = [w.home for s in steps for w in s.writes if w is not None and w.home is not None]
    assert len(given) == len(reduction.reads) and {h.bucket for h in given} == {reduction.bucket}
    ends = 0
    for home in sorted(given, key=lambda h: h.start):
        assert home.start == ends
        ends += torch.Size(home.shape).numel()
    assert {h.length for h in given} == {ends}


def test_only_products_used_for_nothing_else_are_placed() -> None:
    """A product that the graph reads again, or gives twice, may not be added to."""
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    mm = torch.ops.aten.mm.default
    alone, read, twice = (graph.call_function(mm, (x, y)) for _ in range(3))
    total = graph.call_function(torch.ops.aten.add.Tensor, (read, 1.0))
    graph.output((alone, read, twice, twice, total))
    assert homes.read_outputs(torch.fx.GraphModule(torch.nn.Module(), graph)).products == {0}


def test_functions_that_know_of_no_places() -> None:
    """Graphs as functions of their own, as a saved program has: what they give is put into the bucket."""
    found, wanted = case("mlp"), plan(dp_replicate=2)
    programs = emit_all(found, wanted, shares(found, wanted))

    def body(rank: int, world: Any) -> executor.StepResult:
        program = programs[rank]
        functions = {name: emit_python.compile_graph(spec, name) for name, spec in program.graphs.items()}
        made = executor.Executor(program, world.communicator(program.mesh, rank), "cpu", functions=functions)
        working = {f"param.{s.name}": verify.working_part(found.state[f"param.{s.name}"], s, program) for s in program.parameters}
        inputs = {s.key: verify.cut(found.inputs[s.key], s.cuts, program.mesh, program.coordinates) for s in program.inputs}
        return made.run(working, inputs, 0)

    verify.compare(programs, run_ranks(2, body), found.loss_key, found.loss, found.gradients)


def test_products_where_they_are_told() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    target = torch.full((3, 5), 2.0)
    assert homes.product_into(a, b, (target, True)) is target
    torch.testing.assert_close(target, a @ b + 2)
    assert homes.product_into(a, b, (target, False)) is target
    torch.testing.assert_close(target, a @ b)
    torch.testing.assert_close(homes.product_into(a, b, None), a @ b)
