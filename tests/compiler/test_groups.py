"""Repeated blocks in groups: what is placed together, and in which order blocks are taken."""

from __future__ import annotations

import pytest
from harness import problem_of
from programs import case

from shardwright.compiler.groups import evenly, group_of, regrouped, runs, stand_ins, together
from shardwright.compiler.place import Policy, place
from shardwright.compiler.prices import megatron_prices
from shardwright.passes.graph_tools import metas
from shardwright.passes.rules.base import Axis
from shardwright.passes.types import Type, shard

GRAPH = problem_of(case("gpt", layers=4), [case("gpt", layers=4).batch]).graph
BLOCKS = sorted({n.meta["block"] for n in GRAPH.graph.nodes if n.meta.get("block") is not None})


def test_without_groups_like_blocks_are_alike() -> None:
    assert regrouped(GRAPH, {}) == GRAPH.meta["twins"]
    assert stand_ins(GRAPH, {}) == {BLOCKS[0]: (BLOCKS[0], 1.0)}


def test_what_is_placed_together_is_of_one_group() -> None:
    groups = together(BLOCKS[1:3])
    twins = regrouped(GRAPH, groups)
    nodes = {n.name: n for n in GRAPH.graph.nodes}
    for name, first in twins.items():
        assert group_of(nodes[name], groups) == group_of(nodes[first], groups)
        assert GRAPH.meta["twins"].get(name, name) == GRAPH.meta["twins"].get(first, first)
    counts = [sum(n not in twins for n in found) for found in (nodes, [n for n in nodes if n in GRAPH.meta["twins"]])]
    alike = sum(n not in GRAPH.meta["twins"] for n in nodes)
    inside = len([n for n in nodes if n not in GRAPH.meta["twins"] and n in GRAPH.meta["twins"].values()])
    assert counts == [alike + inside, inside], "each place of a block has two, all others one"
    assert stand_ins(GRAPH, groups) == {BLOCKS[0]: (BLOCKS[0], 1 - 2 / len(BLOCKS)), BLOCKS[1]: (BLOCKS[0], 2 / len(BLOCKS))}


def test_parameters_go_with_the_block_that_reads_them() -> None:
    groups = together(BLOCKS[1:2])
    own = [n for n in GRAPH.graph.nodes if n.op == "placeholder" and group_of(n, groups)]
    assert own and all(f".{BLOCKS[1]}." in n.meta["key"] for n in own)


def test_like_blocks_may_be_pinned_to_other_types() -> None:
    """As where blocks are numbered otherwise at another shape than at the plan's: parameters lie where the plan has them."""
    weights = [k for k in (n.meta["key"] for n in GRAPH.graph.nodes if n.op == "placeholder") if k.endswith("mlp.0.weight")]
    (shape,) = {metas(n)[0].shape for n in GRAPH.graph.nodes if n.op == "placeholder" and n.meta["key"] in weights}
    pinned: dict[str, Type] = {key: shard(k % 2, shape[k % 2], 2) for k, key in enumerate(weights)}
    found = place(GRAPH, Axis("tp", 2), Policy("tensor", pinned, "out.0"), megatron_prices(False))
    assert len(weights) == len(BLOCKS) and {key: found.placeholders[key] for key in weights} == pinned


@pytest.mark.parametrize(
    ("run_of", "stages", "order"),
    [
        ({0: 0, 1: 0, 2: 0}, 1, [(0,), (1,), (2,)]),
        ({k: 0 for k in range(7)}, 2, [(0, 4), (1, 5), (2, 6), (3,)]),
        ({0: 0, 1: 0, 2: 2, 3: 2}, 1, [(0,), (1,), (2,), (3,)]),
        ({0: 0, 1: 0, 2: 2, 3: 2}, 2, [(0, 1), (2, 3)]),
    ],
)
def test_blocks_are_taken_evenly_from_stages(run_of: dict[int, int], stages: int, order: list[tuple[int, ...]]) -> None:
    assert evenly(run_of, stages) == order


def test_runs_are_told_by_their_first_block() -> None:
    assert runs(GRAPH) == dict.fromkeys(BLOCKS, BLOCKS[0])
    pair = case("t5", layers=4)
    found = runs(problem_of(pair, [pair.batch]).graph)
    assert len(set(found.values())) == 2 and all(first <= block for block, first in found.items())
