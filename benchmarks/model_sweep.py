"""Families of models, from capture to gradients: which ones work, and how much of their work a tensor axis divides.

    python -m benchmarks.model_sweep --json sweep.json
    python -m benchmarks.model_sweep --only mamba,whisper

For each family of benchmarks/_families.py, small and with random weights, in float64 and this one process:

captured      the graph gives the eager model's loss, outputs and gradients
planned       a plan is chosen for 8 devices, and for a mesh of 2 x 4; one rank's program of each is emitted
equal         four ranks give the loss and every gradient of one device, under tp=4, ZeRO-3 x tp=2, and the plan chosen
replicated    share of the FLOP of products, convolutions and attention that every rank of tp=4 computes whole, for two samples:
              with four, ranks could take a sample each
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._families import FAMILIES, Family
from ._report import MIB, peak_rss, print_table, write_json

LARGE_SHARE = 0.01
"""Of a model's FLOP: an op that leaves more replicated is named."""


@dataclass
class Finding:
    """What the sweep found of a family. Each check is "" where it passed, else why it did not; None where it was not reached.

    errors        largest relative error of loss and gradients by strategy, and of the graph against the eager model
    replicated    share of the model's FLOP that tp=4 leaves whole; by op and source line where it is above `LARGE_SHARE`
    """

    name: str
    kind: str
    captured: str | None = None
    planned: str | None = None
    equal: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    replicated: float | None = None
    replicated_ops: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families, by name: mamba,whisper")
    parser.add_argument("--kind", help="families of one kind: vision")
    parser.add_argument("--quick", action="store_true", help="of the meshes one is planned, of the strategies one is run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only.split(",") if options.only else [f.name for f in FAMILIES]
    unknown = sorted(set(names) - {f.name for f in FAMILIES})
    if unknown:
        parser.error(f"no families {', '.join(unknown)}; there are {', '.join(f.name for f in FAMILIES)}")
    chosen = [f for f in FAMILIES if f.name in names and options.kind in (None, f.kind)]

    missing = {f.library for f in chosen if find_spec(f.library) is None}
    for library in sorted(missing):
        print(f"left out: the families of {library}, which is not installed (pip install 'shardwright[bench]')")
    chosen = [f for f in chosen if f.library not in missing]

    findings = []
    for index, family in enumerate(chosen, 1):
        findings.append(finding := sweep(family, quick=options.quick))
        print(f"[{index}/{len(chosen)}] {', '.join(row_of(finding))}", *notes_on(finding), sep="\n    ", flush=True)
    report(findings)
    write_json(options.json, {"families": [asdict(f) for f in findings], "peak_rss_bytes": peak_rss()})
    return 0 if all(f.captured == f.planned == f.equal == "" for f in findings) else 1


def sweep(family: Family, *, quick: bool = False) -> Finding:
    """Every check of one family; what fails is written down, and stops the checks that need it alone.

    quick    one mesh is planned, and ZeRO-3 x tp alone is run
    """
    finding = Finding(family.name, family.kind)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        case = attempt(lambda: capture_case(family, finding), finding, "captured")
        if case is not None:
            attempt(lambda: measure_replicated(case, finding), finding, "planned")
            attempt(lambda: plan_meshes(case, finding, quick), finding, "planned")
            attempt(lambda: compare_strategies(case, finding, quick), finding, "equal")
    finding.warnings = sorted({str(w.message) for w in caught if "sharding rule" in str(w.message)})
    finding.seconds = time.perf_counter() - start
    return finding


def attempt(check: Callable[[], Any], finding: Finding, step: str) -> Any:
    """The result of `check`, None where it raised; `step` of the finding tells which."""
    try:
        result = check()
    except Exception as error:  # the sweep goes on: a family that fails is a finding
        setattr(finding, step, f"{type(error).__name__}: {error}")
        return None
    if getattr(finding, step) is None:
        setattr(finding, step, "")
    return result


@dataclass(frozen=True)
class Case:
    """A family's model, captured and ready to be planned, with what one device computes; `problem` in float64. `templates` are
    the ops that were differentiated for one of its plans or another."""

    model: nn.Module
    batch: Mapping[str, Any]
    loss_fn: Callable[[Any, Any], Tensor] | None
    problem: Any
    state: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    rows: int
    loss: Tensor
    gradients: Mapping[str, Tensor]
    templates: Any


def capture_case(family: Family, finding: Finding) -> Case:
    from shardwright.compiler import verify
    from shardwright.compiler.capture import capture
    from shardwright.compiler.emit import Problem
    from shardwright.compiler.fidelity import check_capture
    from shardwright.compiler.prepare import prepare
    from shardwright.passes.differentiate import Templates
    from shardwright.passes.graph_tools import Values
    from shardwright.passes.normalize.promote import double

    model, batch = family.build()
    model, batch = in_float64(model, batch)
    captured = capture(model, (), batch, loss_fn=family.loss)
    with eager_experts(model):
        difference = check_capture(captured, model, (), batch, family.loss)
    finding.errors["eager"] = max(difference.loss, difference.gradients, difference.outputs)
    graph = prepare(captured, float64=True)
    state = {f"param.{n}": p.detach() for n, p in model.named_parameters()}
    state |= {f"buffer.{n}": b for n, b in model.named_buffers()}
    state |= {k: double(v) for k, v in captured.constants.items()}
    inputs = {f"input.{k}": v for k, v in batch.items() if isinstance(v, Tensor)}
    rows = next(iter(inputs.values())).shape[0]
    if captured.loss is None:
        raise ValueError("the model gave no loss")
    loss, gradients = verify.reference(graph, captured.loss, state, inputs)
    batch_inputs = tuple(k for k, v in inputs.items() if v.dim() and v.shape[0] == rows)
    problem = Problem(graph, captured.loss, batch_inputs, (rows,), captured.aliases, captured.constants)
    return Case(model, batch, family.loss, problem, state, inputs, rows, loss, gradients, Templates(Values()))


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """A model of transformers whose experts are computed one by one: torch has no grouped product of float64."""
    choose: Any = getattr(model, "set_experts_implementation", None)
    if choose is None:
        yield
        return
    before = model.config._experts_implementation  # type: ignore[union-attr]
    choose("eager")
    yield
    choose(before)


def in_float64(model: nn.Module, batch: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    from shardwright.passes.normalize.promote import double

    return model.double(), {k: double(v) if isinstance(v, Tensor) else v for k, v in batch.items()}


def measure_replicated(case: Case, finding: Finding) -> None:
    """How much of the FLOP of products every rank of tp=4 would compute whole."""
    from dataclasses import replace

    from shardwright.compiler.capture import capture
    from shardwright.compiler.cost import op_flops
    from shardwright.compiler.layouts import Layouts
    from shardwright.compiler.prepare import prepare
    from shardwright.compiler.tensor_axis import tensor_placement
    from shardwright.passes.graph_tools import op_calls, where
    from shardwright.passes.types import Varying

    sample = {k: v[:2] if f"input.{k}" in case.problem.batch_inputs else v for k, v in case.batch.items()}
    problem = replace(case.problem, graph=prepare(capture(case.model, (), sample, loss_fn=case.loss_fn), float64=True))
    calls = op_calls(problem.graph)
    placement = tensor_placement(problem.graph, problem.loss, 4, Layouts(), None, calls)
    total = whole = 0.0
    by_op: dict[str, float] = {}
    for node, (call, _) in calls.items():
        flops = op_flops(call)
        strategy = placement.choice[node.name]
        total += flops
        if flops and not any(isinstance(t, Varying) for t in (*strategy.ins, *strategy.outs)):
            whole += flops
            by_op[where(node)] = by_op.get(where(node), 0.0) + flops
    finding.replicated = whole / total if total else 0.0
    finding.replicated_ops = {op: flops / total for op, flops in by_op.items() if flops > LARGE_SHARE * total}


def plan_meshes(case: Case, finding: Finding, quick: bool) -> None:
    for mesh in ((8,), (2, 4))[: 1 if quick else 2]:
        plan = chosen_plan(case, mesh)
        finding.plans["x".join(map(str, mesh))] = plan.name
        emit_ranks(case, plan, [plan.mesh.world_size - 1])


def chosen_plan(case: Case, mesh: tuple[int, ...]) -> Any:
    """What the search makes of a mesh of free devices."""
    import math

    from shardwright.compiler.choose import choose
    from shardwright.compiler.strategy import Strategy, resolve
    from shardwright.compiler.topology import Topology

    topology = Topology.preset("h100", devices=math.prod(mesh))
    return choose(case.problem, resolve(mesh, Strategy()), topology, rows=case.rows, memory_limit=None, batch="global")


def emit_ranks(case: Case, plan: Any, ranks: Sequence[int]) -> list[Any]:
    from dataclasses import replace

    from shardwright.compiler.emit import emit
    from shardwright.compiler.layout import with_layout
    from shardwright.passes.types import balanced_sizes

    problem = replace(case.problem, local_batches=tuple(balanced_sizes(case.rows, plan.data_size)))
    plan = with_layout(problem, plan)
    return [emit(problem, plan, rank, case.templates) for rank in ranks]


def compare_strategies(case: Case, finding: Finding, quick: bool) -> None:
    """Four ranks against one device, under each strategy; raises what the first that differs raises, after all were tried."""
    from shardwright.compiler import verify
    from shardwright.compiler.plan import Plan
    from shardwright.runtime.program import Mesh

    makers: dict[str, Callable[[], Any]] = {
        "zero3 x tp2": lambda: Plan(Mesh(("dp_shard", "tp"), (2, 2)), zero=3),
        "tp4": lambda: Plan(Mesh(("tp",), (4,))),
        "auto": lambda: chosen_plan(case, (4,)),
    }
    failures = []
    for name, make in list(makers.items())[: 1 if quick else None]:
        try:
            plan = make()
            finding.plans[name] = plan.name
            programs = emit_ranks(case, plan, range(4))
            results = verify.run_programs(programs, case.state, case.inputs)
            finding.errors[name] = verify.compare(programs, results, case.problem.loss, case.loss, case.gradients)
        except Exception as error:  # what the other strategies give is worth knowing
            failures.append(f"{name}: {type(error).__name__}: {error}")
    if failures:
        raise verify.VerificationError("; ".join(failures))


def row_of(finding: Finding) -> list[str]:
    def mark(outcome: str | None) -> str:
        return "-" if outcome is None else "yes" if outcome == "" else "no"

    share = "-" if finding.replicated is None else f"{finding.replicated:.1%}"
    checks = [mark(x) for x in (finding.captured, finding.planned, finding.equal)]
    return [finding.name, finding.kind, *checks, share, f"{finding.seconds:.1f}"]


def notes_on(finding: Finding) -> list[str]:
    """Everything that is not as it should be."""
    outcomes = {step: getattr(finding, step) for step in ("captured", "planned", "equal")}
    whole = [f"{share:.1%} of its FLOP whole on every rank: {op}" for op, share in finding.replicated_ops.items()]
    return [*(f"not {step}: {why}" for step, why in outcomes.items() if why), *finding.warnings, *whole]


def report(findings: Sequence[Finding]) -> None:
    columns = ["family", "kind", "captured", "planned", "equal", "FLOP left whole under tp", "seconds"]
    print_table("Families of models on 4 ranks", columns, [row_of(f) for f in findings])
    for finding in findings:
        for note in notes_on(finding):
            print(f"{finding.name}: {note}")
    counts = {step: sum(getattr(f, step) == "" for f in findings) for step in ("captured", "planned", "equal")}
    whole = sum(bool(f.replicated_ops) for f in findings)
    summary = ", ".join(f"{count} {step}" for step, count in counts.items())
    print(f"{len(findings)} families: {summary}; in {whole} some op of over {LARGE_SHARE:.0%} of the FLOP runs whole under tp")
    print(f"{sum(f.seconds for f in findings):.0f} s, peak resident memory {peak_rss() / MIB:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
