"""The memory of a rank's parameters and buffers: the shards that an optimizer updates, and what the graphs take of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.ops.collectives import take_shard
from ..passes.ops.positions import Ranges, compose_ranges, held_ranges, range_lengths, whole_ranges
from ..passes.types import Sections
from .buckets import ScatterLayout
from .communicator import MeshCommunicator
from .errors import MismatchError
from .faults import gather_texts
from .program import Cut, Instruction, Key, TensorSpec
from .sharded import Layout, ShardedTensor, local_tensor

PIPELINE = "pp"
"""The axis along which ranks hold different parameters."""


def put_shard(whole: Tensor, dim: int, sections: Sections, index: int, shard: Tensor) -> None:
    """Write `shard` where index `index` holds it in `whole`: the inverse of `take_shard`, in place."""
    start = taken = 0
    for section in sections:
        length = section[index]
        whole.narrow(dim, start + sum(section[:index]), length).copy_(shard.narrow(dim, taken, length))
        start += sum(section)
        taken += length


def cut_ranges(shape: Sequence[int], cuts: Sequence[Cut], layout: Layout) -> list[Ranges]:
    """For each dim of a whole of `shape`, the (start, length) of the pieces that `cuts` leave this rank, in order."""
    found = whole_ranges(shape)
    for cut in cuts:
        found[cut.dim] = compose_ranges(found[cut.dim], held_ranges(cut.sections, layout.index(cut.axis)))
    return found


def read_ranges(source: Any, ranges: Sequence[Ranges], dtype: torch.dtype) -> Tensor:
    """The product of `ranges` out of `source`, which is indexed by slices and may be a file: nothing else is read."""
    if any(not pieces for pieces in ranges):
        return torch.empty(range_lengths(ranges), dtype=dtype)

    return _read(source, ranges, ())


def _read(source: Any, ranges: Sequence[Ranges], prefix: tuple[slice, ...]) -> Tensor:
    if len(prefix) == len(ranges):
        return source[prefix]
    parts = [_read(source, ranges, (*prefix, slice(start, start + length))) for start, length in ranges[len(prefix)]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, len(prefix))


@dataclass
class Slot:
    """One parameter's memory.

    levels[0] is what the graphs take, levels[-1] the shard that is stored. They are one tensor except for a `gathered`
    parameter, whose level k + 1 is this rank's cut of level k: a view of it where that is contiguous.
    """

    spec: TensorSpec
    layout: Layout
    levels: list[Tensor]
    parameter: nn.Parameter
    seen: tuple[Any, ...] = ()

    @property
    def base(self) -> int:
        """How many cuts lead from the whole to what the graphs take."""
        return len(self.spec.cuts) - len(self.levels) + 1

    @property
    def version(self) -> tuple[Any, ...]:
        p = self.parameter
        return p.version if isinstance(p, ShardedTensor) else ()


class ParameterStore:
    """Owns a rank's parameters and buffers on `device`, uninitialized until `set_working`, `set_whole` or `set_buffer`.

    parameters   name -> what the optimizer updates: a ShardedTensor of the parameter's own shape. Where the mesh neither
                 cuts nor stages the model, every rank has all of it, and these are ordinary parameters.
    buffers      name -> this rank's part
    """

    def __init__(
        self,
        parameters: Sequence[TensorSpec],
        buffers: Sequence[TensorSpec],
        communicator: MeshCommunicator,
        device: torch.device | str,
    ) -> None:
        self.communicator = communicator
        self.device = torch.device(device)
        self.mesh = communicator.mesh
        self.is_whole = self.mesh.size(PIPELINE) == 1 and not any(spec.cuts for spec in parameters)
        self.slots = {spec.name: self._allocate(spec) for spec in parameters}
        self.buffer_specs = {spec.name: spec for spec in buffers}
        self.buffers: dict[str, Tensor] = {}
        for spec in buffers:
            shape = self.layout(spec).local_shape(spec.shape)
            self.buffers[spec.name] = torch.empty(shape, dtype=spec.dtype, device=self.device)
        self._directory: tuple[dict[str, TensorFacts], ...] | None = None
        self._stale: set[str] = {name for name, slot in self.slots.items() if slot.spec.gathered}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: slot.parameter for name, slot in self.slots.items()}

    def layout(self, spec: TensorSpec) -> Layout:
        return Layout(self.mesh, self.communicator.rank, spec.cuts, self.communicator)

    def _allocate(self, spec: TensorSpec) -> Slot:
        layout = self.layout(spec)
        count = len(spec.gathered)
        if count and tuple(cut.axis for cut in spec.cuts[-count:]) != spec.gathered:
            raise MismatchError(f"parameter {spec.name!r}: gathered axes {spec.gathered} are not the last of its cuts")
        base = len(spec.cuts) - count
        shape = Layout(self.mesh, layout.rank, spec.cuts[:base]).local_shape(spec.shape)
        levels = [torch.empty(shape, dtype=spec.dtype, device=self.device)]
        for cut in spec.cuts[base:]:
            index = layout.index(cut.axis)
            part = take_shard(levels[-1], cut.dim, cut.sections, index)
            levels.append(part if len(cut.sections) == 1 and part.is_contiguous() else torch.empty_like(part))
        trainable = spec.trainable and spec.dtype.is_floating_point
        stored = levels[-1] if self.is_whole else ShardedTensor(levels[-1], layout, spec.shape)
        return Slot(spec, layout, levels, nn.Parameter(stored, requires_grad=trainable))

    def copy(self) -> ParameterStore:
        """Another store with the same values: an average of the parameters, say."""
        specs = [slot.spec for slot in self.slots.values()]
        made = ParameterStore(specs, list(self.buffer_specs.values()), self.communicator, self.device)
        for name, slot in self.slots.items():
            made.set_shard(name, local_tensor(slot.parameter.detach()))
            made.slots[name].parameter.requires_grad_(slot.parameter.requires_grad)
        made.update_buffers({f"buffer.{name}": x for name, x in self.buffers.items()})
        return made

    def working(self) -> dict[Key, Tensor]:
        """`param.*` and `buffer.*` as the graphs take them. A gathered parameter is current after its `gather`."""
        found: dict[Key, Tensor] = {}
        for name, slot in self.slots.items():
            found[f"param.{name}"] = slot.parameter.detach() if self.is_whole else slot.levels[0]
        found.update((f"buffer.{name}", x) for name, x in self.buffers.items())
        return found

    # --- gathering (ZeRO-1 and 2) ---

    @property
    def dirty(self) -> bool:
        """Whether this rank wrote a gathered parameter since its last gather, or never gathered it."""
        return bool(self._stale) or any(slot.version != slot.seen for slot in self.slots.values() if slot.spec.gathered)

    def refresh(self, stale: bool) -> None:
        """Say whether gathered parameters have to be gathered again. Ranks must agree: `any(rank.dirty)`."""
        if stale:
            self._stale = {name for name, slot in self.slots.items() if slot.spec.gathered}

    def gather(self, instruction: Instruction) -> dict[Key, Tensor]:
        """What the graphs take of the parameters `keys`, gathered over `axis` in one collective if they have changed."""
        names = [key.removeprefix("param.") for key in instruction.keys]
        if any(name in self._stale for name in names):
            by_dtype: dict[torch.dtype, list[Slot]] = {}
            for name in names:
                by_dtype.setdefault(self.slots[name].spec.dtype, []).append(self.slots[name])
            for slots in by_dtype.values():
                self._gather(slots, instruction.axis)
            for name in names:
                slot = self.slots[name]
                if slot.spec.gathered[0] == instruction.axis:
                    self._stale.discard(name)
                slot.seen = slot.version
        return {key: self.slots[name].levels[0] for key, name in zip(instruction.keys, names, strict=True)}

    def _gather(self, slots: Sequence[Slot], axis: str) -> None:
        places = [1 + slot.spec.gathered.index(axis) for slot in slots]
        wholes = [slot.levels[k - 1] for slot, k in zip(slots, places, strict=True)]
        cuts = tuple(slot.spec.cuts[slot.base + k - 1] for slot, k in zip(slots, places, strict=True))
        size, index = self.communicator.size(axis), self.communicator.index(axis)
        bucket = ScatterLayout(cuts, tuple(tuple(w.shape) for w in wholes), index, size)
        lengths = [bucket.lengths(i) for i in range(size)]
        row = wholes[0].new_zeros(max(map(sum, lengths)))
        start = 0
        for slot, k in zip(slots, places, strict=True):
            own = slot.levels[k]
            row[start : start + own.numel()].view(own.shape).copy_(own)
            start += own.numel()
        rows = self.communicator.all_gather(row, axis)
        for i in range(size):
            start = 0
            for k, whole in enumerate(wholes):
                part = rows[i, start : start + lengths[i][k]].view(bucket.shard_shape(k, i))
                start += lengths[i][k]
                put_shard(whole, cuts[k].dim, cuts[k].sections, i, part)

    # --- filling ---

    def set_working(self, name: str, value: Tensor) -> None:
        """Fill a parameter from what the graphs take of it (its cuts but the gathered ones applied)."""
        slot = self.slots[name]
        with torch.no_grad():
            if self.is_whole:
                slot.parameter.copy_(value)
            else:
                slot.levels[0].copy_(value)
                self._cut_down(slot)

    def set_whole(self, name: str, whole: Any) -> None:
        """Fill a parameter or buffer from the whole tensor (or a file of it that is indexed by slices): only this rank's
        part is read."""
        if name in self.buffers:
            spec = self.buffer_specs[name]
            self.buffers[name].copy_(self._part(whole, spec, spec.cuts))
        else:
            slot = self.slots[name]
            self.set_working(name, self._part(whole, slot.spec, slot.spec.cuts[: slot.base]))

    def _part(self, whole: Any, spec: TensorSpec, cuts: Sequence[Cut]) -> Tensor:
        return read_ranges(whole, cut_ranges(spec.shape, cuts, self.layout(spec)), spec.dtype)

    def set_shard(self, name: str, shard: Tensor) -> None:
        """Fill a parameter from the shard that this rank stores."""
        with torch.no_grad():
            local_tensor(self.slots[name].parameter).copy_(shard)
        self.touched(name)

    def touched(self, name: str) -> None:
        """Say that the shards of a parameter were written, on all ranks: a gathered one is gathered again before its use."""
        if name in self.slots and self.slots[name].spec.gathered:
            self._stale.add(name)

    def _cut_down(self, slot: Slot) -> None:
        for k in range(1, len(slot.levels)):
            cut = slot.spec.cuts[slot.base + k - 1]
            part = take_shard(slot.levels[k - 1], cut.dim, cut.sections, slot.layout.index(cut.axis))
            if part.data_ptr() != slot.levels[k].data_ptr():
                slot.levels[k].copy_(part)
        slot.seen = slot.version
        self._stale.discard(slot.spec.name)

    def update_buffers(self, changed: Mapping[Key, Tensor]) -> None:
        """Take over the buffers that a step changed."""
        with torch.no_grad():
            for key, value in changed.items():
                self.buffers[key.removeprefix("buffer.")].copy_(value)

    # --- who holds what ---

    def specs(self) -> Iterator[TensorSpec]:
        """Of parameters, then buffers."""
        yield from (slot.spec for slot in self.slots.values())
        yield from self.buffer_specs.values()

    @property
    def directory(self) -> tuple[dict[str, TensorFacts], ...]:
        """Per pipeline stage, what its ranks hold, by name. A collective over the pipeline on first use."""
        # Not a cached_property: in Python 3.11 that holds a lock of the class, which ranks that are threads would wait for.
        if self._directory is None:
            self._directory = self._ask_directory()
        return self._directory

    def _ask_directory(self) -> tuple[dict[str, TensorFacts], ...]:
        own = [
            (s.name, s.shape, str(s.dtype).removeprefix("torch."), s.aliases, s.persistent, s.name in self.buffers)
            for s in self.specs()
        ]
        texts = gather_texts(self.communicator, PIPELINE, json.dumps(own)) if PIPELINE in self.mesh.axes else [json.dumps(own)]
        return tuple({row[0]: TensorFacts.of(row) for row in json.loads(text)} for text in texts)

    @property
    def stage(self) -> int:
        return self.communicator.index(PIPELINE) if PIPELINE in self.mesh.axes else 0

    def owner(self, name: str) -> int:
        """The first stage that holds `name`."""
        return next(k for k, held in enumerate(self.directory) if name in held)

    def counts(self, name: str) -> bool:
        """Whether this rank is the one that answers for its shard of the parameter, of all ranks that hold the same."""
        cut_axes = {axis for cut in self.slots[name].spec.cuts for axis in cut.axis.split("+")}
        here = self.mesh.coordinates(self.communicator.rank)
        others = (i for axis, i in here.items() if axis != PIPELINE and axis not in cut_axes)
        return not any(others) and self.owner(name) == self.stage

    @property
    def nbytes(self) -> int:
        """Bytes of storage held."""
        levels = {id(t): t for slot in self.slots.values() for t in slot.levels}
        views = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in levels.values() if t.numel()}
        return sum(views.values()) + sum(math.prod(b.shape) * b.element_size() for b in self.buffers.values())


@dataclass(frozen=True)
class TensorFacts:
    """A parameter or buffer as every stage may know it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...]
    persistent: bool
    is_buffer: bool

    @classmethod
    def of(cls, row: Sequence[Any]) -> TensorFacts:
        name, shape, dtype, aliases, persistent, is_buffer = row
        return cls(name, tuple(shape), getattr(torch, dtype), tuple(aliases), persistent, is_buffer)
