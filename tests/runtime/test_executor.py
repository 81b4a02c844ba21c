"""The executor on hand-built programs, all ranks in lockstep: equal to one device in float64."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from hand_built import aten, graph, one_rank, pipeline, reference, sections, tensor_parallel, weights, zero
from torch.overrides import TorchFunctionMode

from shardwright.passes.ops.collectives import take_shard
from shardwright.runtime.communicator import MeshCommunicator
from shardwright.runtime.errors import MismatchError
from shardwright.runtime.executor import Executor, StepResult
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.program import Cut, InputSpec, Instruction, Mesh, OutputSpec, RankProgram, TensorSpec


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def run_alone(program: RankProgram, working: dict, inputs: dict, **options) -> StepResult:
    return run_ranks(
        1, lambda rank, world: Executor(program, world.communicator(program.mesh, 0), "cpu").run(working, inputs, **options)
    )[0]


def test_tensor_parallel_equals_one_device() -> None:
    w1, w2, x = weights()
    loss, g1, g2 = reference(w1, w2, x)

    def body(rank: int, world: World) -> StepResult:
        program = tensor_parallel(rank)
        working = {"param.w1": w1.chunk(2, 1)[rank], "param.w2": w2.chunk(2, 0)[rank]}
        return Executor(program, world.communicator(program.mesh, rank), "cpu").run(working, {"input.x": x}, 0)

    results = run_ranks(2, body)
    for rank, result in enumerate(results):
        close(result.outputs["out.loss"], loss)
        close(result.gradients["grad.param.w1"], g1.chunk(2, 1)[rank])
        close(result.gradients["grad.param.w2"], g2.chunk(2, 0)[rank])


def check_zero(results: list[StepResult]) -> None:
    w1, w2, x = weights()
    xs = [x * (rank + 1) for rank in range(4)]
    loss, g1, g2 = reference(w1, w2, torch.cat(xs))
    for rank, result in enumerate(results):
        close(result.outputs["out.loss"], loss)
        close(result.gradients["grad.param.w1"], take_shard(g1, 1, ((2, 1), (1, 2)), rank % 2))
        close(result.gradients["grad.param.w2"], take_shard(g2, 0, sections(4, 2), rank % 2))


def zero_body(rank: int, communicator: MeshCommunicator, *, deferred: bool = False) -> StepResult:
    w1, w2, x = weights()
    executor = Executor(zero(rank), communicator, "cpu")
    working = {"param.w1": w1, "param.w2": w2}
    inputs = {"input.x": x * (rank + 1)}
    if not deferred:
        return executor.run(working, inputs, 0)
    result = executor.run(working, inputs, 0, defer_reduction=True)
    assert result.gradients["grad.param.w1"].shape == (5, 6)
    return replace(result, gradients=executor.reduce(result.gradients))


@pytest.mark.parametrize("deferred", [False, True])
def test_uneven_micro_batches_and_scattered_buckets(deferred: bool) -> None:
    check_zero(run_ranks(4, lambda rank, world: zero_body(rank, world.communicator(zero(rank).mesh, rank), deferred=deferred)))


def test_parameters_are_gathered_by_the_hook() -> None:
    w1, w2, x = weights()
    calls = []

    def body(rank: int, world: World) -> StepResult:
        program = zero(rank)
        whole = {"param.w1": w1, "param.w2": w2}
        keys = tuple(whole)
        program = replace(program, schedule=(Instruction("gather", keys, axis="dp_shard"), *program.schedule))

        def gather(instruction: Instruction) -> dict[str, torch.Tensor]:
            calls.append((rank, instruction.axis))
            return {key: whole[key] for key in instruction.keys}

        executor = Executor(program, world.communicator(program.mesh, rank), "cpu", gather=gather)
        return executor.run({}, {"input.x": x * (rank + 1)}, 0)

    check_zero(run_ranks(4, body))
    assert sorted(calls) == [(rank, "dp_shard") for rank in range(4)]


def pipeline_body(rank: int, communicator: MeshCommunicator) -> StepResult:
    w1, w2, x = weights()
    return Executor(pipeline(rank), communicator, "cpu").run({"param.w1": w1} if rank == 0 else {"param.w2": w2}, {"input.x": x}, 0)


def check_pipeline(results: list[StepResult]) -> None:
    w1, w2, x = weights()
    loss, g1, g2 = reference(w1, w2, x)
    first, last = results
    close(first.outputs["out.loss"], loss)
    close(last.outputs["out.loss"], loss)
    close(last.outputs["out.y"], (x @ w1).relu() @ w2)
    close(first.gradients["grad.param.w1"], g1)
    close(last.gradients["grad.param.w2"], g2)
    assert set(first.gradients) == {"grad.param.w1"}
    assert "out.y" not in first.outputs


def test_pipeline_with_crossing_sends() -> None:
    check_pipeline(run_ranks(2, lambda rank, world: pipeline_body(rank, world.communicator(pipeline(rank).mesh, rank))))


def test_a_gradient_that_a_stage_has_no_part_in_is_zero_in_the_sum() -> None:
    """A parameter tied across the first and last of three stages, summed over `pp`."""
    mesh = Mesh(("pp",), (3,))
    square = graph(["param.w"], ["grad.param.w"], lambda call, w: [call(aten.mul.Tensor, w, w)])
    w = torch.arange(3.0)

    def body(rank: int, world: World) -> StepResult:
        runs = () if rank == 1 else (Instruction("run", graph="square"),)
        program = RankProgram(
            rank=rank,
            mesh=mesh,
            microbatches=1,
            graphs={"square": square},
            schedule=(*runs, Instruction("all_reduce", ("grad.param.w",), axis="pp")),
            parameters=(TensorSpec("w", (3,), torch.float32),),
            buffers=(),
            inputs=(),
            outputs=(),
        )
        executor = Executor(program, world.communicator(mesh, rank), "cpu")
        raw = executor.run({"param.w": w}, {}, defer_reduction=True).gradients
        assert set(raw) == (set() if rank == 1 else {"grad.param.w"})
        assert torch.equal(executor.reduce(raw)["grad.param.w"], 2 * w * w)
        return executor.run({"param.w": w}, {}, 0)

    for result in run_ranks(3, body):
        assert torch.equal(result.gradients["grad.param.w"], 2 * w * w)


def test_a_micro_batch_keeps_the_buffer_it_saw_first() -> None:
    """The forward counts up; the backward of each micro-batch reads what its forward read, the next forward what is new."""
    forward = graph(["buffer.n"], ["buffer.n"], lambda call, n: [call(aten.add.Tensor, n, 1)])
    backward = graph(["buffer.n"], ["grad.param.w"], lambda call, n: [call(aten.mul.Tensor, n, 1)])
    order = [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)]
    program = one_rank({"forward": forward, "backward": backward}, order, 2, buffers=(TensorSpec("n", (), torch.float32),))
    n = torch.tensor(10.0)
    result = run_alone(program, {"buffer.n": n}, {})
    assert result.buffers["buffer.n"] == 12 and n == 10
    assert result.gradients["grad.param.w"] == 10 + 11


def test_prologue_runs_once_over_the_whole_batch() -> None:
    prologue = graph(["input.x"], ["prologue.total"], lambda call, x: [call(aten.sum.default, x)])
    share = graph(["input.x", "prologue.total"], ["out.y"], lambda call, x, t: [call(aten.div.Tensor, x, t)])
    program = one_rank(
        {"prologue": prologue, "share": share},
        [("prologue", 0), ("share", 0), ("share", 1)],
        2,
        inputs=(InputSpec("input.x", (5,), torch.float64, (Cut("mb", 0, sections(3, 2)),)),),
        outputs=(OutputSpec("out.y", (5,), torch.float64, (Cut("mb", 0, sections(3, 2)),), 0, "cat"),),
    )
    x = torch.arange(5.0, dtype=torch.float64)
    close(run_alone(program, {}, {"input.x": x}).outputs["out.y"], x / 10)
    with pytest.raises(MismatchError, match="input.x.*has 6 on dim 0.*take 5"):
        run_alone(program, {}, {"input.x": torch.zeros(6, dtype=torch.float64)})
    with pytest.raises(MismatchError, match="call did not give"):
        run_alone(program, {}, {})


def test_gradients_share_no_memory() -> None:
    """Not with each other, not with the call's inputs, and none has overlapping elements."""

    def body(call, w, x):
        return [x, x, call(aten.expand.default, w, [3])]

    keys = ["grad.param.a", "grad.param.b", "grad.param.c"]
    program = one_rank(
        {"g": graph(["param.w", "input.x"], keys, body)}, [("g", 0)], inputs=(InputSpec("input.x", (3,), torch.float32),)
    )
    x, w = torch.ones(3), torch.ones(1)
    found = run_alone(program, {"param.w": w}, {"input.x": x}).gradients
    for gradient in found.values():
        gradient.mul_(2)
    assert all(torch.equal(gradient, torch.full((3,), 2.0)) for gradient in found.values())
    assert torch.equal(x, torch.ones(3)) and torch.equal(w, torch.ones(1))


def test_values_die_at_their_last_use() -> None:
    """Only one activation of a chain is alive at a time, across graphs and within them."""
    made: list[weakref.ref] = []
    alive: list[int] = []
    links = {}

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.add:
                made.append(weakref.ref(result))
                alive.append(sum(ref() is not None for ref in made))
            return result

    for k in range(3):

        def chain(call, x):
            for _ in range(4):
                x = call(aten.add.Tensor, x, 1)
            return [x]

        links[f"g{k}"] = graph([f"saved.{k}" if k else "input.x"], [f"saved.{k + 1}" if k < 2 else "out.y"], chain)
    program = one_rank(
        links,
        [("g0", 0), ("g1", 0), ("g2", 0)],
        inputs=(InputSpec("input.x", (2,), torch.float32),),
        outputs=(OutputSpec("out.y", (2,), torch.float32),),
    )

    def body(rank: int, world: World) -> StepResult:
        with Count():
            return Executor(program, world.communicator(program.mesh, 0), "cpu").run({}, {"input.x": torch.zeros(2)})

    result = run_ranks(1, body)[0]
    assert torch.equal(result.outputs["out.y"], torch.full((2,), 12.0))
    # Seen right after each op: its result and its operand, which the next line's `del` has yet to free.
    assert len(alive) == 12 and max(alive) == 2


def test_an_error_names_graph_node_and_source() -> None:
    w1, w2, _ = weights()

    def body(rank: int, world: World) -> StepResult:
        program = tensor_parallel(rank)
        working = {"param.w1": w1.chunk(2, 1)[rank], "param.w2": w2}
        return Executor(program, world.communicator(program.mesh, rank), "cpu").run(
            working, {"input.x": torch.zeros(7, 5).double()}, 0
        )

    with pytest.raises(RuntimeError) as caught:
        run_ranks(2, body)
    notes = "\n".join(caught.value.__notes__)
    assert "graph forward" in notes and "aten.mm.default" in notes and "mlp.py:5: y = r @ w2" in notes
    assert "run forward [0], rank 0" in notes


def test_a_schedule_that_reads_what_nothing_gives_is_refused() -> None:
    program = pipeline(0)
    wrong = replace(program, schedule=program.schedule[1:])
    with pytest.raises(MismatchError, match=r"send act.r \[0\] to rank 1 reads 'act.r', which nothing before it"):
        run_alone(replace(wrong, mesh=Mesh(("pp",), (1,)), rank=0), {}, {})


def test_autocast_does_not_change_the_program() -> None:
    mm = graph(["param.w"], ["out.y"], lambda call, w: [call(aten.mm.default, w, w)])
    program = one_rank({"mm": mm}, [("mm", 0)], outputs=(OutputSpec("out.y", (2, 2), torch.float32),))

    def body(rank: int, world: World) -> StepResult:
        with torch.autocast("cpu", torch.bfloat16):
            return Executor(program, world.communicator(program.mesh, 0), "cpu").run({"param.w": torch.eye(2)}, {}, 0)

    assert run_ranks(1, body)[0].outputs["out.y"].dtype == torch.float32
