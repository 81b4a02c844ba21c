"""Run a rank's program: one step of its schedule over local tensors.

What the schedule means is resolved once, by `plan_steps`; graphs run as the Python that `emit_python` prints, line by line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..passes.ops.collectives import join_shards, take_shard, use_communicator
from .buckets import pack, unpack
from .communicator import MeshCommunicator
from .emit_python import GraphFunction, compile_graph
from .errors import MismatchError, add_place, graph_place
from .homes import Place, is_large
from .program import Instruction, Key, RankProgram
from .steps import Join, Step, Write, plan_steps
from .unshare import unshare

Gather = Callable[[Instruction], Mapping[Key, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one step gives: the model's outputs, the gradients `grad.param.NAME`, and the buffers it changed."""

    outputs: dict[Key, Tensor]
    gradients: dict[Key, Tensor]
    buffers: dict[Key, Tensor]


class Executor:
    """A rank's program, ready to run on `device` with its peers reached through `communicator`.

    functions   the graphs as functions of a boxed list, where they are not to be compiled from the program's graphs
    gather      called for every `gather` instruction: the parameters `instruction.keys`, as the graphs take them

    Raises MismatchError for a schedule that reads what nothing gives.
    """

    def __init__(
        self,
        program: RankProgram,
        communicator: MeshCommunicator,
        device: torch.device | str,
        *,
        functions: Mapping[str, GraphFunction] | None = None,
        gather: Gather | None = None,
    ) -> None:
        self.program = program
        self.communicator = communicator
        self.device = torch.device(device)
        self.gather = gather
        self.plan = plan_steps(program)
        self._constants = {key: value.to(self.device) for key, value in program.constants.items()}
        self._products = self.plan.products if functions is None else {}
        none: frozenset[int] = frozenset()
        self._functions = functions or {
            name: compile_graph(spec, name, self.device, self._products.get(name, none), self.plan.donated.get(name, none))
            for name, spec in program.graphs.items()
        }
        self._unsettled: list[tuple[frozenset[int], Callable[[], None]]] = []
        """Collectives that were started, by the slots they write."""
        self._handlers: dict[str, Callable[[Step, list[Any]], None]] = {
            "run": self._run_graph,
            "gather": self._gather,
            "send": self._send,
            "receive": self._receive,
            "all_reduce": self._all_reduce,
            "reduce_scatter": self._reduce_scatter,
            "broadcast": self._broadcast,
        }

    def run(
        self,
        working: Mapping[Key, Tensor],
        inputs: Mapping[Key, Tensor],
        seed: int = 0,
        *,
        defer_reduction: bool = False,
        gate: Callable[[], None] | None = None,
    ) -> StepResult:
        """One step.

        working           `param.*`, `buffer.*` and `const.*` as the graphs take them
        inputs            `input.*` of this rank's call, all micro-batches together
        seed              of the step's random ops, equal on all ranks
        defer_reduction   give the gradients as they are before the schedule's reductions; see `reduce`
        gate              called once, before the rank communicates; what it raises ends the step, which has changed nothing

        Raises MismatchError for tensors that are missing or that the micro-batches do not cut.
        """
        values: list[Any] = [None] * self.plan.slots
        self._unsettled = []
        self.communicator.gate = gate
        try:
            with torch.no_grad(), self._without_autocast(), use_communicator(self.communicator):
                self._enter(values, working, inputs, seed)
                for i, step in enumerate(self.plan.steps):
                    if defer_reduction and step.deferrable:
                        continue
                    self._take(step, values)
                    for join in self.plan.joins.get(i, ()):
                        self._join(join, values)
                self._settle()
                self.communicator.position = "the end of the step"
                self.communicator.flush()
                self.communicator.position = ""
                self.communicator.pass_gate()
        finally:
            self.communicator.gate = None
        found = self.plan.raw_gradients if defer_reduction else self.plan.gradients
        return StepResult(
            outputs={key: values[slot] for key, slot in self.plan.outputs},
            gradients=unshare({key: values[slot] for key, slot in found}, (*working.values(), *inputs.values())),
            buffers={key: values[slot] for key, slot in self.plan.buffers},
        )

    def reduce(self, gradients: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """What the schedule's reductions make of gradients that were run with `defer_reduction`, and perhaps added up."""
        values: list[Any] = [None] * self.plan.slots
        for key, slot in self.plan.raw_gradients:
            if key not in gradients:
                raise MismatchError(f"{key!r} is missing among the gradients to reduce")
            values[slot] = gradients[key]
        with torch.no_grad(), use_communicator(self.communicator):
            for step in self.plan.steps:
                if step.deferrable:
                    self._take(step, values)
            self._settle()
            self.communicator.position = ""
        return {key: values[slot] for key, slot in self.plan.gradients}

    def _without_autocast(self) -> AbstractContextManager[Any]:
        """The graphs say every dtype: an ambient autocast must not change them."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return nullcontext()

    def _enter(self, values: list[Any], working: Mapping[Key, Tensor], inputs: Mapping[Key, Tensor], seed: int) -> None:
        for key, slot in self.plan.working:
            found = working.get(key)
            if found is None:
                found = self._constants.get(key)
            if found is None:
                raise MismatchError(f"the program needs {key!r}, which it was not given")
            values[slot] = found
        if self.plan.seed is not None:
            values[self.plan.seed] = torch.tensor(seed, dtype=torch.int64, device=self.device)
        for piece in self.plan.slices:
            x = inputs.get(piece.key)
            if x is None:
                raise MismatchError(f"the program needs {piece.key!r}, which the call did not give")
            values[piece.whole] = x
            cut = piece.cut
            taken = sum(map(sum, cut.sections)) if cut is not None else 0
            if cut is not None and x.shape[cut.dim] != taken:
                raise MismatchError(
                    f"{piece.key!r} has {x.shape[cut.dim]} on dim {cut.dim}; the program's micro-batches take {taken} in all"
                )
            for m, slot in enumerate(piece.parts):
                if slot is not None:
                    values[slot] = x if cut is None else take_shard(x, cut.dim, cut.sections, m)

    def _take(self, step: Step, values: list[Any]) -> None:
        if self._unsettled:
            self._settle(step.reads)
        self.communicator.position = step.title
        try:
            self._handlers[step.instruction.kind](step, values)
        except Exception as error:
            add_place(error, graph_place(error.__traceback__))
            add_place(error, f"{step.title}, rank {self.program.rank}")
            raise

    def _run_graph(self, step: Step, values: list[Any]) -> None:
        self.communicator.microbatch = step.microbatch
        arguments = [values[slot] for slot in step.reads]
        for slot in step.dead:
            values[slot] = None
        products = self._products.get(step.instruction.graph, frozenset())
        if products:
            arguments.insert(0, [self._place(write, values) if i in products else None for i, write in enumerate(step.writes)])
        results = list(self._functions[step.instruction.graph](arguments))
        for i, write in enumerate(step.writes):
            if write is None:
                continue
            value, results[i] = results[i], None
            held = values[write.slot] if write.add else None
            if held is not None:
                if write.first_sum:
                    values[write.slot] = held + value  # `held` may share memory with another value: it is not ours to change
                elif held is not value:  # the graph has not added it itself
                    held.add_(value)
            elif write.home is not None and i not in products:
                values[write.slot] = self._home(write, values).copy_(value)
            else:
                values[write.slot] = value

    def _place(self, write: Write | None, values: list[Any]) -> Place:
        """Where a graph is to write a product."""
        if write is None:
            return None
        held = values[write.slot] if write.add else None
        if held is not None:
            return None if write.first_sum else (held, True)
        return None if write.home is None else (self._home(write, values), False)

    def _home(self, write: Write, values: list[Any]) -> Tensor:
        home = write.home
        assert home is not None
        if values[home.bucket] is None:
            values[home.bucket] = torch.empty(home.length, dtype=home.dtype, device=self.device)
        return home.view(values[home.bucket])

    def _gather(self, step: Step, values: list[Any]) -> None:
        keys = step.instruction.keys
        if self.gather is None:
            raise MismatchError(f"the program gathers {keys[0]!r} and the executor was given no `gather`")
        found = self.gather(step.instruction)
        for key, write in zip(keys, step.writes, strict=True):
            if write is not None:
                values[write.slot] = found[key]

    def _send(self, step: Step, values: list[Any]) -> None:
        for slot in step.reads:
            self.communicator.send(values[slot], step.instruction.peer)
        for slot in step.dead:
            values[slot] = None

    def _receive(self, step: Step, values: list[Any]) -> None:
        for write, shape in zip(step.writes, step.shapes, strict=True):
            assert shape is not None
            value = self.communicator.receive(*shape, step.instruction.peer)
            if write is not None:
                values[write.slot] = value

    def _operands(self, step: Step, values: list[Any]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for i, slot in enumerate(step.reads):
            if slot >= 0:
                found.append(values[slot])
            else:
                shape = step.shapes[i]
                assert shape is not None
                found.append(torch.zeros(shape[0], dtype=shape[1], device=self.device))
        for slot in step.dead:
            values[slot] = None
        return found

    def _all_reduce(self, step: Step, values: list[Any]) -> None:
        operands = self._operands(step, values)
        axis = step.instruction.axis
        # What goes alone must be the same on every rank: it follows from sizes only. Who may not overwrite its tensor copies it.
        large = {}
        for i, x in enumerate(operands):
            if x is not None and is_large(x.nbytes):
                own = i in step.owned and x.is_contiguous()
                operands[i] = x = x if own else x.clone(memory_format=torch.contiguous_format)
                large[i] = self.communicator.start_reduce(x, axis)
        small = [x for i, x in enumerate(operands) if i not in large]
        shapes = [x.shape for x in small if x is not None]
        del operands
        bucket = values[step.bucket] if step.bucket is not None else None
        if bucket is None and small:
            bucket = pack(small)
        packed = self.communicator.start_reduce(bucket, axis) if bucket is not None else None

        def results() -> list[Tensor]:
            rest = iter(unpack(packed(), shapes) if packed is not None else [])
            return [large[i]() if i in large else next(rest) for i in range(len(large) + len(shapes))]

        self._later(step, values, results)

    def _reduce_scatter(self, step: Step, values: list[Any]) -> None:
        layout = step.layout
        assert layout is not None
        finish = self.communicator.start_reduce_scatter(layout.pack(self._operands(step, values)), step.instruction.axis)
        self._later(step, values, lambda: layout.unpack(finish()))

    def _later(self, step: Step, values: list[Any], finish: Callable[[], list[Tensor]]) -> None:
        """Put the results of a collective where the step writes them, once something reads one of them or the step ends."""

        def settle() -> None:
            self.communicator.position = step.title
            try:
                results = finish()
            except Exception as error:
                add_place(error, f"{step.title}, rank {self.program.rank}")
                raise
            for write, value in zip(step.writes, results, strict=True):
                if write is not None:
                    values[write.slot] = value

        self._unsettled.append((frozenset(write.slot for write in step.writes if write is not None), settle))

    def _settle(self, slots: Iterable[int] | None = None) -> None:
        """Finish the collectives that were started and give one of `slots`; all of them, without."""
        wanted = None if slots is None else frozenset(slots)
        pending, self._unsettled = self._unsettled, []
        for written, settle in pending:
            if wanted is None or wanted & written:
                settle()
            else:
                self._unsettled.append((written, settle))

    def _broadcast(self, step: Step, values: list[Any]) -> None:
        axis, root = step.instruction.axis, step.instruction.peer
        facts = [fact for fact in step.shapes if fact is not None]
        shapes = [shape for shape, _ in facts]
        if step.reads:
            bucket = pack([values[slot] for slot in step.reads])
        else:
            bucket = torch.empty(sum(map(math.prod, shapes)), dtype=facts[0][1], device=self.device)
        for write, value in zip(step.writes, unpack(self.communicator.broadcast(bucket, axis, root), shapes), strict=True):
            if write is not None:
                values[write.slot] = value
        for slot in step.dead:
            values[slot] = None

    def _join(self, join: Join, values: list[Any]) -> None:
        parts = [values[slot] for slot in join.parts]
        for slot in join.parts:
            values[slot] = None
        values[join.slot] = join_shards(parts, join.cut.dim, join.cut.sections)
