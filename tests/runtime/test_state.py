from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from state_cases import MESHES, Tied, make, moved
from torch import Tensor

from shardwright.runtime.errors import ShardwrightError
from shardwright.runtime.lockstep import run_ranks
from shardwright.runtime.parameters import ParameterStore
from shardwright.runtime.program import Cut, Mesh
from shardwright.runtime.sharded import Layout, ShardedTensor, full_tensor
from shardwright.runtime.state import is_plain, load_state_dict, parameter_names, state_dict

HERE = Path(__file__).parent
NAMES = sorted(MESHES)


def on_ranks(name: str, fn: Any) -> list[Any]:
    mesh = MESHES[name]
    return run_ranks(mesh.world_size, lambda rank, world: fn(make(name, world.communicator(mesh, rank)), rank))


def equal(found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(full_tensor(found[key]), value) and found[key].dtype == value.dtype, key


@pytest.mark.parametrize("name", NAMES)
def test_full(name: str) -> None:
    """Whole tensors in the model's order under all its names, tied ones one tensor; on rank 0 alone, or on every rank."""
    expected = Tied().state_dict()

    def run(store: ParameterStore, rank: int) -> None:
        options = {"full": True, "cpu_offload": True}
        alone = state_dict(store, Tied(), rank0_only=True, **options)
        equal(alone, expected if rank == 0 else {})
        everywhere = state_dict(store, Tied(), rank0_only=False, **options)
        equal(everywhere, expected)
        assert everywhere["head.weight"] is everywhere["embed.weight"]

    on_ranks(name, run)


@pytest.mark.parametrize("name", NAMES)
def test_sharded_in_one_process(name: str) -> None:
    expected = Tied().state_dict()

    def run(store: ParameterStore, rank: int) -> None:
        found = state_dict(store, Tied(), full=False, rank0_only=True, cpu_offload=False)
        held = [k for k in expected if ("head.weight" if k == "embed.weight" else k) in {**store.slots, **store.buffers}]
        assert list(found) == [k for k in expected if k in found] and len(found) >= len(held) > 0
        if name != "pipeline":
            assert list(found) == list(expected)
        equal(found, {k: expected[k] for k in found})
        assert any(isinstance(x, ShardedTensor) for x in found.values()) == (name != "data")

    on_ranks(name, run)


@pytest.mark.parametrize("kind", ["plain", "own", "rows_only"])
@pytest.mark.parametrize("name", NAMES)
def test_load(name: str, kind: str) -> None:
    other = moved(Tied())

    def run(store: ParameterStore, rank: int) -> None:
        if kind == "own":
            source = make(name, store.communicator, other)
            found: Any = state_dict(source, Tied(), full=False, rank0_only=True, cpu_offload=False)
        else:
            found = dict(other.state_dict())
        if kind == "rows_only":
            found = {"rows.weight": found["rows.weight"]}
        result = load_state_dict(store, Tied(), found, strict=kind != "rows_only")
        assert not result.unexpected_keys
        assert bool(result.missing_keys) == (kind == "rows_only")
        expected = dict(other.state_dict()) if kind != "rows_only" else {**Tied().state_dict(), **found}
        equal(state_dict(store, Tied(), full=True, rank0_only=False, cpu_offload=False), expected)
        store.refresh(store.dirty)

    on_ranks(name, run)


@pytest.mark.parametrize("name", NAMES)
def test_refused_on_every_rank(name: str) -> None:
    good = Tied().state_dict()

    def run(store: ParameterStore, rank: int) -> list[str]:
        messages = []
        bad = {
            "unexpected": {**good, "extra": torch.zeros(1)},
            "missing": {k: v for k, v in good.items() if k != "rows.weight"},
            "shape": {**good, "rows.weight": torch.zeros(2, 2)},
        }
        for state in bad.values():
            with pytest.raises(RuntimeError) as error:
                load_state_dict(store, Tied(), state, strict=True)
            messages.append(str(error.value))
        equal(state_dict(store, Tied(), full=True, rank0_only=False, cpu_offload=False), good)
        return messages

    for unexpected, missing, shape in on_ranks(name, run):
        assert "Error(s) in loading state_dict for Tied" in unexpected and "Unexpected key(s) in state_dict: 'extra'" in unexpected
        assert "Missing key(s) in state_dict: 'rows.weight'" in missing
        assert "size mismatch for rows.weight" in shape and "torch.Size([2, 2])" in shape


def test_names_follow_the_models_order() -> None:
    names = list(parameter_names(Tied()))
    assert [k for k, persistent in names if persistent] == list(Tied().state_dict())
    assert ("positions", False) in names and ("head.weight", True) in names


def test_a_dtensor_needs_a_process_group() -> None:
    layout = Layout(Mesh(("dp",), (2,)), 0, (Cut("dp", 0, ((1, 1),)),))
    with pytest.raises(ShardwrightError, match="process group"):
        ShardedTensor(torch.zeros(1, 3), layout, (2, 3)).to_dtensor()


def test_which_layouts_dtensor_can_hold() -> None:
    mesh = Mesh(("dp", "tp"), (2, 4))

    def plain(*cuts: Cut) -> bool:
        return is_plain(Layout(mesh, 0, cuts))

    assert plain() and plain(Cut("tp", 0, ((2, 2, 2, 2),))) and plain(Cut("tp", 1, ((3, 3, 3, 1),)))
    assert not plain(Cut("tp", 0, ((3, 3, 2, 2),)))
    assert not plain(Cut("tp", 0, ((1, 1, 1, 1), (1, 1, 1, 1))))
    assert plain(Cut("dp", 0, ((4, 4),)), Cut("tp", 0, ((1, 1, 1, 1),)))
    assert not plain(Cut("tp", 0, ((2, 2, 2, 2),)), Cut("dp", 0, ((1, 1),)))
    assert plain(Cut("tp", 1, ((2, 2, 2, 2),)), Cut("dp", 0, ((2, 1),)))
    assert plain(Cut("dp+tp", 0, ((1,) * 8,))) and not plain(Cut("dp+tp", 0, ((1,) * 7 + (0,),)))


# --- over processes -------------------------------------------------------------------------------------------------


over_processes = pytest.mark.xdist_group("state over processes")  # all in one, which starts them


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of the four processes of `state_worker`."""
    folder = tmp_path_factory.mktemp("state")
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "state_worker.py")]
    started = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stdout=-1, stderr=-1, text=True) for rank in range(4)
    ]
    try:
        texts = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


@over_processes
@pytest.mark.parametrize("what", [f"{name} is right" for name in NAMES] + ["ranks that differ are named"])
def test_over_processes(processes: list[tuple[int, str, str]], what: str) -> None:
    """DTensors under the model's names, saved and loaded by torch.distributed.checkpoint."""
    for _, out, err in processes:
        assert what in out, err[-3000:]


@over_processes
def test_an_exception_on_one_rank_is_quoted_by_the_others(processes: list[tuple[int, str, str]]) -> None:
    for rank, (status, _, err) in enumerate(processes):
        assert status == 1, err
        if rank == 2:
            assert "ValueError: the user's code\nfailed" in re.sub(r"^\[rank\d\]: ?", "", err, flags=re.MULTILINE)
        else:
            assert re.search(r"A peer said: rank 2: ValueError: the user's code failed at .*state_worker\.py:\d+", err), err
