"""Graphs as readable Python that runs, and saved programs that run on their own."""

from __future__ import annotations

import ast
import importlib
import operator
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hand_built import aten, graph, pipeline, reference, tensor_parallel, weights, zero
from torch.fx import Graph, GraphModule

from shardwright.passes.ops.collectives import StaticCommunicator, use_communicator
from shardwright.runtime.emit_python import compile_graph, graph_text, program_text
from shardwright.runtime.errors import ShardwrightError
from shardwright.runtime.program import GraphSpec, Mesh, RankProgram
from shardwright.runtime.save import random_tensors, save_program

FORWARD = """\
from math import inf, nan  # noqa: F401

import torch

aten = torch.ops.aten
shardwright = torch.ops.shardwright
device = torch.device('cpu')
constants: dict[str, torch.Tensor] = {}
SHARDWRIGHT_GRAPH = 'forward'


def forward(args: list) -> tuple:
    args.reverse()
    param_w1 = args.pop()  # param.w1
    param_w2 = args.pop()  # param.w2
    input_x = args.pop()  # input.x
    # module first
    # mlp.py:3: h = x @ w1
    mm_default = aten.mm.default(input_x, param_w1); del input_x, param_w1  # tp:V(1)
    # mlp.py:4: r = relu(h)
    relu_default = aten.relu.default(mm_default); del mm_default  # tp:V(1)
    # module second
    # mlp.py:5: y = r @ w2
    mm_default_1 = aten.mm.default(relu_default, param_w2); del param_w2  # tp:P
    all_reduce_default = shardwright.all_reduce.default(mm_default_1, 'tp'); del mm_default_1  # tp:R
    pow_tensor_scalar = aten.pow.Tensor_Scalar(all_reduce_default, 2)
    sum_default = aten.sum.default(pow_tensor_scalar); del pow_tensor_scalar
    return (sum_default, relu_default, all_reduce_default)  # out.loss, saved.r, saved.y
"""


def test_golden_text() -> None:
    assert graph_text(tensor_parallel(0).graphs["forward"], "forward") == FORWARD


def test_facts_beside_each_line() -> None:
    def body(call, x):
        a, b = torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int64)
        pair = call(aten.max.dim, x, 1, val=(a, b), types={"dp": ("V(0)", "R"), "tp": "I"})
        return [call(operator.getitem, pair, 0, val=a)]

    text = graph_text(graph(["input.x"], ["out.y"], body), "g")
    assert "max_dim = aten.max.dim(input_x, 1); del input_x  # (bf16[3, 4], i64[2]) | dp:(V(0), R) tp:I\n" in text
    assert "getitem = max_dim[0]; del max_dim  # bf16[3, 4]\n" in text


def run(spec: GraphSpec, *args: object) -> tuple:
    boxed = list(args)
    result = compile_graph(spec)(boxed)
    assert not boxed, "the arguments are taken out of their list"
    return result


def test_arguments_of_every_kind() -> None:
    """Python's own and torch's values, nested, and names that are no identifiers or clash with what the text uses."""

    def body(call, aten_, torch_):
        full = call(aten.full.default, [2, 3], float("-inf"))
        nan = call(aten.full.default, [2, 3], float("nan"))
        nan.kwargs = {"dtype": torch.float32, "layout": torch.strided, "device": torch.device("cpu"), "pin_memory": False}
        c = call(aten.mul.Scalar, call(aten.full.default, [1], complex(1, -2)), complex(0.0, float("inf")))
        z = call(aten.index.Tensor, aten_, [None, call(aten.arange.default, 2)])
        y = call(aten.cat.default, [call(aten.to.dtype, torch_, torch.float32), z], 1)
        k = call(aten.clone.default, y)
        k.kwargs = {"memory_format": torch.contiguous_format}
        s = call(operator.getitem, k, (slice(None, -1, 2), ...))
        whole = call(aten.sum.dim_IntList, k, None)
        return [full, nan, c, y, s, whole, None]

    spec = graph(["aten", "torch"], [f"out.{i}" for i in range(7)], body)
    for node, name in zip(
        list(spec.graph.graph.nodes), ("aten", "torch", "inf", "device", "class_", "args", "constants"), strict=False
    ):
        node.name = name
    full, nan, c, y, s, whole, none = run(spec, torch.ones(2, 2), torch.ones(2, 1, dtype=torch.int64))
    assert torch.equal(full, torch.full((2, 3), float("-inf")))
    assert nan.isnan().all() and nan.shape == (2, 3)
    assert c.is_complex() and not torch.isfinite(c.real).any()
    assert torch.equal(y, torch.ones(2, 3)) and torch.equal(s, torch.ones(1, 3)) and whole == 6
    assert none is None


def test_tensors_are_made_on_the_device_of_the_program() -> None:
    def body(call, x):
        here = call(aten.full.default, [2], 1.0)
        here.kwargs = {"device": torch.device("cpu")}
        return [call(aten.arange.default, 3), here, call(aten.ones_like.default, x)]

    made = compile_graph(graph(["input.x"], ["out.a", "out.b", "out.c"], body), device="meta")([torch.ones(1, device="meta")])
    assert [x.device.type for x in made] == ["meta"] * 3


def test_inputs_and_values_that_nobody_reads() -> None:
    def body(call, x, unused):
        call(aten.neg.default, x)
        return [call(aten.neg.default, x)]

    assert torch.equal(run(graph(["input.x", "input.unused"], ["out.y"], body), torch.ones(2), None)[0], -torch.ones(2))
    assert run(graph([], [], lambda call: [])) == ()


def test_tensors_that_the_graph_holds() -> None:
    g = Graph()
    g.output((g.call_function(aten.neg.default, (g.get_attr("inner.weight"),)),))
    module = torch.nn.Module()
    module.inner = torch.nn.Linear(2, 1, bias=False)
    spec = GraphSpec(GraphModule(module, g), (), ("out.y",))
    assert "constants['inner.weight']" in graph_text(spec, "g")
    assert torch.equal(run(spec)[0], -module.inner.weight)


def test_what_cannot_be_written_is_refused_by_name() -> None:
    g = Graph()
    node = g.call_method("relu", (g.placeholder("x"),))
    g.output((node,))
    spec = GraphSpec(GraphModule(torch.nn.Module(), g), ("input.x",), ("out.y",))
    with pytest.raises(ShardwrightError, match="node relu is a call_method"):
        compile_graph(spec)
    with pytest.raises(ShardwrightError, match="calls .*set_num_threads.*, which is no op"):
        compile_graph(graph(["input.x"], ["out.y"], lambda call, x: [call(torch.set_num_threads, x)]))
    with pytest.raises(ShardwrightError, match="cannot be written as Python"):
        compile_graph(graph(["input.x"], ["out.y"], lambda call, x: [call(aten.add.Tensor, x, range(3))]))
    with pytest.raises(ShardwrightError, match="1 outputs was given 2 output keys"):
        compile_graph(graph(["input.x"], ["out.y", "out.z"], lambda call, x: [x]))
    with pytest.raises(ShardwrightError, match="more placeholders than the 0 inputs"):
        compile_graph(GraphSpec(tensor_parallel(0).graphs["backward"].graph, (), ()))


def test_program_text_is_python_that_says_everything() -> None:
    text = program_text(zero(3))
    ast.parse(text)
    assert text.startswith('"""Rank 3 of 4 (dp_replicate 1, dp_shard 1) on the mesh dp_replicate 2 x dp_shard 2: ')
    assert "w1: f64[5, 6], dim 1 over dp_shard" in text
    assert "    run forward [2]\n    run backward [2]\n    all_reduce over dp_replicate: 2 tensors\n" in text
    assert "def forward(args: list) -> tuple:" in text and "def backward(args: list) -> tuple:" in text
    assert "send act.r [1] to rank 1" in pipeline(0).print_readable()


def alone() -> RankProgram:
    return RankProgram(**{**vars(tensor_parallel(0, 1)), "mesh": Mesh((), ()), "graphs": alone_graphs()})


def alone_graphs() -> dict[str, GraphSpec]:
    """The tensor-parallel graphs on one rank: without the collective."""
    graphs = dict(tensor_parallel(0, 1).graphs)
    for node in graphs["forward"].graph.graph.nodes:
        if "all_reduce" in node.name:
            node.replace_all_uses_with(node.args[0])
            graphs["forward"].graph.graph.erase_node(node)
            break
    return graphs


def python(*command: str, cwd: Path, **environment: str) -> subprocess.Popen:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    clean |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_saved_program_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script, without the project; and imported as a package into a process that has the project too."""
    program = alone()
    working, inputs = random_tensors(program, "cpu")
    w1, w2, x = working["param.w1"], working["param.w2"], inputs["input.x"]
    loss, g1, g2 = reference(w1, w2, x)
    program.save(tmp_path / "saved program")
    script = (
        "import sys, runpy; runpy.run_path('run.py', run_name='__main__'); assert not any('shardwright' == m for m in sys.modules)"
    )
    process = python("-c", script, cwd=tmp_path / "saved program")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"out.loss = {float(loss):.6g}" in out and "2 gradients" in out

    program.save(tmp_path / "saved_program")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = importlib.import_module("saved_program.run").main(tmp_path / "saved_program")
    torch.testing.assert_close(found.gradients["grad.param.w1"], g1)
    torch.testing.assert_close(found.gradients["grad.param.w2"], g2)
    graph_file = importlib.import_module("saved_program.rank_0.forward")
    torch.testing.assert_close(graph_file.forward([w1, w2, x])[0], loss)


def test_saved_files_import_torch_alone(tmp_path: Path) -> None:
    save_program(tensor_parallel(1), tmp_path)
    for path in tmp_path.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in ("torch", "support") or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_saved_programs_of_two_ranks_run_together(tmp_path: Path) -> None:
    for rank in range(2):
        save_program(pipeline(rank), tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [python("run.py", cwd=tmp_path, RANK=str(rank), **facts) for rank in range(2)]
    texts = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    losses = {line for out, _ in texts for line in out.splitlines() if "out.loss" in line}
    assert len(losses) == 1
    working = {**random_tensors(pipeline(0), "cpu")[0], **random_tensors(pipeline(1), "cpu")[0]}
    x = random_tensors(pipeline(0), "cpu")[1]["input.x"]
    assert f"out.loss = {float(reference(working['param.w1'], working['param.w2'], x)[0]):.6g}" in losses.pop()

    process = python("run.py", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "this is a program for 2 ranks: run `torchrun --nproc-per-node 2" in err


def test_overhead_is_that_of_plain_calls() -> None:
    """The function adds no more than a few bytecodes to each op: no dictionaries, no interpreter of nodes."""
    w1, w2, x = weights()
    function = compile_graph(tensor_parallel(0).graphs["backward"], "backward")
    names = function.__code__.co_names
    assert set(names) <= {"args", "reverse", "pop", "aten", "mul", "Tensor", "t", "mm", "default", "threshold_backward"}
    with use_communicator(StaticCommunicator({"tp": 1}, {"tp": 0})):
        y = (x @ w1).relu() @ w2
        grads = function([w2, x, (x @ w1).relu(), y])
    torch.testing.assert_close(grads[0], reference(w1, w2, x)[1])
