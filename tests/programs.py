"""Small models, their lowered graphs and their programs, each made once for a whole test run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import zoo
from harness import Case, mesh, prepare, problem_of

from shardwright.compiler.emit import Lowered, Problem, emit, lower_for
from shardwright.compiler.layout import with_layout
from shardwright.compiler.layouts import Layouts
from shardwright.compiler.plan import Plan
from shardwright.compiler.topology import Device, Level, Topology
from shardwright.passes.types import balanced_sizes
from shardwright.runtime.program import RankProgram

Options = tuple[tuple[str, Any], ...]


def case(model: str, **options: Any) -> Case:
    """The captured model `zoo.MODELS[model](**options)` and what one device computes."""
    return _case(model, tuple(sorted(options.items())))


@cache
def adapted(batch: int = 8) -> Case:
    """Adapters on frozen layers: parameters without gradients, and ops on parameters alone."""
    torch.manual_seed(0)
    return prepare(zoo.Adapted().train(), {"x": torch.randn(batch, 6, 24), "y": torch.randn(batch, 6, 24)})


@cache
def _case(model: str, options: Options) -> Case:
    return prepare(*zoo.MODELS[model](**dict(options)))


def plan(
    zero: int = 0,
    sequence_parallel: bool = False,
    microbatches: int = 1,
    byte_price: float | None = None,
    topology: Topology | None = None,
    **axes: int,
) -> Plan:
    return Plan(
        mesh(**axes),
        zero=zero,
        layouts=Layouts(sequence_parallel, byte_price),
        microbatches=microbatches,
        topology=topology,
    )


def machine(network: float) -> Topology:
    """Four devices so slow that small models are worth sharding, `network` in bytes/s. Layouts by time differ with it."""
    device = Device("slow", {"float64": 1e9, "float32": 1e9}, 1e12, 1e11, launch=1e-9)
    return Topology(device, (Level("network", 4, network, 1e-9),))


NEAR, FAR = machine(1e10), machine(1e7)


def program(found: Case, wanted: Plan, rank: int = 0) -> RankProgram:
    """The program of one rank."""
    problem = problem_of(found, shares(found, wanted))
    return emit(problem, with_layout(problem, wanted), rank)


def shares(found: Case, wanted: Plan) -> Sequence[int]:
    """Samples of each data rank."""
    return balanced_sizes(found.batch, wanted.data_size)


def lowered(found: Case, wanted: Plan, rank: int = 0) -> tuple[Problem, Plan, Lowered]:
    """The typed graph of a rank before it is differentiated, with the plan's layout filled in."""
    problem = problem_of(found, shares(found, wanted))
    wanted = with_layout(problem, wanted)
    return problem, wanted, lower_for(problem, wanted, rank)
