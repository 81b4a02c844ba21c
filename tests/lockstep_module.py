"""`ParallelModule`s as the engine makes them, every rank in this process; and one device to compare them with.

Both compute in float64 where `promote` is not switched off: the casts to float32 in their graphs are promoted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from shardwright.compiler import bind as binding
from shardwright.compiler import engine as engines
from shardwright.compiler.bind import Bound
from shardwright.compiler.call_structure import flatten_call
from shardwright.compiler.capture import capture
from shardwright.compiler.emit import Problem, emit
from shardwright.compiler.engine import ModelEngine, Options
from shardwright.compiler.known_placements import KnownPlacements
from shardwright.compiler.plan import Plan
from shardwright.compiler.prepare import prepare
from shardwright.compiler.strategy import Strategy, resolve
from shardwright.compiler.topology import Topology
from shardwright.passes.differentiate import Templates
from shardwright.passes.graph_tools import Values
from shardwright.runtime.faults import CommunicatorControl
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.program import Mesh, RankProgram
from shardwright.runtime.sharded import full_tensor

Batch = Mapping[str, Any]
TEMPLATES = Templates(Values())
"""What has been differentiated serves all ranks, models and tests."""


def double(model: nn.Module, batch: Batch) -> tuple[nn.Module, dict[str, Any]]:
    """Model and batch in float64."""
    return model.double(), {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


class _Captures:
    """Captures each call once for all ranks: they hold copies of one model. `made` are those that were not found here."""

    def __init__(self, promote: bool) -> None:
        self.found: dict[Any, Bound] = {}
        self.known: dict[str, KnownPlacements] = {}
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(binding, "prepare", lambda captured: prepare(captured, float64=promote))
        self.patch.setattr(engines, "bind", self.bind)
        self.patch.setattr(engines, "emit", self.emit)

    def emit(self, problem: Problem, plan: Plan, rank: int) -> RankProgram:
        return emit(problem, plan, rank, TEMPLATES, self.known.setdefault(repr(plan), KnownPlacements()))

    def bind(
        self, model: nn.Module, args: Any, kwargs: Any, batches: Sequence[int], batch_inputs: Sequence[str], **options: Any
    ) -> Bound:
        tree, tensors = flatten_call(args, kwargs)
        shapes = tuple((k, tuple(t.shape[k in batch_inputs :]), t.dtype) for k, t in tensors.items())
        key = (repr(tree), shapes, tuple(batches), tuple(batch_inputs), repr(sorted(options.items())))
        if key not in self.found:
            self.found[key] = binding.bind(model, args, kwargs, batches, batch_inputs, **options)
        return self.found[key]


def parallelize(
    model: nn.Module, world: World, rank: int, example: Any = None, strategy: Strategy | None = None, **options: Any
) -> ParallelModule:
    """What `auto_parallelize` makes on this rank of a lockstep world. `model` is consumed."""
    control = CommunicatorControl(world.communicator(Mesh(("world",), (world.size,)), rank))
    options = {"topology": Topology.preset("cpu", devices=world.size), **options}
    request = resolve("auto", strategy or Strategy(), world.size)
    engine = ModelEngine(
        model, Options(request, **options), control, lambda mesh: world.communicator(mesh, rank), torch.device("cpu")
    )
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    store = None if example is None else engine.prepare(args, kwargs)
    return ParallelModule(engine, store, model, control)


def on_ranks(
    model: nn.Module | Callable[[int], nn.Module],
    strategy: Strategy | None,
    body: Callable[[ParallelModule, int], Any],
    *,
    example: Any = None,
    world_size: int = 4,
    promote: bool = True,
    share: bool = True,
    **options: Any,
) -> list[Any]:
    """`body(parallel, rank)` on every rank, each with its own copy of `model`.

    model, example  or functions of the rank. `example` None: the first call decides. A tuple: positional arguments
    share           capture once for all ranks, where they hold the same model
    options         of `engine.Options`
    """
    captures = _Captures(promote) if share else None

    def run(rank: int, world: World) -> Any:
        own = copy.deepcopy(model) if isinstance(model, nn.Module) else model(rank)
        given = example(rank) if callable(example) else example
        return body(parallelize(own, world, rank, given, strategy, **options), rank)

    try:
        return run_ranks(world_size, run, timeout=280)
    finally:
        if captures is not None:
            captures.patch.undo()


class OneDevice:
    """The captured, promoted model on one device: its loss is differentiable in the model's own parameters."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor] | None = None) -> None:
        self.model, self.loss_fn = model, loss_fn
        self._graphs: dict[Any, tuple[fx.GraphModule, str | None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        tree, tensors = flatten_call(args, kwargs)
        key = (repr(tree), tuple((k, tuple(t.shape)) for k, t in tensors.items()), self.model.training)
        if key not in self._graphs:
            captured = capture(self.model, args, kwargs, loss_fn=self.loss_fn)
            self._graphs[key] = prepare(captured, float64=True), captured.loss
            self._graphs[key][0].meta["constants"] = captured.constants
        gm, loss = self._graphs[key]
        held = {f"param.{k}": p for k, p in self.model.named_parameters()}
        held |= {f"buffer.{k}": b for k, b in self.model.named_buffers()} | dict(gm.meta["constants"]) | tensors
        held["seed"] = torch.tensor(0)
        values = [held[n.meta["key"]] for n in gm.graph.nodes if n.op == "placeholder"]
        results = dict(zip(gm.meta["outputs"], fx.Interpreter(gm).run(*values), strict=True))
        with torch.no_grad():
            for k, value in results.items():
                if k.startswith("buffer."):
                    held[k].copy_(value)
        assert loss is not None
        return results[loss]


def wholes(parallel: ParallelModule, of: str = "data") -> dict[str, Tensor]:
    """This rank's parameters, or their gradients, as whole tensors. A collective."""
    found = {k: p.grad if of == "grad" else p for k, p in parallel.named_parameters()}
    return {k: full_tensor(x.detach()).clone() for k, x in found.items() if x is not None}


def assert_same(results: Iterable[Mapping[str, Tensor]], expected: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    """Each rank's tensors are those of `expected`, to `tolerance` of their largest entry; together the ranks have all of them."""
    expected = {k: x.detach() for k, x in expected.items()}
    largest = max(float(x.abs().max()) for x in expected.values())
    seen: set[str] = set()
    for rank, found in enumerate(results):
        for name, value in found.items():
            assert value.shape == expected[name].shape, f"{name}: {tuple(value.shape)} for {tuple(expected[name].shape)}"
            error = float((value - expected[name]).abs().max())
            bound = max(tolerance * float(expected[name].abs().max()), 1e-3 * tolerance * largest)
            assert error <= bound, f"{name} on rank {rank} is off by {error:.3g} (bound {bound:.3g})"
            seen.add(name)
    assert seen == set(expected), f"no rank has {sorted(set(expected) - seen)}"
