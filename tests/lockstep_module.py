"""`ParallelModule`s made by the engine, every rank in this process; and one device to compare them with.

Both sides compute in float64: models are doubled, and the casts to float32 in their graphs promoted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwright.compiler import bind as binding
from shardwright.compiler import engine as engines
from shardwright.compiler.call_structure import flatten_call
from shardwright.compiler.capture import Captured, capture
from shardwright.compiler.engine import ModelEngine, Options
from shardwright.compiler.prepare import prepare
from shardwright.compiler.strategy import Strategy, resolve
from shardwright.compiler.topology import Topology
from shardwright.passes.differentiate import Templates
from shardwright.passes.graph_tools import Values
from shardwright.runtime.faults import CommunicatorControl
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.program import Mesh
from shardwright.runtime.sharded import full_tensor

Body = Callable[[ParallelModule, int], Any]
TEMPLATES = Templates(Values())


def double(model: nn.Module, batch: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Model and batch in float64."""
    return model.double(), {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


class Recorded:
    """What ranks capture, once for all of them: they hold the same model and pass the same shapes."""

    def __init__(self, promote: bool) -> None:
        self.promote = promote
        self.bound: dict[Any, Any] = {}

    def bind(self, model: nn.Module, args: Any, kwargs: Any, batches: Sequence[int], batch_inputs: Sequence[str], **options: Any) -> Any:
        tree, tensors = flatten_call(args, kwargs)
        shapes = tuple((k, tuple(t.shape[1:] if k in batch_inputs else t.shape), t.dtype) for k, t in tensors.items())
        key = (repr(tree), shapes, tuple(batches), tuple(batch_inputs), tuple(sorted((k, str(v)) for k, v in options.items())))
        if key not in self.bound:
            self.bound[key] = binding.bind(model, args, kwargs, batches, batch_inputs, **options)
        return self.bound[key]


def parallelize(
    model: nn.Module, world: World, rank: int, example: Any = None, strategy: Strategy | None = None, **options: Any
) -> ParallelModule:
    """What `auto_parallelize` makes on this rank. `model` is consumed; `example` None: the first call decides."""
    control = CommunicatorControl(world.communicator(Mesh(("world",), (world.size,)), rank))
    options = {"topology": Topology.preset("cpu", devices=world.size), **options}
    request = resolve("auto", strategy or Strategy(), world.size)
    engine = ModelEngine(
        model, Options(request, **options), control, lambda mesh: world.communicator(mesh, rank), torch.device("cpu")
    )
    engine._templates = TEMPLATES
    store = None if example is None else engine.prepare((), example)
    return ParallelModule(engine, store, model, control)


def on_ranks(
    model: nn.Module,
    strategy: Strategy | None,
    body: Body,
    *,
    example: Any = None,
    world_size: int = 4,
    promote: bool = True,
    monkeypatch: Any = None,
    **options: Any,
) -> list[Any]:
    """`body(parallel, rank)` on every rank, each with its own copy of `model`. `example` may be a function of the rank."""
    import pytest

    patch = pytest.MonkeyPatch()
    recorded = Recorded(promote)
    patch.setattr(binding, "prepare", lambda captured: prepare(captured, float64=promote))
    patch.setattr(engines, "bind", recorded.bind)

    def run(rank: int, world: World) -> Any:
        given = example(rank) if callable(example) else example
        return body(parallelize(copy.deepcopy(model), world, rank, given, strategy, **options), rank)

    try:
        return run_ranks(world_size, run, timeout=300)
    finally:
        patch.undo()
