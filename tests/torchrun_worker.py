"""What test_torchrun starts, once, with torchrun on four processes: every case in turn, then a peer that dies.

    torchrun --nproc-per-node 4 torchrun_worker.py FOLDER

Rank 0 writes FOLDER/results.json: case -> "" or what went wrong. Each rank writes FOLDER/end.RANK: how the last step ended.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zoo
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrun_cases import CASES, FEATURES, STEPS, Case

from shardwright import Strategy, auto_parallelize
from shardwright.runtime.communicator import ProcessGroupCommunicator

RANK = int(os.environ["RANK"])


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["loss"]


def made(case: Case) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model, batch = zoo.MODELS[case.model](**case.options)
    return model.to(case.dtype), {k: v.to(case.dtype) if v.is_floating_point() else v for k, v in batch.items()}


def train(model: Any, batch: dict[str, Tensor], clip: Callable[[], Tensor]) -> list[list[float]]:
    """Loss and gradient norm of each of STEPS steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    facts = []
    for step in range(STEPS):
        loss = loss_of(model(**{k: v.roll(step, 0) for k, v in batch.items()}))
        loss.backward()
        facts.append([loss.item(), clip().item()])
        optimizer.step()
        optimizer.zero_grad()
    return facts


def check(case: Case) -> None:
    """Losses, norms and the state dict after some steps are those of the eager model."""
    model, batch = made(case)
    plain = copy.deepcopy(model)
    parallel = auto_parallelize(model, example_inputs=batch, strategy=case.strategy, batch="global")
    found = train(parallel, batch, lambda: parallel.clip_grad_norm_(0.5))
    state = parallel.state_dict(full=True)
    if RANK == 0:
        expected = train(plain, batch, lambda: torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
        assert list(state) == list(plain.state_dict())
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def check_sharded_state(case: Case) -> None:
    """state_dict() is of DTensors under the model's names, and goes in again; outputs are DTensors too."""
    model, batch = made(case)
    wanted = {k: v.clone() for k, v in model.state_dict().items()}
    parallel = auto_parallelize(model, example_inputs=batch, strategy=case.strategy, batch="global")
    logits = parallel(**batch)["logits"]
    assert isinstance(logits, DTensor) and logits.full_tensor().shape == logits.shape
    state = parallel.state_dict()
    assert list(state) == list(wanted)
    for name, value in state.items():
        assert isinstance(value, DTensor) and torch.equal(value.full_tensor(), wanted[name]), name
    before = loss_of(parallel(**batch)).item()
    kept = {k: v.clone() for k, v in state.items()}
    parallel.load_state_dict({k: v * 2 for k, v in wanted.items()})
    assert loss_of(parallel(**batch)).item() != before
    parallel.load_state_dict(kept)
    assert loss_of(parallel(**batch)).item() == before


def check_meta(case: Case, folder: Path) -> None:
    """A model without memory, filled from a file."""
    model, batch = made(case)
    if RANK == 0:
        save_file(model.state_dict(), folder / "model.safetensors")
    dist.barrier()
    with torch.device("meta"):
        empty = made(case)[0]
    parallel = auto_parallelize(
        empty, example_inputs=batch, strategy=case.strategy, batch="global", state=folder / "model.safetensors"
    )
    torch.testing.assert_close(loss_of(parallel(**batch)).detach(), loss_of(model(**batch)).detach(), rtol=1e-9, atol=0)


def attempt(name: str, work: Callable[[], None]) -> str:
    """What went wrong on any rank, "" if nothing."""
    start = time.perf_counter()
    try:
        work()
        error = ""
    except Exception:
        error = f"rank {RANK}: {traceback.format_exc()}"
    errors: list[Any] = [None] * 4
    dist.all_gather_object(errors, error)
    if RANK == 0:
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return "\n".join(filter(None, errors))


def lose_a_peer() -> None:
    """Rank 2 dies inside a collective of the second step."""
    model, batch = zoo.MODELS["mlp"]()
    parallel = auto_parallelize(model, example_inputs=batch, strategy=Strategy(dp=2, tp=2, zero=3), batch="global")
    parallel.train_step(**batch)
    if RANK == 2:
        ProcessGroupCommunicator.all_reduce = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    parallel.train_step(**batch)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    auto_parallelize(*_tiny())  # starts the process group
    for name, case in CASES.items():
        results[name] = attempt(name, lambda case=case: check(case))
    results["sharded state"] = attempt("sharded state", lambda: check_sharded_state(FEATURES["sharded state"]))
    results["meta"] = attempt("meta", lambda: check_meta(FEATURES["meta"], folder))
    if RANK == 0:
        (folder / "results.json").write_text(json.dumps(results))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun stops the others as soon as one has died: let them have their say
    try:
        lose_a_peer()
    except BaseException as error:
        (folder / f"end.{RANK}").write_text(f"{type(error).__name__}: {error}")
        raise
    (folder / f"end.{RANK}").write_text("nothing was noticed")


def _tiny() -> tuple[torch.nn.Module, str]:
    return torch.nn.Linear(1, 1), "auto"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
