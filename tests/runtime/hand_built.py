"""Programs built node by node, without the compiler, for the tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from shardwright.passes.ops.collectives import ops
from shardwright.passes.types import Partial, Replicate, Varying
from shardwright.runtime.program import Cut, GraphSpec, InputSpec, Instruction, Mesh, OutputSpec, RankProgram, TensorSpec

aten = torch.ops.aten
F64 = torch.float64


def graph(inputs: Sequence[str], outputs: Sequence[str], body: Callable[..., Sequence[Node | None]]) -> GraphSpec:
    """A graph over keys: `body(call, *placeholders)` gives the output nodes; `call(op, *args, **meta)` adds a node."""
    g = Graph()
    places = [g.placeholder(key.replace(".", "_")) for key in inputs]

    def call(op: Callable, *args: Any, **meta: object) -> Node:
        node = g.call_function(op, args)
        node.meta.update(meta)
        return node

    g.output(tuple(body(call, *places)))
    return GraphSpec(GraphModule(torch.nn.Module(), g), tuple(inputs), tuple(outputs))


def one_rank(graphs: dict, schedule: list[tuple[str, int]], microbatches: int = 1, **parts) -> RankProgram:
    """A program without peers: `schedule` names (graph, micro-batch)."""
    facts = {"parameters": (), "buffers": (), "inputs": (), "outputs": (), **parts}
    return RankProgram(
        rank=0,
        mesh=Mesh((), ()),
        microbatches=microbatches,
        graphs=graphs,
        schedule=tuple(Instruction("run", graph=name, microbatch=m) for name, m in schedule),
        **facts,
    )


def sections(*lengths: int) -> tuple[tuple[int, ...], ...]:
    return (tuple(lengths),)


def mlp_loss(w1: torch.Tensor, w2: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What every program here computes: the sum of squares of a two-layer MLP's output."""
    return ((x @ w1).relu() @ w2).pow(2).sum()


def reference(w1: torch.Tensor, w2: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients on one device."""
    w1, w2 = w1.detach().clone().requires_grad_(), w2.detach().clone().requires_grad_()
    loss = mlp_loss(w1, w2, x)
    g1, g2 = torch.autograd.grad(loss, (w1, w2))
    return loss.detach(), g1, g2


def weights(hidden: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w1 [5, hidden], w2 [hidden, 4], x [7, 5]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    return random(5, hidden), random(hidden, 4), random(7, 5)


def _forward(axis: str) -> GraphSpec:
    def body(call: Callable, w1: Node, w2: Node, x: Node) -> list[Node]:
        h = call(aten.mm.default, x, w1, source="mlp.py:3: h = x @ w1", module="first", types={axis: Varying(1, sections(3, 3))})
        r = call(aten.relu.default, h, source="mlp.py:4: r = relu(h)", types={axis: Varying(1, sections(3, 3))})
        y = call(aten.mm.default, r, w2, source="mlp.py:5: y = r @ w2", module="second", types={axis: Partial()})
        if axis:
            y = call(ops.all_reduce.default, y, axis, types={axis: Replicate()})
        return [call(aten.sum.default, call(aten.pow.Tensor_Scalar, y, 2)), r, y]

    return graph(["param.w1", "param.w2", "input.x"], ["out.loss", "saved.r", "saved.y"], body)


def _backward() -> GraphSpec:
    def body(call: Callable, w2: Node, x: Node, r: Node, y: Node) -> list[Node]:
        dy = call(aten.mul.Tensor, y, 2)
        dw2 = call(aten.mm.default, call(aten.t.default, r), dy)
        dr = call(aten.mm.default, dy, call(aten.t.default, w2))
        dh = call(aten.threshold_backward.default, dr, r, 0)
        return [call(aten.mm.default, call(aten.t.default, x), dh), dw2]

    return graph(["param.w2", "input.x", "saved.r", "saved.y"], ["grad.param.w1", "grad.param.w2"], body)


def tensor_parallel(rank: int, size: int = 2, hidden: int = 6) -> RankProgram:
    """Column then row parallel over `tp`, whole batch on every rank."""
    cut = hidden // size
    mesh = Mesh(("tp",), (size,))
    return RankProgram(
        rank=rank,
        mesh=mesh,
        microbatches=1,
        graphs={"forward": _forward("tp"), "backward": _backward()},
        schedule=(Instruction("run", graph="forward"), Instruction("run", graph="backward")),
        parameters=(
            TensorSpec("w1", (5, hidden), F64, (Cut("tp", 1, sections(*[cut] * size)),)),
            TensorSpec("w2", (hidden, 4), F64, (Cut("tp", 0, sections(*[cut] * size)),)),
        ),
        buffers=(),
        inputs=(InputSpec("input.x", (7, 5), F64),),
        outputs=(OutputSpec("out.loss", (), F64),),
    )


def zero(rank: int, level: int = 2) -> RankProgram:
    """Data parallel on 4 ranks (2 `dp_replicate` x 2 `dp_shard`), 3 uneven micro-batches of 7 rows each, uneven shards.

    Level 2: working parameters are whole, gradients all-reduced over one axis and scattered over the other.
    """
    mesh = Mesh(("dp_replicate", "dp_shard"), (2, 2))
    mb = Cut("mb", 0, sections(3, 3, 1))
    forward, backward = _forward(""), _backward()
    runs = [Instruction("run", graph=name, microbatch=m) for m in range(3) for name in ("forward", "backward")]
    grads = ("grad.param.w1", "grad.param.w2")
    return RankProgram(
        rank=rank,
        mesh=mesh,
        microbatches=3,
        graphs={"forward": forward, "backward": backward},
        schedule=(
            *runs,
            Instruction("all_reduce", grads, axis="dp_replicate"),
            Instruction("reduce_scatter", grads, axis="dp_shard"),
            Instruction("all_reduce", ("out.loss",), axis="dp_replicate+dp_shard"),
        ),
        parameters=(
            TensorSpec("w1", (5, 6), F64, (Cut("dp_shard", 1, ((2, 1), (1, 2))),), ("dp_shard",), ("dp_replicate",)),
            TensorSpec("w2", (6, 4), F64, (Cut("dp_shard", 0, sections(4, 2)),), ("dp_shard",), ("dp_replicate",)),
        ),
        buffers=(),
        inputs=(InputSpec("input.x", (7, 5), F64, (mb,)),),
        outputs=(OutputSpec("out.loss", (), F64, (), 0, "sum"),),
    )


def pipeline(rank: int) -> RankProgram:
    """Two stages over `pp`, 3 micro-batches of 7 rows, 1F1B: sends cross. The loss is broadcast to both."""
    mesh = Mesh(("pp",), (2,))
    shapes = {f"act.r[{m}]": ((n, 6), F64) for m, n in enumerate((3, 3, 1))}
    shapes |= {f"grad.act.r[{m}]": ((n, 6), F64) for m, n in enumerate((3, 3, 1))}

    def first(call: Callable, w1: Node, x: Node) -> list[Node]:
        return [call(aten.relu.default, call(aten.mm.default, x, w1))]

    def first_back(call: Callable, x: Node, r: Node, dr: Node) -> list[Node]:
        return [call(aten.mm.default, call(aten.t.default, x), call(aten.threshold_backward.default, dr, r, 0))]

    def second(call: Callable, w2: Node, r: Node) -> list[Node]:
        y = call(aten.mm.default, r, w2)
        return [call(aten.sum.default, call(aten.pow.Tensor_Scalar, y, 2)), y, y]

    def second_back(call: Callable, w2: Node, r: Node, y: Node) -> list[Node]:
        dy = call(aten.mul.Tensor, y, 2)
        return [call(aten.mm.default, call(aten.t.default, r), dy), call(aten.mm.default, dy, call(aten.t.default, w2))]

    def step(kind: str, name: str, m: int) -> Instruction:
        if kind == "run":
            return Instruction("run", graph=name, microbatch=m)
        return Instruction("send" if kind == "send" else "receive", (name,), microbatch=m, peer=1 - rank)

    end = (Instruction("broadcast", ("out.loss",), axis="pp", peer=1),)
    if rank == 0:
        graphs = {
            "stage0.forward": graph(["param.w1", "input.x"], ["act.r"], first),
            "stage0.backward": graph(["input.x", "act.r", "grad.act.r"], ["grad.param.w1"], first_back),
        }
        order = "F0 F1 B0 F2 B1 B2"
        steps = {
            "F": lambda m: [step("run", "stage0.forward", m), step("send", "act.r", m)],
            "B": lambda m: [step("receive", "grad.act.r", m), step("run", "stage0.backward", m)],
        }
    else:
        graphs = {
            "stage1.forward": graph(["param.w2", "act.r"], ["out.loss", "out.y", "saved.y"], second),
            "stage1.backward": graph(["param.w2", "act.r", "saved.y"], ["grad.param.w2", "grad.act.r"], second_back),
        }
        order = "F0 B0 F1 B1 F2 B2"
        steps = {
            "F": lambda m: [step("receive", "act.r", m), step("run", "stage1.forward", m)],
            "B": lambda m: [step("run", "stage1.backward", m), step("send", "grad.act.r", m)],
        }
    mb = Cut("mb", 0, sections(3, 3, 1))
    return RankProgram(
        rank=rank,
        mesh=mesh,
        microbatches=3,
        graphs=graphs,
        schedule=(*(i for word in order.split() for i in steps[word[0]](int(word[1]))), *end),
        parameters=(TensorSpec("w1", (5, 6), F64) if rank == 0 else TensorSpec("w2", (6, 4), F64),),
        buffers=(),
        inputs=(InputSpec("input.x", (7, 5), F64, (mb,)),),
        outputs=(
            OutputSpec("out.loss", (), F64, (), 1, "sum"),
            OutputSpec("out.y", (7, 4), F64, (mb,), 1, "cat"),
        ),
        transfers=shapes,
    )
