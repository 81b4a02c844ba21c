"""A program's schedule, resolved once: every value has a slot in a list, every instruction is a step over slots.

Values of different micro-batches have different slots. A buffer that a graph updates gets a new slot with each update,
and a micro-batch keeps seeing the version it saw first: its backward reads what its forward read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import dtype

from .buckets import ScatterLayout
from .errors import MismatchError
from .homes import Fact, Home, Outputs, read_outputs, with_homes
from .program import Cut, Instruction, Key, OutputSpec, RankProgram, TensorSpec
from .reuse import donated

Shape = tuple[int, ...]
MICROBATCH = "mb"
_STEPWISE = ("param.", "buffer.", "const.", "prologue.", "grad.param.", "out.")
"""Prefixes of keys that live outside micro-batches, as the seed does."""


@dataclass(frozen=True)
class Slice:
    """Micro-batches' views of a call input: `cut.dim` cut by `cut.sections`; slot None where nobody reads it."""

    key: Key
    whole: int
    cut: Cut | None
    parts: tuple[int | None, ...]


@dataclass(frozen=True)
class Write:
    """What becomes of a graph's output: kept in `slot`, or added to what is there."""

    slot: int
    add: bool = False
    first_sum: bool = False
    """The first addition: what is there is the value as a graph gave it, which others may share."""
    home: Home | None = None
    """Where the value lies from the first on."""


@dataclass(frozen=True)
class Step:
    """One instruction. `reads` are its operands' slots, `dead` those that it is the last to read."""

    instruction: Instruction
    title: str
    reads: tuple[int, ...] = ()
    writes: tuple[Write | None, ...] = ()
    dead: tuple[int, ...] = ()
    microbatch: tuple[int, int] = (0, 1)
    shapes: tuple[tuple[Shape, dtype] | None, ...] = ()
    layout: ScatterLayout | None = None
    deferrable: bool = False
    """A reduction of gradients, which may be put off to a later step."""
    owned: frozenset[int] = frozenset()
    """Positions of operands that share memory with nothing: a reduction may overwrite them."""
    bucket: int | None = None
    """The slot of the bucket in which the small operands of a reduction lie already, those that have a home."""


@dataclass(frozen=True)
class Join:
    """An output whose micro-batches are concatenated on `cut.dim` once the step at `after` has run."""

    key: Key
    cut: Cut
    parts: tuple[int, ...]
    slot: int
    after: int


@dataclass(frozen=True)
class Plan:
    """What the executor walks through: `slots` values, and where those from outside and those for outside stand."""

    slots: int
    steps: tuple[Step, ...]
    slices: tuple[Slice, ...]
    joins: dict[int, tuple[Join, ...]]
    working: tuple[tuple[Key, int], ...]
    seed: int | None
    outputs: tuple[tuple[Key, int], ...]
    gradients: tuple[tuple[Key, int], ...]
    raw_gradients: tuple[tuple[Key, int], ...]
    """The gradients as they are before the schedule's reductions."""
    buffers: tuple[tuple[Key, int], ...]
    products: Mapping[str, frozenset[int]]
    """By graph, the positions of gradients that it can be told to write somewhere."""
    donated: Mapping[str, frozenset[int]]
    """By graph, the positions of inputs over which it may write."""


def plan_steps(program: RankProgram) -> Plan:
    """Resolve the schedule. Raises MismatchError for a key that is read before anything gives it."""
    return _Planner(program).plan()


def part_of(program: RankProgram, shape: Sequence[int], cuts: Iterable[Cut]) -> Shape:
    """The shape that this rank has of `shape` after `cuts`."""
    left = list(shape)
    for cut in cuts:
        index, _ = axis_place(program, cut.axis)
        left[cut.dim] = sum(section[index] for section in cut.sections)
    return tuple(left)


def working_shape(program: RankProgram, spec: TensorSpec) -> Shape:
    """The shape in which the graphs take a parameter: what it stores, with the `gathered` axes whole again."""
    return part_of(program, spec.shape, spec.cuts[: len(spec.cuts) - len(spec.gathered)])


def axis_place(program: RankProgram, axis: str) -> tuple[int, int]:
    """This rank's index on `axis`, which may be flattened, and the axis's size."""
    return program.mesh.index(program.coordinates, axis), program.mesh.size(axis)


@dataclass
class _Planner:
    program: RankProgram
    slots: int = 0
    current: dict[tuple[Key, int], int] = field(default_factory=dict)
    """The slot of a key in a micro-batch; -1 stands for keys outside micro-batches."""
    working: dict[Key, int] = field(default_factory=dict)
    gradients: set[Key] = field(default_factory=set)
    raw: dict[Key, int] = field(default_factory=dict)
    summed: set[int] = field(default_factory=set)
    owned: set[int] = field(default_factory=set)
    facts: dict[int, Fact] = field(default_factory=dict)
    known: dict[str, Outputs] = field(default_factory=dict)
    joined: dict[Key, int] = field(default_factory=dict)
    cat: dict[Key, list[tuple[int, int]]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        program = self.program
        self.specs = {name: spec for spec in (*program.parameters, *program.buffers) for name in (spec.name, *spec.aliases)}
        self.outputs: dict[Key, OutputSpec] = {spec.key: spec for spec in program.outputs}
        self.inputs = {spec.key: spec for spec in program.inputs}
        self.count = program.microbatches

    def plan(self) -> Plan:
        for instruction in self.program.schedule:
            self.steps.append(getattr(self, f"_{instruction.kind}")(instruction))
        self.steps, self.slots = with_homes(self.steps, self.facts, self.slots)
        joins = self._joins()
        kept = {
            "out.": {k: s for (k, m), s in self.current.items() if m == -1 and k.startswith("out.")},
            "grad.param.": {k: self.current[k, -1] for k in sorted(self.gradients)},
            "buffer.": {
                k: s for (k, m), s in self.current.items() if m == -1 and k.startswith("buffer.") and s != self.working.get(k)
            },
        }
        slices = tuple(self._slices())
        keep = {slot for group in kept.values() for slot in group.values()}
        keep |= {slot for found in joins.values() for join in found for slot in join.parts}
        return Plan(
            slots=self.slots,
            steps=tuple(self._with_last_uses(keep)),
            slices=slices,
            joins=joins,
            working=tuple(self.working.items()),
            seed=self.current.get(("seed", -1)),
            outputs=tuple(kept["out."].items()),
            gradients=tuple(kept["grad.param."].items()),
            raw_gradients=tuple((k, self.raw.get(k, s)) for k, s in kept["grad.param."].items() if self.raw.get(k, s) >= 0),
            buffers=tuple(kept["buffer."].items()),
            products=self._products(),
            donated=donated(self.program),
        )

    def _new(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _scope(self, key: Key, microbatch: int) -> tuple[Key, int]:
        return (key, -1) if key == "seed" or key.startswith(_STEPWISE) else (key, microbatch)

    def _read(self, key: Key, microbatch: int, reader: Instruction) -> int:
        scope = self._scope(key, microbatch)
        if key.startswith("buffer.") and microbatch >= 0:
            seen = self.current.get((key, microbatch))
            if seen is not None:
                return seen
        slot = self.current.get(scope)
        if slot is None and key in self.cat:
            slot = self.current[scope] = self._joined(key)
        if slot is None:
            outside = key == "seed" or key.startswith(("param.", "buffer.", "const.")) or key in self.inputs
            if not outside:
                raise MismatchError(f"{reader} reads {key!r}, which nothing before it in the schedule gives")
            slot = self.current[scope] = self._new()
            if key != "seed" and key not in self.inputs:
                self.working[key] = slot
        if key.startswith("buffer.") and microbatch >= 0:
            self.current[key, microbatch] = slot
        return slot

    def _run(self, instruction: Instruction) -> Step:
        spec = self.program.graphs.get(instruction.graph)
        if spec is None:
            raise MismatchError(f"{instruction}: the program has no such graph")
        prologue = bool(spec.outputs) and all(key.startswith("prologue.") for key in spec.outputs)
        m = -1 if prologue else instruction.microbatch
        reads = tuple(self._read(key, m, instruction) for key in spec.inputs)
        if instruction.graph not in self.known:
            self.known[instruction.graph] = read_outputs(spec.graph)
        outputs = self.known[instruction.graph]
        writes = tuple(self._write(key, m) for key in spec.outputs)
        self.owned |= {write.slot for i, write in enumerate(writes) if i in outputs.fresh or write.add}
        facts = zip(writes, outputs.facts or (None,) * len(writes), strict=True)
        self.facts |= {write.slot: fact for write, fact in facts if fact is not None and not write.add}
        return Step(instruction, str(instruction), reads, writes, microbatch=(0, 1) if prologue else (m, self.count))

    def _products(self) -> dict[str, frozenset[int]]:
        found = {}
        for name, outputs in self.known.items():
            keys = self.program.graphs[name].outputs
            if products := frozenset(i for i in outputs.products if keys[i].startswith("grad.param.")):
                found[name] = products
        return found

    def _write(self, key: Key, microbatch: int) -> Write:
        scope = self._scope(key, microbatch)
        output = self.outputs.get(key)
        if output is not None and output.accumulate == "cat" and self.count > 1:
            slot = self._new()
            self.cat.setdefault(key, []).append((slot, len(self.steps)))
            return Write(slot)
        adds = key.startswith("grad.param.") or (output is not None and output.accumulate == "sum")
        if key.startswith("grad.param."):
            self.gradients.add(key)
        if adds and scope in self.current:
            slot = self.current[scope]
            first = slot not in self.summed and slot not in self.owned
            self.summed.add(slot)
            return Write(slot, add=True, first_sum=first)
        slot = self.current[scope] = self._new()
        return Write(slot)

    def _joins(self) -> dict[int, tuple[Join, ...]]:
        found: dict[int, tuple[Join, ...]] = {}
        for key, parts in self.cat.items():
            cut = next((cut for cut in self.outputs[key].cuts if cut.axis == MICROBATCH), None)
            if cut is None:
                raise MismatchError(f"output {key!r} is to be concatenated over micro-batches but has no cut over {MICROBATCH!r}")
            slot = self._joined(key)
            self.current.setdefault((key, -1), slot)
            after = parts[-1][1]
            found[after] = (*found.get(after, ()), Join(key, cut, tuple(s for s, _ in parts), slot, after))
        return found

    def _joined(self, key: Key) -> int:
        if key not in self.joined:
            self.joined[key] = self._new()
        return self.joined[key]

    def _gather(self, instruction: Instruction) -> Step:
        writes = []
        for key in instruction.keys:
            slot = self.current[key, -1] = self._new()
            writes.append(Write(slot))
        return Step(instruction, str(instruction), writes=tuple(writes))

    def _send(self, instruction: Instruction) -> Step:
        reads = tuple(self._read(key, instruction.microbatch, instruction) for key in instruction.keys)
        return Step(instruction, str(instruction), reads, microbatch=(instruction.microbatch, self.count))

    def _receive(self, instruction: Instruction) -> Step:
        m = instruction.microbatch
        shapes = tuple(self._transfer(key, m, instruction) for key in instruction.keys)
        writes = []
        for key in instruction.keys:
            slot = self.current[self._scope(key, m)] = self._new()
            writes.append(Write(slot))
        return Step(instruction, str(instruction), writes=tuple(writes), shapes=shapes, microbatch=(m, self.count))

    def _transfer(self, key: Key, microbatch: int, reader: Instruction) -> tuple[Shape, dtype]:
        transfers = self.program.transfers
        found = transfers.get(f"{key}[{microbatch}]") or transfers.get(key)
        if found is None:
            raise MismatchError(f"{reader}: the program does not say the shape and dtype of {key!r}")
        return tuple(found[0]), found[1]

    def _spec(self, key: Key, reader: Instruction) -> TensorSpec:
        spec = self.specs.get(key.removeprefix("grad.").removeprefix("param.").removeprefix("buffer."))
        if spec is None:
            raise MismatchError(f"{reader}: {key!r} is no parameter or buffer of the program")
        return spec

    def _all_reduce(self, instruction: Instruction) -> Step:
        """A gradient that this rank has no part in enters as zeros: a parameter shared between stages."""
        reads: list[int] = []
        shapes: list[tuple[Shape, dtype] | None] = []
        for key in instruction.keys:
            absent = key.startswith("grad.param.") and (key, -1) not in self.current
            spec = self._spec(key, instruction) if absent else None
            shapes.append((working_shape(self.program, spec), spec.dtype) if spec else None)
            reads.append(-1 if absent else self._read(key, instruction.microbatch, instruction))
        return self._reduction(instruction, reads, tuple(shapes), None)

    def _reduce_scatter(self, instruction: Instruction) -> Step:
        reads = [self._read(key, instruction.microbatch, instruction) for key in instruction.keys]
        cuts, wholes = [], []
        for key in instruction.keys:
            spec = self._spec(key, instruction)
            place = next((i for i in reversed(range(len(spec.cuts))) if spec.cuts[i].axis == instruction.axis), None)
            if place is None:
                raise MismatchError(f"{instruction}: {key!r} has no cut over axis {instruction.axis!r}")
            cuts.append(spec.cuts[place])
            wholes.append(part_of(self.program, spec.shape, spec.cuts[:place]))
        index, size = axis_place(self.program, instruction.axis)
        return self._reduction(instruction, reads, (), ScatterLayout(tuple(cuts), tuple(wholes), index, size))

    def _reduction(
        self,
        instruction: Instruction,
        reads: Sequence[int],
        shapes: tuple[tuple[Shape, dtype] | None, ...],
        layout: ScatterLayout | None,
    ) -> Step:
        writes = []
        for key, read in zip(instruction.keys, reads, strict=True):
            slot = self.current[self._scope(key, instruction.microbatch)] = self._new()
            writes.append(Write(slot))
            if key.startswith("grad.param."):
                self.gradients.add(key)
                self.raw.setdefault(key, read)
        deferrable = all(key.startswith("grad.param.") for key in instruction.keys)
        owned = frozenset(i for i, read in enumerate(reads) if read in self.owned)
        return Step(
            instruction,
            str(instruction),
            tuple(reads),
            tuple(writes),
            shapes=shapes,
            layout=layout,
            deferrable=deferrable,
            owned=owned,
        )

    def _broadcast(self, instruction: Instruction) -> Step:
        m = instruction.microbatch
        index, _ = axis_place(self.program, instruction.axis)
        root = index == instruction.peer
        # A buffer as the last update left it, not as a micro-batch saw it.
        scopes = {key: -1 if key.startswith("buffer.") else m for key in instruction.keys}
        reads = tuple(self._read(key, scopes[key], instruction) for key in instruction.keys) if root else ()
        shapes = tuple(self._result_shape(key, m, instruction) for key in instruction.keys)
        writes = []
        for key in instruction.keys:
            slot = self.current[self._scope(key, m)] = self._new()
            writes.append(Write(slot))
        return Step(instruction, str(instruction), reads, tuple(writes), shapes=shapes)

    def _result_shape(self, key: Key, microbatch: int, instruction: Instruction) -> tuple[Shape, dtype]:
        if key in self.program.transfers or key not in self.outputs:
            return self._transfer(key, microbatch, instruction)
        spec = self.outputs[key]
        cuts = [cut for cut in spec.cuts if cut.axis != MICROBATCH]
        return part_of(self.program, spec.shape, cuts), spec.dtype

    def _slices(self) -> list[Slice]:
        found = []
        for key, spec in self.inputs.items():
            cut = next((cut for cut in spec.cuts if cut.axis == MICROBATCH), None)
            parts = tuple(self.current.get((key, m)) for m in range(self.count))
            whole = self.current.get((key, -1))
            if whole is None and not any(part is not None for part in parts):
                continue
            if cut is not None and self.count > 1 and len(cut.sections[0]) != self.count:
                raise MismatchError(f"input {key!r} is cut in {len(cut.sections[0])} micro-batches; the program has {self.count}")
            found.append(Slice(key, self._new() if whole is None else whole, cut if self.count > 1 else None, parts))
        return found

    def _with_last_uses(self, keep: set[int]) -> list[Step]:
        seen = set(keep)
        steps = []
        for step in reversed(self.steps):
            dead = tuple(dict.fromkeys(slot for slot in step.reads if slot >= 0 and slot not in seen))
            seen.update(dead)
            writes = tuple(write if write is not None and write.slot in seen else None for write in step.writes)
            steps.append(replace(step, dead=dead, writes=writes))
        return steps[::-1]
