"""Orders of micro-batches in a pipeline, and the schedule of instructions that follows from an order.

An *order* is pure data, a list of ("forward" | "backward", micro-batch) for one stage; `build_schedule` puts transfers
around it. Whether the schedules of all ranks fit together is proven in passes/check_schedules.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..runtime.program import Instruction, Key

Phase = Literal["forward", "backward"]
Action = tuple[Phase, int]


def forward_only(stages: int, microbatches: int, stage: int) -> list[Action]:
    """Every micro-batch forward: evaluation."""
    _check(stages, microbatches, stage)
    return _run("forward", range(microbatches))


def gpipe(stages: int, microbatches: int, stage: int) -> list[Action]:
    """All forward, then all backward (Huang et al. 2019, section 2.3). Keeps the activations of every micro-batch."""
    _check(stages, microbatches, stage)
    return _run("forward", range(microbatches)) + _run("backward", range(microbatches))


def one_f_one_b(stages: int, microbatches: int, stage: int) -> list[Action]:
    """Forward and backward in turn after a warm-up of stages - stage - 1 forwards (Narayanan et al. 2021, section 2.2.1).

    Keeps the activations of at most min(stages - stage, microbatches) micro-batches; the bubble is that of GPipe.
    """
    _check(stages, microbatches, stage)
    warmup = min(stages - stage - 1, microbatches)
    order = _run("forward", range(warmup))
    for m in range(microbatches - warmup):
        order += _run("forward", [warmup + m]) + _run("backward", [m])
    return order + _run("backward", range(microbatches - warmup, microbatches))


def _run(phase: Phase, microbatches: Iterable[int]) -> list[Action]:
    return [(phase, m) for m in microbatches]


ORDERS = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""By the names that Strategy.schedule uses."""


def in_flight(order: Iterable[Action]) -> int:
    """The largest number of micro-batches between their forward and their backward at once: whose activations are kept."""
    held = most = 0
    for phase, _ in order:
        held += 1 if phase == "forward" else -1
        most = max(most, held)
    return most


def _check(stages: int, microbatches: int, stage: int) -> None:
    if not (0 <= stage < stages and microbatches >= 1):
        raise ValueError(f"there is no stage {stage} of {stages} with {microbatches} micro-batches")


@dataclass(frozen=True)
class Transfer:
    """Values that go to or come from rank `peer` together, once per micro-batch."""

    keys: tuple[Key, ...]
    peer: int


@dataclass(frozen=True)
class Part:
    """What one phase of a stage is: what it receives, the graph it runs, what it sends."""

    graph: str
    receives: tuple[Transfer, ...] = ()
    sends: tuple[Transfer, ...] = ()


def build_schedule(
    order: Sequence[Action],
    parts: Mapping[Phase, Part],
    start: Sequence[Instruction] = (),
    finish: Sequence[Instruction] = (),
) -> tuple[Instruction, ...]:
    """The instructions of one rank: `start` (gathers, the prologue), the order with its transfers, `finish` (reductions).

    Receives stand right before the graph that reads them, sends right after the graph that made them. A phase that is
    missing from `parts` is left out of the order (a frozen first stage has no backward).
    """
    body: list[Instruction] = []
    for phase, microbatch in order:
        part = parts.get(phase)
        if part is None:
            continue
        body += [Instruction("receive", t.keys, microbatch=microbatch, peer=t.peer) for t in part.receives if t.keys]
        body.append(Instruction("run", graph=part.graph, microbatch=microbatch))
        body += [Instruction("send", t.keys, microbatch=microbatch, peer=t.peer) for t in part.sends if t.keys]
    return (*start, *body, *finish)
