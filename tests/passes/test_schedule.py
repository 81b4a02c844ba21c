import dataclasses
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from shardwright.passes.check_schedules import check_schedules
from shardwright.passes.ops.collectives import ops
from shardwright.passes.schedule import ORDERS, Part, Transfer, build_schedule, forward_only, gpipe, in_flight, one_f_one_b
from shardwright.passes.types import I, Varying
from shardwright.runtime.errors import DeadlockError, MismatchError
from shardwright.runtime.program import GraphSpec, InputSpec, Instruction, Mesh, RankProgram, TensorSpec

F32 = torch.float32


def test_orders_are_the_published_ones():
    assert gpipe(2, 2, 0) == [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)]
    # Narayanan et al. 2021, figure 4 (top), with 4 stages and 8 micro-batches: warm-up of 3, 2, 1, 0
    letters = ["".join(phase[0] for phase, _ in one_f_one_b(4, 8, s)) for s in range(4)]
    assert letters == ["fff" + "fb" * 5 + "bbb", "ff" + "fb" * 6 + "bb", "f" + "fb" * 7 + "b", "fb" * 8]
    assert forward_only(3, 2, 1) == [("forward", 0), ("forward", 1)]
    with pytest.raises(ValueError, match="no stage 4 of 4"):
        gpipe(4, 1, 4)


@given(st.sampled_from(sorted(ORDERS)), st.integers(1, 6), st.integers(1, 9), st.data())
def test_orders_run_everything_once_and_forward_first(name, stages, microbatches, data):
    stage = data.draw(st.integers(0, stages - 1))
    order = ORDERS[name](stages, microbatches, stage)
    assert sorted(order) == sorted((p, m) for p in ("forward", "backward") for m in range(microbatches))
    assert all(order.index(("forward", m)) < order.index(("backward", m)) for m in range(microbatches))
    assert in_flight(order) == (microbatches if name == "gpipe" else min(stages - stage, microbatches))


def graph(inputs, outputs, collectives=()):
    """A graph of which only keys and communication matter. collectives: (op, args after x, shape of x)."""
    g = fx.Graph()
    nodes = [g.placeholder(f"a{i}") for i in range(len(inputs))]
    x = nodes[0] if nodes else g.call_function(torch.zeros, (2,))
    x.meta["val"] = torch.empty(2)
    for op, args, shape in collectives:
        x.meta["val"] = torch.empty(shape)
        x = g.call_function(op, (x, *args))
        x.meta["val"] = torch.empty(shape)
    x.meta["val"] = torch.empty(2, 3)
    g.output(tuple(x for _ in outputs))
    return GraphSpec(fx.GraphModule(torch.nn.Module(), g), tuple(inputs), tuple(outputs))


REDUCE = (ops.all_reduce.default, ("tp",), (2, 3))


def pipeline(schedule, stages, microbatches, tp=1, training=True):
    """Programs of a model whose stage s hands act.s on, with the collectives of tensor parallelism inside."""
    mesh = Mesh(("pp", "tp"), (stages, tp))
    weight = TensorSpec("w", (3, 3), F32)
    programs = []
    for rank in range(mesh.world_size):
        place = mesh.coordinates(rank)
        s = place["pp"]
        before, after = (mesh.rank({**place, "pp": p}) for p in ((s - 1) % stages, (s + 1) % stages))
        first, last = s == 0, s == stages - 1
        graphs = {
            "forward": graph(
                ["param.w", "input.x" if first else f"act.{s - 1}"], ["out.0" if last else f"act.{s}", f"saved.{s}"], [REDUCE] * 2
            ),
            "backward": graph(
                ["param.w", f"saved.{s}"] + ([] if last else [f"grad.act.{s}"]),
                ["grad.param.w"] + ([] if first else [f"grad.act.{s - 1}"]),
                [REDUCE],
            ),
        }
        parts = {
            "forward": Part(
                "forward",
                () if first else (Transfer((f"act.{s - 1}",), before),),
                () if last else (Transfer((f"act.{s}",), after),),
            ),
            "backward": Part(
                "backward",
                () if last else (Transfer((f"grad.act.{s}",), after),),
                () if first else (Transfer((f"grad.act.{s - 1}",), before),),
            ),
        }
        if not training:
            del parts["backward"]
        transfers = {key: ((2, 3), F32) for t in range(stages) for key in (f"act.{t}", f"grad.act.{t}")}
        finish = [Instruction("all_reduce", ("grad.param.w",), axis="tp")] if training else []
        order = schedule(stages, microbatches, s)
        programs.append(
            RankProgram(
                rank,
                mesh,
                microbatches,
                graphs,
                build_schedule(order, parts, finish=finish),
                (weight,),
                (),
                (InputSpec("input.x", (2, 3), F32),),
                (),
                transfers,
            )
        )
    return programs


def changed(programs, rank, **fields):
    return [dataclasses.replace(p, **fields) if p.rank == rank else p for p in programs]


def edit(programs, rank, function):
    schedule = list(programs[rank].schedule)
    function(schedule)
    return changed(programs, rank, schedule=tuple(schedule))


@given(st.sampled_from([gpipe, one_f_one_b, forward_only]), st.integers(1, 5), st.integers(1, 6), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_generated_schedules_are_safe(schedule, stages, microbatches, tp):
    check_schedules(pipeline(schedule, stages, microbatches, tp, training=schedule is not forward_only))


def test_receives_stand_before_the_use_and_sends_after_the_making():
    program = pipeline(one_f_one_b, 2, 2)[0]
    assert [str(i) for i in program.schedule] == [
        "run forward [0]",
        "send act.0 [0] to rank 1",
        "run forward [1]",
        "send act.0 [1] to rank 1",
        "receive grad.act.0 [0] from rank 1",
        "run backward [0]",
        "receive grad.act.0 [1] from rank 1",
        "run backward [1]",
        "all_reduce over tp: 1 tensors",
    ]


def swap(i, j):
    def function(schedule):
        schedule[i], schedule[j] = schedule[j], schedule[i]

    return function


def find(program, text):
    return next(i for i, instruction in enumerate(program.schedule) if str(instruction).startswith(text))


def test_refuses_a_missing_send_and_a_missing_receive():
    programs = pipeline(gpipe, 2, 2)
    at = find(programs[0], "send act.0 [1]")
    with pytest.raises(DeadlockError, match=r"rank 0 waits in 'receive grad.act.0 \[0\] from rank 1' for rank 1; rank 1 waits"):
        check_schedules(edit(pipeline(gpipe, 2, 2), 0, lambda s: s.pop(at)))
    programs = pipeline(forward_only, 2, 2, training=False)
    with pytest.raises(MismatchError, match=r"rank 0: 'send act.0 \[1\] to rank 1' is never received"):
        check_schedules(edit(programs, 1, lambda s: s.__delitem__(slice(2, 4))))


def test_refuses_transfers_that_differ():
    programs = pipeline(gpipe, 2, 2)
    sends = [find(programs[0], f"send act.0 [{m}]") for m in (0, 1)]
    with pytest.raises(MismatchError, match=r"rank 1: 'receive act.0 \[0\] from rank 0' meets 'send act.0 \[1\] to rank 1'"):
        check_schedules(edit(programs, 0, lambda s: (swap(0, 2)(s), swap(*sends)(s))))
    smaller = {**programs[1].transfers, "act.0": ((2, 2), F32)}
    with pytest.raises(MismatchError, match=r"rank 1: 'receive act.0 \[0\] from rank 0' expects .*2, 2.* but rank 0 sends .*2, 3"):
        check_schedules(changed(programs, 1, transfers=smaller))


def test_refuses_keys_that_are_read_before_they_are_made():
    programs = pipeline(gpipe, 2, 2)
    with pytest.raises(MismatchError, match=r"rank 1: 'run forward \[0\]' reads 'act.0', which nothing before it gives"):
        check_schedules(edit(programs, 1, swap(0, 1)))
    sharded = tuple(dataclasses.replace(spec, gathered=("tp",)) for spec in programs[0].parameters)
    with pytest.raises(MismatchError, match=r"reads 'param.w' before it is gathered"):
        check_schedules(changed(programs, 0, parameters=sharded))


def test_refuses_collectives_in_different_orders():
    programs = pipeline(gpipe, 1, 1, tp=2)
    other = graph(["param.w", "input.x"], ["out.0", "saved.0"], [REDUCE, (ops.all_gather.default, ("tp", 0, []), (2, 3))])
    with pytest.raises(
        MismatchError, match=r"ranks 0 and 1 meet in different collectives over 'tp': 'run forward \[0\]', .*all_reduce"
    ):
        check_schedules(changed(programs, 1, graphs={**programs[1].graphs, "forward": other}))
    fewer = graph(["param.w", "input.x"], ["out.0", "saved.0"], [REDUCE])
    with pytest.raises((MismatchError, DeadlockError)):
        check_schedules(changed(programs, 1, graphs={**programs[1].graphs, "forward": fewer}))
    with pytest.raises(DeadlockError, match=r"rank 0 waits in 'all_reduce over tp: 1 tensors' for rank 1; rank 1 has nothing left"):
        check_schedules(edit(programs, 1, lambda s: s.pop()))


def told(**facts):
    """Two ranks' programs alike, but for what the second's graph says of its last collective."""

    def spec(**more):
        made = graph(["param.w", "input.x"], ["out.0", "saved.0"], [REDUCE] * 2)
        reductions = made.graph.graph.find_nodes(op="call_function", target=ops.all_reduce.default)
        for node in reductions:
            node.meta.update(of="x", phase="forward", types={"tp": I, "dp": Varying(1, ((2, 2),))})
        reductions[-1].meta.update(more)
        return made

    programs = pipeline(gpipe, 1, 1, tp=2)
    return [dataclasses.replace(p, graphs={**p.graphs, "forward": spec(**(facts if p.rank else {}))}) for p in programs]


def test_what_ranks_join_is_the_same_part_of_the_same_value():
    check_schedules(told())
    for facts in (
        {"of": "y"},
        {"phase": "backward"},
        {"types": {"tp": I, "dp": Varying(1, ((1, 1), (1, 1)))}},  # every other column, where the peer has the first two
        {"types": {"tp": I, "dp": I}},
    ):
        with pytest.raises(MismatchError, match="ranks 0 and 1 meet in different collectives over 'tp'"):
            check_schedules(told(**facts))


def test_what_is_sent_lies_as_it_is_received():
    def program(sent, received):
        programs = pipeline(gpipe, 2, 2)
        output = programs[0].graphs["forward"].graph.graph.output_node().args[0][0]
        placeholder = programs[1].graphs["forward"].graph.graph.find_nodes(op="placeholder")[1]
        output.meta["types"], placeholder.meta["types"] = sent, received
        return programs

    pairs, columns = {"tp": Varying(1, ((2, 1),))}, {"tp": Varying(1, ((1, 1), (1, 0)))}
    check_schedules(program(pairs, pairs))
    check_schedules(program({}, pairs))
    with pytest.raises(MismatchError, match=r"rank 1: 'receive act.0 \[0\] from rank 0' expects"):
        check_schedules(program(columns, pairs))


def test_refuses_a_circle_of_waits():
    programs = pipeline(forward_only, 2, 1, tp=2, training=False)

    def crossing(first, second):
        return (Instruction("all_reduce", ("grad.param.w",), axis=first), Instruction("all_reduce", ("grad.param.w",), axis=second))

    programs = [
        dataclasses.replace(p, schedule=crossing("tp", "pp") if p.rank in (0, 3) else crossing("pp", "tp")) for p in programs
    ]
    with pytest.raises(DeadlockError, match="ranks wait in a circle: rank 0 waits in .* for rank 1; rank 1 waits"):
        check_schedules(programs)


def test_needs_every_rank():
    with pytest.raises(MismatchError, match="all of the 2 are needed"):
        check_schedules(pipeline(gpipe, 2, 2)[:1])


def test_many_ranks_are_quick():
    programs = pipeline(one_f_one_b, 8, 16, tp=8)
    start = time.perf_counter()
    check_schedules(programs)
    assert time.perf_counter() - start < 20
