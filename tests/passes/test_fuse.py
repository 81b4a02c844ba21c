"""Heads that are repeated for groups of query heads go to the attention op as they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare, emit_all, prepare, run
from programs import plan, shares
from torch import Tensor, nn

from shardwright.passes.ops.collectives import ops


class Shared(nn.Module):
    """Four query heads over two key and value heads; `repeat` makes four of them."""

    def __init__(self, repeat: str) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, 4)).transpose(1, 2) for w in (self.q, self.k, self.v))
        if self.repeat == "by torch":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).pow(2).mean()
        if self.repeat == "interleave":
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        else:
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(*q.shape) for t in (k, v))
        if self.repeat == "one for both":
            v = k
        elif self.repeat == "used elsewhere":
            return F.scaled_dot_product_attention(q, k, v).pow(2).mean() + v.sin().sum()
        return F.scaled_dot_product_attention(q, k, v).pow(2).mean()


@pytest.mark.parametrize("repeat", ["by torch", "interleave", "expand", "one for both", "used elsewhere"])
@pytest.mark.parametrize(
    ("options", "heads"), [({}, [4, 2, 2]), ({"tp": 2}, [2, 1, 1]), ({"dp_shard": 2, "zero": 3}, [4, 2, 2])], ids=str
)
def test_repeated_heads(repeat: str, options: dict[str, int], heads: list[int]) -> None:
    torch.manual_seed(0)
    case, wanted = prepare(Shared(repeat), {"x": torch.randn(4, 6, 16)}), plan(**options)
    programs = emit_all(case, wanted, shares(case, wanted))
    nodes = programs[0].graphs["forward"].graph.graph.nodes
    (attention,) = (n for n in nodes if n.target is ops.attention.default)
    assert [n.meta["val"].shape[1] for n in attention.args[:3]] == heads
    assert compare(case, programs, run(case, programs)) < 1e-9
