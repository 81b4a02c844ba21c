"""A program as a folder of Python files that import torch alone, run on their own, and are meant to be read.

DIRECTORY/
    run.py              runs the program of its rank with random tensors, under torchrun or alone
    rank_0/             one folder for each rank that was saved
        forward.py ...  its graphs, one file each
        program.json    its mesh, schedule and tensors, as data
        constants.pt    tensors that the graphs hold, if any
    support/            the ops and the runtime, as they are in shardwright
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Graph, GraphModule

from ..passes.ops.collectives import NAMESPACE
from .communicator import ProcessGroupCommunicator
from .emit_python import GraphFunction, graph_constants, graph_text, identifier
from .errors import ShardwrightError
from .executor import Executor, StepResult
from .program import Cut, GraphSpec, InputSpec, Instruction, Key, Mesh, OutputSpec, RankProgram, TensorSpec
from .steps import MICROBATCH, part_of, working_shape

_ROOTS = ("runtime/save.py", "passes/ops/__init__.py")

_RUN = '''"""Run this program with random tensors: `python run.py`, or `torchrun --nproc-per-node N run.py` for a mesh of N ranks.

Read `rank_*/program.json` for the schedule, and the other files beside it for the graphs that it runs.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __package__:
    from .support.runtime.save import main
else:
    sys.path.insert(0, str(HERE))
    from support.runtime.save import main

if __name__ == "__main__":
    main(HERE)
'''


def save_program(program: RankProgram, directory: Path) -> None:
    """Write a rank's program. Several ranks may be saved in one directory, at the same time."""
    namespace = f"{NAMESPACE}_{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]}"
    _write(directory / "__init__.py", "")
    _write(directory / "run.py", _RUN)
    for path, text in _support(Path(__file__).resolve().parents[1], namespace).items():
        _write(directory / "support" / path, text)
    folder = directory / f"rank_{program.rank}"
    _write(folder / "__init__.py", '"""Defines the ops that the graphs use."""\n\nfrom ..support.passes import ops  # noqa: F401\n')
    for name, spec in program.graphs.items():
        _write(folder / f"{identifier(name)}.py", graph_text(spec, name, namespaces={NAMESPACE: namespace}))
    _write(folder / "program.json", json.dumps(_to_data(program), indent=1) + "\n")
    tensors = {name: graph_constants(spec.graph) for name, spec in program.graphs.items()}
    tensors["constants"] = dict(program.constants)
    if any(tensors.values()):
        torch.save(tensors, folder / "constants.pt")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: ranks write the same files at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _support(root: Path, namespace: str) -> dict[str, str]:
    """The sources that `_ROOTS` need, by path below `root`: they import each other relatively, so they run as they are.

    Only the op namespace is renamed, so that a saved program and the installed package can live in one process.
    """
    found: dict[str, str] = {"__init__.py": "", "passes/__init__.py": "", "runtime/__init__.py": ""}
    waiting = list(_ROOTS)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        text = (root / path).read_text(encoding="utf-8")
        waiting += _imports(root, path, text)
        found[path] = text.replace(f'NAMESPACE = "{NAMESPACE}"', f'NAMESPACE = "{namespace}"')
    return found


def _imports(root: Path, path: str, text: str) -> list[str]:
    """The project's own files that a file imports."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = Path(path).parents[node.level - 1] / (node.module or "").replace(".", "/")
        candidates = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
        found += [str(c) for c in candidates if (root / c).is_file()]
        if (root / base / "__init__.py").is_file():
            found.append(str(base / "__init__.py"))
    return found


def _to_data(program: RankProgram) -> dict[str, Any]:
    """The program as plain JSON values; graphs by the names of their files."""
    data = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
    data["graphs"] = {
        name: {"file": f"{identifier(name)}.py", "inputs": spec.inputs, "outputs": spec.outputs}
        for name, spec in program.graphs.items()
    }
    data["constants"] = sorted(program.constants)
    return _plain(data)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ShardwrightError(f"{name!r} in program.json is no dtype")
    return found


def _cuts(data: Iterable[dict[str, Any]]) -> tuple[Cut, ...]:
    return tuple(Cut(cut["axis"], cut["dim"], _frozen(cut["sections"])) for cut in data)


def _spec(kind: type, data: dict[str, Any]) -> Any:
    """An InputSpec, OutputSpec or TensorSpec."""
    known = {key: _frozen(value) for key, value in data.items()}
    return kind(**{**known, "dtype": _dtype(data["dtype"]), "cuts": _cuts(data["cuts"])})


def load_program(directory: Path, rank: int, device: torch.device | str) -> tuple[RankProgram, dict[str, GraphFunction]]:
    """A saved rank's program, its graphs left empty, and their functions. Raises ShardwrightError where it was not saved."""
    folder = directory / f"rank_{rank}"
    if not (folder / "program.json").is_file():
        saved = ", ".join(sorted(path.name for path in directory.glob("rank_*"))) or "none"
        raise ShardwrightError(f"{directory} holds no program of rank {rank} (there: {saved}): save it on that rank too")
    data = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    path = folder / "constants.pt"
    tensors = torch.load(path, weights_only=True, map_location=device) if path.is_file() else {}
    functions, graphs = {}, {}
    for name, facts in data["graphs"].items():
        functions[name] = _load_graph(folder / facts["file"], tensors.get(name, {}), device)
        graphs[name] = GraphSpec(GraphModule(torch.nn.Module(), Graph()), tuple(facts["inputs"]), tuple(facts["outputs"]))
    program = RankProgram(
        rank=data["rank"],
        mesh=Mesh(_frozen(data["mesh"]["axes"]), _frozen(data["mesh"]["sizes"])),
        microbatches=data["microbatches"],
        graphs=graphs,
        schedule=tuple(Instruction(**{key: _frozen(value) for key, value in item.items()}) for item in data["schedule"]),
        parameters=tuple(_spec(TensorSpec, item) for item in data["parameters"]),
        buffers=tuple(_spec(TensorSpec, item) for item in data["buffers"]),
        inputs=tuple(_spec(InputSpec, item) for item in data["inputs"]),
        outputs=tuple(_spec(OutputSpec, item) for item in data["outputs"]),
        transfers={key: (_frozen(shape), _dtype(dtype)) for key, (shape, dtype) in data["transfers"].items()},
        constants=tensors.get("constants", {}),
        training=data["training"],
    )
    return program, functions


def _load_graph(path: Path, constants: Mapping[str, Tensor], device: torch.device | str) -> GraphFunction:
    spec = importlib.util.spec_from_file_location(f"shardwright_saved_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["device"] = torch.device(device)
    vars(module)["constants"].update(constants)
    return module.forward


def random_tensors(program: RankProgram, device: torch.device | str) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """(parameters and buffers, inputs) of the right shapes, the same on every rank: integers are 0 or 1, so that they index."""

    def make(key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if dtype.is_floating_point or dtype.is_complex:
            scale = 1 / math.sqrt(max(shape[-1:], default=1) or 1)
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)
        return torch.randint(0, 2, shape, generator=generator).to(device, dtype)

    working = {}
    for prefix, specs in (("param", program.parameters), ("buffer", program.buffers)):
        for spec in specs:
            value = make(spec.name, working_shape(program, spec), spec.dtype)
            working.update({f"{prefix}.{name}": value for name in (spec.name, *spec.aliases)})
    inputs = {}
    for item in program.inputs:
        cuts = [cut for cut in item.cuts if cut.axis != MICROBATCH]
        inputs[item.key] = make(item.key, part_of(program, item.shape, cuts), item.dtype)
    return working, inputs


def main(directory: Path) -> StepResult:
    """Run one step of the program saved for this process's rank, and print what came out."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    program, functions = load_program(directory, rank, device)
    if program.mesh.world_size != world:
        size = program.mesh.world_size
        raise ShardwrightError(f"this is a program for {size} ranks: run `torchrun --nproc-per-node {size} {directory / 'run.py'}`")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        communicator = ProcessGroupCommunicator(program.mesh, rank, device)
        working, inputs = random_tensors(program, device)
        executor = Executor(
            program, communicator, device, functions=functions, gather=lambda i: {key: working[key] for key in i.keys}
        )
        start = time.perf_counter()
        result = executor.run(working, inputs, seed=0)
        print(_summary(program, result, time.perf_counter() - start), flush=True)
    finally:
        if world > 1:
            dist.destroy_process_group()
    return result


def _summary(program: RankProgram, result: StepResult, seconds: float) -> str:
    lines = [f"rank {program.rank}: {len(program.schedule)} instructions in {seconds:.3f} s"]
    for key, value in result.outputs.items():
        what = f"{value.item():.6g}" if value.numel() == 1 else f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        lines.append(f"  {key} = {what}")
    if result.gradients:
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in result.gradients.values()))
        lines.append(f"  {len(result.gradients)} gradients, norm {norm:.6g}")
    return "\n".join(lines)
