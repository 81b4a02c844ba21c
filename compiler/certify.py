"""Verify a plan and certify what was checked: types and schedules at any size, numbers at the size that memory allows."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..passes.check_schedules import check_schedules
from ..passes.graph_tools import VIEWS, metas
from ..passes.normalize.promote import double
from ..runtime.program import Mesh
from .emit import Problem, emit_all
from .plan import Plan
from .prepare import in_float64
from .reduce import Capture, Sample, fewer_blocks, fewer_ranks
from .units import bytes_text
from .verify import compare, random_state, reference, run_programs

EVERY = 32
"""Ranks up to which all programs are emitted: about a second each for a large model."""

DAY = 86400.0
"""Seconds: what a comparison may take. Ranks that wait for each other in vain are found out without a clock."""

SHARE = 0.5
"""Of the free memory that a comparison by numbers may be expected to take."""


@dataclass(frozen=True)
class Certificate:
    """What was checked, and the largest error found. Errors are relative to the largest entry of each value.

    numbers    at what size numbers were compared, or why not; `compared` is the number of gradients
    """

    plan: str
    ranks: int
    types: str
    schedules: str
    numbers: str
    compared: int
    largest_error: float
    seconds: float

    @property
    def heading(self) -> str:
        missing = self.numbers.startswith("not compared")
        return "Types and schedules checked, numbers not compared" if missing else "Verified"

    def __str__(self) -> str:
        lines = [
            f"{self.heading}: {self.plan}",
            f"  types        {self.types}",
            f"  schedules    {self.schedules}: transfers meet, collectives in one order, no cycle of waits",
            f"  numbers      {self.numbers}",
        ]
        if self.compared:
            lines.append(f"  compared     the loss and {self.compared} gradients; largest relative error {self.largest_error:.1e}")
        lines.append(f"  took         {self.seconds:.1f} s")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        return cls(**json.loads(text))


def certify(
    problem: Problem,
    plan: Plan,
    inputs: Mapping[str, Tensor] | None,
    *,
    capture: Capture | None = None,
    memory_limit: float | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Check a plan that has its layout. `inputs`: tensors of any number of samples by key; without, or on the meta device, numbers
    are not compared.

    Where the mesh has more than EVERY ranks, or the model does not fit in `memory_limit` bytes (None: half of what is free), the
    plan is checked on what `reduce` leaves of it, which the certificate says.

    Raises TypeCheckError, MismatchError, DeadlockError or VerificationError, naming what does not hold.
    """
    start = time.perf_counter()
    whole, name = Sample(problem, plan), plan.name
    sample, types = whole, _emitted(plan.mesh)
    if plan.mesh.world_size > EVERY:
        sample = fewer_blocks(fewer_ranks(whole, capture))
        ends = (0, plan.mesh.world_size - 1)
        report("checking the types of the first rank and the last")
        emit_all(problem, plan, ranks=ends)
        types = f"ranks {ends[0]} and {ends[1]} at full size; {_emitted(sample.plan.mesh)} of the reduced plan"
    report("checking the types and schedules of every rank")
    programs = emit_all(sample.problem, sample.plan)
    check_schedules(programs)
    schedules = f"{sum(len(p.schedule) for p in programs)} instructions{_reduced(sample)}"

    def certified(numbers: str, compared: int = 0, error: float = 0.0) -> Certificate:
        spent = time.perf_counter() - start
        return Certificate(name, plan.mesh.world_size, types, schedules, numbers, compared, error, spent)

    if not inputs or any(x.is_meta for x in inputs.values()):
        return certified("not compared: no inputs with values were given")
    if problem.loss is None or not problem.training:
        return certified("not compared: there is no loss")
    limit = SHARE * free_memory() if memory_limit is None else memory_limit
    needed = 0.0
    for candidate in _samples(whole, capture) if sample is whole else [sample]:
        needed = comparison_bytes(candidate.problem, candidate.plan)
        if needed <= limit:
            report(f"comparing numbers{_reduced(candidate)}")
            try:
                compared, error = compare_sample(candidate, inputs)
            except Incomparable as reason:
                return certified(f"not compared: {reason}")
            what = f"reduced: {', '.join(candidate.left_out)}" if candidate.left_out else "the whole model"
            return certified(f"{what}; float64, {_emitted(candidate.plan.mesh)}, in one process", compared, error)
    return certified(f"not compared: about {bytes_text(needed)} would be needed, and memory_limit is {bytes_text(limit)}")


def _samples(whole: Sample, capture: Capture | None) -> Iterator[Sample]:
    """From the whole to the least that shows every decision."""
    yield whole
    yield fewer_blocks(whole)
    yield fewer_blocks(fewer_ranks(whole, capture))


def _emitted(mesh: Mesh) -> str:
    return f"every one of {mesh.world_size} ranks" if mesh.world_size > 1 else "the one rank"


def _reduced(sample: Sample) -> str:
    return f" (reduced: {', '.join(sample.left_out)})" if sample.left_out else ""


def compare_sample(sample: Sample, inputs: Mapping[str, Tensor]) -> tuple[int, float]:
    """(gradients compared, largest relative error) of every rank's program in this process against one device, in float64.

    Raises Incomparable where the model itself, on random parameters, gives no number to compare with.
    """
    problem = replace(sample.problem, graph=in_float64(sample.problem.graph, sample.problem.loss))
    assert problem.loss is not None
    programs = emit_all(problem, sample.plan)
    state = random_state(problem.graph, torch.Generator().manual_seed(0))
    state.update({k: v for k, v in problem.buffers.items() if k in state})
    state.update({k: double(v) for k, v in problem.constants.items()})
    given, expected, gradients = _expected(problem, problem.loss, state, inputs)
    if not expected.isfinite().all():
        raise Incomparable(f"the model's loss on random parameters is {float(expected)}")
    error = compare(programs, run_programs(programs, state, given, timeout=DAY), problem.loss, expected, gradients)
    return len(gradients), error


def _expected(
    problem: Problem, loss: str, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Inputs, and one device's loss and gradients. Varied inputs, or the example as it is where the model does not take these: some
    numbers belong together, as the corners of a box do."""
    varied = {k: double(v) for k, v in repeated(problem, inputs).items()}
    try:
        return varied, *reference(problem.graph, loss, state, varied)
    except (IndexError, RuntimeError):
        given = {k: double(v) for k, v in repeated(problem, inputs, vary=False).items()}
        return given, *reference(problem.graph, loss, state, given)


class Incomparable(Exception):
    """There is nothing to compare programs with."""


def repeated(problem: Problem, inputs: Mapping[str, Tensor], *, vary: bool = True) -> dict[str, Tensor]:
    """`inputs` with as many samples as the problem's batch has: the first of them, or repeated.

    vary    so that no two data ranks compute the same: copies have their rows in other orders, whole numbers smaller here and
            there, which leaves ids what they may be, and other numbers a little off
    """
    rows = sum(problem.local_batches)
    have = next((x.shape[0] for k, x in inputs.items() if k in problem.batch_inputs), rows)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(have, generator=generator) if k and vary else torch.arange(have) for k in range(-(-rows // have))]

    def fit(x: Tensor) -> Tensor:
        first, *others = (x[order] for order in orders)
        return torch.cat([first, *(_varied(y, generator) if vary else y for y in others)])[:rows]

    on_cpu = {k: x.detach().cpu() for k, x in inputs.items()}
    return {k: fit(x) if k in problem.batch_inputs else x for k, x in on_cpu.items()}


def _varied(x: Tensor, generator: torch.Generator) -> Tensor:
    if x.is_floating_point():
        return x * (1 + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    if x.dtype == torch.bool or x.is_complex():
        return x
    smaller = (torch.rand(x.shape, generator=generator) * (x + 1)).to(x.dtype)
    return torch.where((x > 0) & (torch.rand(x.shape, generator=generator) < 0.5), smaller, x)


def comparison_bytes(problem: Problem, plan: Plan) -> float:
    """About how many bytes `compare_sample` takes: parameters, gradients and what sums these, of the reference and of every rank;
    the reference's values, and those of the ranks as if tp cut nothing."""
    state = values = 0.0
    for node in problem.graph.graph.nodes:
        size = sum(8.0 * math.prod(m.shape) for m in metas(node)) if "val" in node.meta else 0.0
        if node.op == "placeholder":
            state += size
        elif node.op == "call_function" and node.target not in VIEWS:
            values += size
    copies = plan.mesh.world_size / (plan.mesh.size("tp") * plan.mesh.size("pp"))
    return 3 * state * (1 + copies) + values * (1 + plan.mesh.size("tp"))


def free_memory() -> float:
    """Bytes that this process may still take without driving others out (Linux; elsewhere half of what the machine has)."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    found = 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found = float(lines["MemAvailable"].split()[0]) * 1024
    limit, used = group / "memory.max", group / "memory.current"  # of a container
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        found = min(found, float(most) - float(used.read_text()))
    return max(found, 0.0)
