"""What the forward keeps for the backward: no more than it must, and never a parameter."""

from __future__ import annotations

import pytest
import torch
from harness import prepare
from programs import case, plan, program
from torch import Tensor, fx, nn

from shardwright.passes.graph_tools import VIEWS
from shardwright.runtime.program import GraphSpec, RankProgram

aten = torch.ops.aten
LLAMA = {"layers": 2, "num_key_value_heads": 4}
PLANS = {
    "one": {},
    "tp2": {"tp": 2},
    "sequence-parallel": {"tp": 2, "sequence_parallel": True},
    "zero3": {"dp_shard": 2, "zero": 3},
}


def saved(spec: GraphSpec) -> dict[str, fx.Node]:
    output = next(n for n in spec.graph.graph.nodes if n.op == "output")
    return {k: n for k, n in zip(spec.outputs, output.args[0], strict=True) if k.startswith("saved.")}


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory a value lies in."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def nbytes(nodes: list[fx.Node]) -> int:
    return sum(n.meta["val"].nbytes for n in nodes)


def llama(strategy: str) -> RankProgram:
    return program(case("llama", **LLAMA), plan(**PLANS[strategy]))


@pytest.mark.parametrize("strategy", PLANS)
def test_forward_and_backward_agree_on_what_is_saved(strategy: str) -> None:
    found = llama(strategy)
    kept = saved(found.graphs["forward"])
    taken = {k for k in found.graphs["backward"].inputs if k.startswith("saved.")}
    assert set(kept) == taken and kept


@pytest.mark.parametrize("strategy", PLANS)
def test_no_memory_is_saved_twice(strategy: str) -> None:
    kept = saved(llama(strategy).graphs["forward"])
    bases = [storage(n) for n in kept.values()]
    assert len(set(bases)) == len(bases), "a view is saved beside its base, or beside another view of it"


@pytest.mark.parametrize("strategy", PLANS)
def test_parameters_and_inputs_are_taken_and_not_saved(strategy: str) -> None:
    for key, node in saved(llama(strategy).graphs["forward"]).items():
        base = storage(node)
        assert base.op != "placeholder", f"{key} is {base.meta['key']}"


def test_gathered_parameters_are_never_saved() -> None:
    """ZeRO-3 saves what one device with that batch saves; the backward gathers the weights again."""
    found = llama("zero3")
    kept = list(saved(found.graphs["forward"]).values())
    assert not any(_comes_from_parameters_alone(n) for n in kept)
    assert any(k.startswith("param.") for k in found.graphs["backward"].inputs)
    one = list(saved(llama("one").graphs["forward"]).values())
    masks = case("llama", **LLAMA).batch * 1024  # what differs: counts and masks of the batch
    assert nbytes(kept) <= nbytes(one) / 2 + masks


@pytest.mark.parametrize("strategy", PLANS)
def test_what_follows_cheaply_from_what_is_kept_is_not_kept(strategy: str) -> None:
    """A norm keeps its input and a number a row: neither the normalized rows nor these times the weight."""
    found = llama(strategy)
    kept = set(saved(found.graphs["forward"]).values())
    rebuilt = {n.target for n in found.graphs["backward"].graph.graph.nodes if n.meta.get("phase") == "forward"}
    assert aten.mul.Tensor in rebuilt
    for node in kept:
        sources = {storage(n) for n in node.all_input_nodes}
        assert node.target is not aten.mul.Tensor or not sources <= {storage(n) for n in kept}, node


def _comes_from_parameters_alone(node: fx.Node) -> bool:
    leaves, stack = [], [node]
    while stack:
        n = stack.pop()
        leaves += [n] if n.op == "placeholder" else []
        stack.extend(n.all_input_nodes)
    return bool(leaves) and all(n.meta["key"].startswith("param.") for n in leaves)


def test_tensor_parallelism_saves_less() -> None:
    """Sharded activations are saved as shards; under sequence parallelism the rest is sharded too (Korthikanti et al. 2022)."""
    sizes = {s: nbytes(list(saved(llama(s).graphs["forward"]).values())) for s in ("one", "tp2", "sequence-parallel")}
    assert sizes["tp2"] < 0.75 * sizes["one"]
    assert sizes["sequence-parallel"] < 0.7 * sizes["one"]  # what is gathered for products is kept whole


def test_a_small_view_is_saved_instead_of_its_base() -> None:
    """One row of a large value: keeping the base for it would keep everything."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.head = nn.Linear(5, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.head(self.wide(x)[:, 0]) ** 2).sum()

    spec = program(prepare(Head(), {"x": torch.randn(2, 16, 5)}), plan()).graphs["forward"]
    shapes = {tuple(n.meta["val"].shape) for n in saved(spec).values()}
    assert (2, 64) in shapes and (2, 16, 64) not in shapes


@pytest.mark.parametrize("model", ["gpt2", "bert", "vit", "resnet"])
def test_of_several_results_those_are_kept_that_are_read(model: str) -> None:
    """A norm's mean beside what follows from it, and not the tuple of all its results, which has these again."""
    kept = saved(program(case(model), plan()).graphs["forward"])
    assert all(isinstance(node.meta["val"], Tensor) for node in kept.values()), list(kept)


def test_indices_are_kept_without_what_they_are_indices_of() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x).topk(3).values.sum()

    kept = saved(program(prepare(Pool(), {"x": torch.randn(4, 8)}), plan()).graphs["forward"])
    assert [n.meta["val"].dtype for n in kept.values()] == [torch.int64]
