"""Compare programs with one device by numbers, running every rank in this process.

The reference is the captured graph on one device. Parameters and inputs are random; the comparison is in float64 (the graph's
casts to float32 promoted, on both sides), with the bounds of `within`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.graph_tools import metas, named_results
from ..passes.ops.collectives import join_shards, take_shard
from ..runtime.errors import ShardwrightError
from ..runtime.executor import Executor, StepResult
from ..runtime.lockstep import run_ranks
from ..runtime.program import Cut, Mesh, RankProgram, TensorSpec

RELATIVE = 1e-9
"""Of a gradient's own largest entry."""
ABSOLUTE = 1e-12
"""Of the largest gradient entry of the model: some gradients are zero in theory."""


class VerificationError(ShardwrightError):
    """A program that does not compute what the model computes. Names the value that differs, and by how much."""


def reference(
    graph: fx.GraphModule, loss: str, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor], seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients (by placeholder key) of a normalized graph on one device."""
    leaves: dict[str, Tensor] = {}
    args = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            key = node.meta["key"]
            value = torch.tensor(seed) if key == "seed" else inputs[key] if key in inputs else state[key]
            if node.meta.get("grad") and key.startswith("param."):
                value = leaves[key] = value.detach().clone().requires_grad_(True)
            args.append(value)
    with torch.enable_grad():
        results = dict(zip((k for k, _ in named_results(graph)), fx.Interpreter(graph).run(*args), strict=True))
    found = torch.autograd.grad(results[loss], list(leaves.values()), allow_unused=True)
    return results[loss].detach(), {k: g for k, g in zip(leaves, found, strict=True) if g is not None}


def cut(whole: Tensor, cuts: Sequence[Cut], mesh: Mesh, coordinates: Mapping[str, int]) -> Tensor:
    for c in cuts:
        whole = take_shard(whole, c.dim, c.sections, mesh.index(coordinates, c.axis))
    return whole


def working_part(whole: Tensor, spec: TensorSpec, program: RankProgram) -> Tensor:
    """What the graphs of a rank take of a parameter or buffer."""
    return cut(whole, [c for c in spec.cuts if c.axis not in spec.gathered], program.mesh, program.coordinates).clone()


def run_programs(
    programs: Sequence[RankProgram],
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    seed: int = 0,
    timeout: float = 300.0,
) -> list[StepResult]:
    """One step of every rank's program in this process. `state` and `inputs` are whole tensors by key."""

    def body(rank: int, world: Any) -> StepResult:
        program = programs[rank]
        working = {k: v for k, v in state.items() if k.startswith("const.")}
        for prefix, specs in (("param.", program.parameters), ("buffer.", program.buffers)):
            working.update({prefix + s.name: working_part(state[prefix + s.name], s, program) for s in specs})
        given = {s.key: cut(inputs[s.key], s.cuts, program.mesh, program.coordinates) for s in program.inputs}
        executor = Executor(
            program, world.communicator(program.mesh, rank), "cpu", gather=lambda i: {k: working[k] for k in i.keys}
        )
        return executor.run(working, given, seed)

    return run_ranks(len(programs), body, timeout=timeout)


def whole_gradients(programs: Sequence[RankProgram], results: Sequence[StepResult], name: str) -> list[Tensor]:
    """Every copy of a parameter's whole gradient that the ranks hold together: one for each place on the uncut axes."""
    found = []
    for program in programs:
        spec = next((s for s in program.parameters if s.name == name), None)
        if spec is None or any(program.mesh.index(program.coordinates, c.axis) for c in spec.cuts):
            continue
        found.append(_joined(programs, results, name, program.coordinates))
    return found


def _joined(
    programs: Sequence[RankProgram], results: Sequence[StepResult], name: str, here: Mapping[str, int], depth: int = 0
) -> Tensor:
    """Cuts nest: the last applies to what the first left, so they are joined from the inside out. What one left may be cut
    otherwise at each of its indices."""
    rank = programs[0].mesh.rank(here)
    cuts = next(s for s in programs[rank].parameters if s.name == name).cuts
    if depth == len(cuts):
        return results[rank].gradients[f"grad.param.{name}"]
    first = cuts[depth]
    axes = first.axis.split("+")
    places = itertools.product(*(range(programs[0].mesh.size(axis)) for axis in axes))
    parts = [_joined(programs, results, name, {**here, **dict(zip(axes, place, strict=True))}, depth + 1) for place in places]
    return join_shards(parts, first.dim, first.sections)


def compare(
    programs: Sequence[RankProgram], results: Sequence[StepResult], loss_key: str, loss: Tensor, gradients: Mapping[str, Tensor]
) -> float:
    """The largest relative error of loss and gradients. Raises VerificationError beyond RELATIVE and ABSOLUTE."""
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    worst = 0.0
    for rank, result in enumerate(results):
        got = result.outputs.get(loss_key)
        error = float("inf") if got is None else float((got - loss).abs()) / max(1.0, float(loss.abs()))
        if not error <= RELATIVE:
            raise VerificationError(f"the loss on rank {rank} is {got}, on one device {float(loss)}")
        worst = max(worst, error)
    for key, expected in gradients.items():
        name = key.removeprefix("param.")
        copies = whole_gradients(programs, results, name)
        if not copies:
            raise VerificationError(f"no rank holds a gradient of {name!r}")
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        for got in copies:
            if got.shape != expected.shape:
                raise VerificationError(f"the gradient of {name!r} has shape {tuple(got.shape)} for {tuple(expected.shape)}")
            error = float((got - expected).abs().max()) if got.numel() else 0.0
            if not error <= max(RELATIVE * scale, ABSOLUTE * largest):
                raise VerificationError(f"the gradient of {name!r} is off by {error:.3g}; its largest entry is {scale:.3g}")
            worst = max(worst, error / max(scale, 1e-3 * largest, 1e-300))
    return worst


def random_state(gm: fx.GraphModule, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters and buffers of a graph by key, in float64: small random numbers; buffers positive, as variances are."""
    state: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta["key"].startswith(("param.", "buffer.")):
            (meta,) = metas(node)
            key = node.meta["key"]
            if not meta.dtype.is_floating_point:
                state[key] = torch.zeros(meta.shape, dtype=meta.dtype)
            elif key.startswith("buffer."):
                state[key] = torch.rand(meta.shape, dtype=torch.float64, generator=generator) + 0.5
            else:
                state[key] = torch.randn(meta.shape, dtype=torch.float64, generator=generator) * 0.05
    return state
