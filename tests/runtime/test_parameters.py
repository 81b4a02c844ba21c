from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardwright.runtime.errors import MismatchError
from shardwright.runtime.lockstep import World, run_ranks
from shardwright.runtime.parameters import ParameterStore, cut_ranges, put_shard, read_ranges
from shardwright.runtime.program import Cut, Instruction, Mesh, TensorSpec
from shardwright.runtime.sharded import Layout, ShardedTensor, full_tensor

MESH = Mesh(("dp_shard", "tp"), (2, 2))
F = torch.float32
SHAPES = {"rows": (7, 3), "columns": (4, 9), "fused": (12, 5), "alone": (3,), "tiny": (1, 2), "half": (6, 2)}


def specs(tp_index: int) -> list[TensorSpec]:
    """As under tp x ZeRO-1: tp first; the data axis, gathered, last. What `dp_shard` cuts is what tp left."""
    left = {"rows": (4, 3)[tp_index], "columns": (5, 4)[tp_index], "fused": (8, 4)[tp_index]}

    def halves(n: int) -> tuple[tuple[int, ...], ...]:
        return ((n - n // 2, n // 2),)

    def zero(dim: int, sections: tuple[tuple[int, ...], ...]) -> Cut:
        return Cut("dp_shard", dim, sections)

    fused = Cut("tp", 0, ((2, 2), (4, 1), (2, 1)))
    return [
        TensorSpec("rows", (7, 3), F, (Cut("tp", 0, ((4, 3),)), zero(0, halves(left["rows"]))), ("dp_shard",)),
        TensorSpec("columns", (4, 9), F, (Cut("tp", 1, ((5, 4),)), zero(1, halves(left["columns"]))), ("dp_shard",)),
        TensorSpec("fused", (12, 5), F, (fused, zero(0, halves(left["fused"]))), ("dp_shard",)),
        TensorSpec("alone", (3,), F, (), (), ("dp_shard", "tp")),
        TensorSpec("tiny", (1, 2), F, (zero(0, ((1, 0),)),), ("dp_shard",), ("tp",)),
        TensorSpec("half", (6, 2), torch.float16, (zero(0, halves(6)),), ("dp_shard",), ("tp",), trainable=False),
    ]


def wholes(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(torch.float16 if name == "half" else F) for name, shape in SHAPES.items()
    }


BUFFER = TensorSpec("running", (4,), F, (Cut("tp", 0, ((3, 1),)),))
GATHER = Instruction("gather", tuple(f"param.{name}" for name in SHAPES if name != "alone"), axis="dp_shard")


def make(rank: int, world: World) -> ParameterStore:
    communicator = world.communicator(MESH, rank)
    store = ParameterStore(specs(communicator.index("tp")), [BUFFER], communicator, "cpu")
    for name, whole in wholes().items():
        store.set_whole(name, whole)
    store.set_whole("running", torch.arange(4.0))
    return store


def expected_working(store: ParameterStore, values: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, slot in store.slots.items():
        outer = Layout(MESH, store.communicator.rank, slot.spec.cuts[: slot.base])
        found[f"param.{name}"] = outer.take(values[name])
    return found


def test_filled_from_wholes() -> None:
    def run(rank: int, world: World) -> None:
        store = make(rank, world)
        assert not store.dirty
        for key, value in expected_working(store, wholes()).items():
            assert torch.equal(store.working()[key], value)
        for name, p in store.parameters.items():
            assert isinstance(p, ShardedTensor) and p.requires_grad == (name != "half")
            assert torch.equal(full_tensor(p.detach()), wholes()[name])
        tp = store.communicator.index("tp")
        assert torch.equal(store.buffers["running"], torch.arange(4.0)[slice(0, 3) if tp == 0 else slice(3, 4)])

    run_ranks(4, run)


def test_shards_of_rows_are_views_and_gather_after_a_step() -> None:
    def run(rank: int, world: World) -> None:
        store = make(rank, world)
        for name in ("rows", "fused", "tiny", "half"):
            levels = store.slots[name].levels
            assert levels[0].untyped_storage().data_ptr() == levels[1].untyped_storage().data_ptr()
        gathers = []
        original = store.communicator.all_gather
        store.communicator.all_gather = lambda x, axis: gathers.append(axis) or original(x, axis)  # type: ignore[method-assign]
        values = wholes()
        for step in range(3):
            assert store.dirty == (step > 0)
            store.refresh(store.dirty)
            found = store.gather(GATHER)
            for key, value in expected_working(store, values).items():
                assert key == "param.alone" or torch.equal(found[key], value)
            with torch.no_grad():
                for name, p in store.parameters.items():
                    p.add_(1)
                    values[name] = values[name] + 1
        # Two dtypes, gathered after steps 1 and 2 and not before the first, for nothing had changed.
        assert gathers == ["dp_shard"] * 4

    run_ranks(4, run)


def test_a_clean_rank_gathers_with_a_dirty_one() -> None:
    def run(rank: int, world: World) -> None:
        store = make(rank, world)
        if store.communicator.index("dp_shard") == 1:
            with torch.no_grad():
                store.parameters["columns"].zero_()
        store.refresh(True)
        found = store.gather(GATHER)["param.columns"]
        assert (found == 0).any() and (found != 0).any() and not store.dirty

    run_ranks(4, run)


def test_owners_and_replicas_count_once() -> None:
    def run(rank: int, world: World) -> dict[str, int]:
        store = make(rank, world)
        return {name: slot.levels[-1].numel() * store.counts(name) for name, slot in store.slots.items()}

    found = run_ranks(4, run)
    for name, shape in SHAPES.items():
        assert sum(rank[name] for rank in found) == torch.Size(shape).numel()


def test_tied_parameters_of_two_stages_count_once() -> None:
    mesh = Mesh(("pp", "dp"), (3, 2))

    def run(rank: int, world: World) -> int:
        communicator = world.communicator(mesh, rank)
        tied = TensorSpec("tied", (5,), F, aliases=("head",))
        own = TensorSpec(f"stage{communicator.index('pp')}", (2,), F)
        store = ParameterStore([tied, own] if communicator.index("pp") != 1 else [own], [], communicator, "cpu")
        assert [sorted(held) for held in store.directory] == [["stage0", "tied"], ["stage1"], ["stage2", "tied"]]
        assert store.directory[0]["tied"].aliases == ("head",)
        return sum(slot.levels[-1].numel() * store.counts(name) for name, slot in store.slots.items())

    assert run_ranks(6, run) == [7, 0, 2, 0, 2, 0]


def test_two_gathered_axes() -> None:
    """Gathered from the last cut to the first."""
    mesh = Mesh(("a", "b"), (2, 2))
    whole = torch.randn(5, 6)
    spec = TensorSpec("w", (5, 6), F, (Cut("a", 1, ((4, 2),)), Cut("b", 0, ((2, 3),))), ("a", "b"))

    def run(rank: int, world: World) -> None:
        communicator = world.communicator(mesh, rank)
        store = ParameterStore([spec], [], communicator, "cpu")
        store.set_shard("w", store.layout(spec).take(whole))
        assert store.dirty
        store.refresh(True)
        for axis in ("b", "a"):
            found = store.gather(Instruction("gather", ("param.w",), axis=axis))["param.w"]
        assert torch.equal(found, whole) and not store.dirty

    run_ranks(4, run)


def test_gathered_axes_must_come_last() -> None:
    def run(rank: int, world: World) -> None:
        broken = replace(specs(world.communicator(MESH, rank).index("tp"))[0], gathered=("tp",))
        with pytest.raises(MismatchError, match="'rows'"):
            ParameterStore([broken], [], world.communicator(MESH, rank), "cpu")

    run_ranks(4, run)


def test_only_the_ranks_part_is_read() -> None:
    class Recorder:
        """A file of a tensor, that counts the elements read."""

        def __init__(self, whole: Tensor) -> None:
            self.whole, self.read = whole, 0

        def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
            found = self.whole[index]
            self.read += found.numel()
            return found

    for rank in range(4):
        tp = MESH.coordinates(rank)["tp"]
        for spec in specs(tp):
            layout = Layout(MESH, rank, spec.cuts)
            file = Recorder(wholes()[spec.name])
            part = read_ranges(file, cut_ranges(spec.shape, spec.cuts, layout), spec.dtype)
            assert torch.equal(part, layout.take(file.whole)) and file.read == part.numel()


def test_put_shard_undoes_take_shard() -> None:
    sections = ((2, 1), (0, 3), (1, 1))
    whole = torch.randn(8, 2)
    copied = torch.zeros(8, 2)
    for index in range(2):
        layout = Layout(Mesh(("a",), (2,)), index, (Cut("a", 0, sections),))
        put_shard(copied, 0, sections, index, layout.take(whole))
    assert torch.equal(whole, copied)
