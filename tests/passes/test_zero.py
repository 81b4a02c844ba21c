"""ZeRO-3's gathers: where they stand, what they cut, and that the typed graph still holds."""

from __future__ import annotations

import pytest
import zoo
from harness import prepare
from programs import case, plan
from typed_execution import Typed, error_of, typed

from shardwright.passes.check import check
from shardwright.passes.convert import convert
from shardwright.passes.ops import StaticCommunicator
from shardwright.passes.ops.collectives import use_communicator
from shardwright.passes.types import I, R, Varying
from shardwright.passes.zero import shard_dim, zero_cut

RANKS = 3


def gathered(model: str, **options: object) -> Typed:
    return typed(case(model, **options), plan(dp_shard=RANKS, zero=3))


def check_every_rank(found: Typed) -> None:
    for index, gm in enumerate(found.graphs):
        with use_communicator(StaticCommunicator({"dp_shard": RANKS}, {"dp_shard": index})):
            check(gm, found.axis, index, found.placeholders)


@pytest.mark.parametrize(
    ("shape", "n", "dim"), [((8, 3), 4, 0), ((3, 8), 4, 1), ((3, 2), 4, None), ((), 2, None), ((5,), 4, 0), ((1, 1, 4), 4, 2)]
)
def test_the_first_dim_that_gives_everyone_something(shape: tuple[int, ...], n: int, dim: int | None) -> None:
    assert shard_dim(shape, n) == dim
    cut = zero_cut(shape, n)
    assert (cut is None) == (dim is None)
    if cut is not None:
        assert cut.global_size == shape[cut.dim] and all(cut.local_size(i) for i in range(n))


@pytest.mark.parametrize(("model", "options"), [("llama", {}), ("gpt2", {}), ("mlp", {}), ("vit", {})], ids=str)
def test_gathered_graph_is_typed_and_right(model: str, options: dict[str, object]) -> None:
    """Uneven shards of uneven shapes; the tied table of GPT-2 is gathered once for both of its uses."""
    found = gathered(model, **options)
    check_every_rank(found)
    assert error_of(found, found.graphs) < 1.0


def test_each_parameter_is_gathered_once_in_its_block_just_before_its_use() -> None:
    gm = gathered("llama").graphs[0]
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta["key"].startswith("param."):
            (gather,) = node.users
            assert gather.target is convert and gather.args[3] == R and isinstance(gather.args[2], Varying)
            assert {u.meta.get("block") for u in gather.users} == {gather.meta["block"]}
            first = min(
                position[u]
                for g in gm.graph.nodes
                if g.meta.get("parameter")
                and g.target is convert
                and (g is gather or g.meta["block"] == gather.meta["block"] is not None)
                for u in g.users
            )
            between = [n for n, i in position.items() if position[gather] < i < first]
            assert all(n.target is convert and n.meta.get("parameter") for n in between), f"{gather} is gathered too early"


def test_frozen_parameters_are_gathered_and_get_no_gradient() -> None:
    model, batch = zoo.mlp()
    model.get_submodule("layers.1").requires_grad_(False)
    found = typed(prepare(model, batch), plan(dp_shard=RANKS, zero=3))
    check_every_rank(found)
    assert error_of(found, found.graphs) < 1.0
    targets = {n.args[0].meta["key"]: n.args[3] for n in found.graphs[0].graph.nodes if n.target is convert and n.meta["parameter"]}
    assert {key for key, type_ in targets.items() if type_ == I} == {"param.layers.1.weight", "param.layers.1.bias"}
