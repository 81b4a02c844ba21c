import math
from types import SimpleNamespace

import pytest
import torch

from shardwright.compiler.strategy import AXES, Limits, Strategy, StrategyError, factorizations, resolve


def sizes(meshes):
    return {tuple(m.size(a) for a in AXES) for m in meshes}


def device_mesh(names, *shape):
    return SimpleNamespace(mesh=torch.arange(math.prod(shape)).reshape(shape), mesh_dim_names=names)


def test_lists_every_factorization_once():
    found = factorizations(8, Strategy())
    assert len(found) == len(sizes(found)) == math.comb(3 + 3, 3)  # 2^3 into four ordered factors
    assert all(m.world_size == 8 for m in found)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Strategy(dp=8), {(1, 8, 1, 1), (1, 4, 2, 1), (1, 2, 4, 1), (1, 1, 8, 1)}),
        (Strategy(dp=8, zero=0), {(1, 8, 1, 1)}),
        (Strategy(dp=8, zero=3), {(1, 1, 8, 1), (1, 2, 4, 1), (1, 4, 2, 1)}),
        (Strategy(dp_replicate=2, dp_shard=4), {(1, 2, 4, 1)}),
        (Strategy(tp=2, pp=4), {(4, 1, 1, 2)}),
        (Strategy(dp=2, tp=2, pp=2, zero=3), {(2, 1, 2, 2)}),
        (Strategy(tp=8, zero=3), {(1, 1, 1, 8)}),
        (Strategy(sequence_parallel=True, pp=1, zero=0), {(1, 4, 1, 2), (1, 2, 1, 4), (1, 1, 1, 8)}),
    ],
)
def test_agrees_with_pins(strategy, expected):
    assert sizes(factorizations(8, strategy)) == expected


def test_limits_prune_what_is_not_pinned():
    found = sizes(factorizations(64, Strategy(), Limits(tensor=8, stages=4, batch=16, hybrid=False)))
    assert found and all(tp <= 8 and pp <= 4 and r * s <= 16 and (r == 1 or s == 1) for pp, r, s, tp in found)
    assert sizes(factorizations(64, Strategy(tp=64), Limits(tensor=8))) == {(1, 1, 1, 64)}
    with pytest.raises(StrategyError, match="at most 1 for tp, 1 for pp, 2 for data ranks"):
        factorizations(4, Strategy(), Limits(tensor=1, stages=1, batch=2))


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (8, dict(tp=3), r"tp=3 does not divide the 8 ranks: sizes that do are 1, 2, 4, 8"),
        (8, dict(dp=2, tp=2, pp=1), r"= 4, but there are 8 ranks: dp=4 would use them all"),
        (12, dict(dp=4, tp=6), r"dp=4 x tp=6 = 24 does not divide the 12 ranks"),
        (8, dict(dp=4, dp_shard=3), r"dp_shard=3 does not divide dp=4"),
        (8, dict(dp=4, dp_replicate=1, dp_shard=2), r"dp=4, but dp_replicate x dp_shard = 1 x 2 = 2"),
        (8, dict(zero=4), r"zero must be 0, 1, 2 or 3, not 4"),
        (8, dict(tp=0), r"tp must be a positive whole number, not 0"),
        (8, dict(tp=True), r"tp must be a positive whole number, not True"),
        (8, dict(zero=0, dp_shard=2), r"leave out one"),
        (8, dict(schedule="dual"), r"schedule must be"),
        (8, dict(microbatches=2.5), r"microbatches must be a positive whole number"),
    ],
)
def test_refuses_what_cannot_be(world_size, options, message):
    with pytest.raises(StrategyError, match=message):
        factorizations(world_size, Strategy(**options))


def test_free_meshes():
    assert resolve("auto", "auto", 8).world_size == 8
    assert resolve((2, 4), "auto").strategy == Strategy()
    assert resolve(device_mesh(None, 4), None, 4).strategy == Strategy()
    assert resolve(device_mesh(("x", "y"), 2, 2), None, 4).order == AXES
    with pytest.raises(StrategyError, match=r"2 x 3 has 6 ranks, but this job has 8: .* divisors are 1, 2, 4, 8"):
        resolve((2, 3), "auto", 8)
    with pytest.raises(StrategyError, match="needs a torchrun job"):
        resolve("auto", "auto")


def test_named_axes_pin_roles_and_number_the_ranks():
    request = resolve(device_mesh(("dp", "tp"), 2, 4), Strategy(zero=3), 8)
    assert sizes(request.meshes()) == {(1, 1, 2, 4)}
    request = resolve(device_mesh(("tp", "dp_shard"), 2, 4), "auto", 8)
    (mesh,) = request.meshes()
    assert mesh.coordinates(5) == {"tp": 1, "dp_shard": 1}


@pytest.mark.parametrize(
    ("mesh", "strategy", "message"),
    [
        (device_mesh(("dp", "tp"), 2, 4), Strategy(tp=2), r"the mesh has tp=4, but the strategy pins tp=2"),
        (device_mesh(("dp", "tp"), 2, 4), Strategy(pp=2), r"the mesh has pp=1, but the strategy pins pp=2"),
        (device_mesh(("dp", "cp"), 2, 4), None, r"'cp' is reserved"),
        (device_mesh(("dp", "model"), 2, 4), None, r"'model' has no role"),
        (device_mesh(("dp", "dp_shard"), 2, 4), None, r"not both"),
        (SimpleNamespace(mesh=torch.tensor([1, 0]), mesh_dim_names=("dp",)), None, r"in order"),
        ("all", None, r"mesh must be"),
        ((2, -1), None, r"positive whole numbers"),
    ],
)
def test_refuses_meshes_that_contradict(mesh, strategy, message):
    with pytest.raises(StrategyError, match=message):
        resolve(mesh, strategy)
