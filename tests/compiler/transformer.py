"""A transformer's training step in closed form, out of the cost model's own parts: what tests compare with published step times."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardwright.compiler.cost import ATTENTION_BACKWARD, op_seconds
from shardwright.compiler.topology import Topology, collective_seconds
from shardwright.passes.ops.collectives import ops
from shardwright.passes.rules.base import OpCall, Operand, TensorMeta
from shardwright.runtime.program import Mesh

aten = torch.ops.aten
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Run:
    """A training run: model, mesh, batch. `ffn_products`: 2, or 3 for a gated one. Recompute: "none", "selective" or "full"."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    seq: int
    dp: int
    tp: int
    pp: int
    global_batch: int
    micro_batch: int
    ffn_products: int = 2
    zero: int = 0
    recompute: str = "none"
    sequence_parallel: bool = False

    @property
    def microbatches(self) -> int:
        return max(1, self.global_batch // (self.dp * self.micro_batch))

    @property
    def layer_parameters(self) -> int:
        head = self.hidden // self.heads
        return self.hidden * (2 * self.hidden + 2 * head * self.kv_heads) + self.ffn_products * self.hidden * self.ffn


def linear(rows: int, k: int, n: int) -> OpCall:
    metas = (TensorMeta((rows, k), BF16), TensorMeta((n, k), BF16))
    return OpCall(aten.linear.default, (Operand(0), Operand(1)), {}, metas, (TensorMeta((rows, n), BF16),))


def attention(run: Run) -> OpCall:
    q = TensorMeta((run.micro_batch, run.heads // run.tp, run.seq, run.hidden // run.heads), BF16)
    args = (*map(Operand, range(3)), None, True, 1.0)
    return OpCall(ops.attention.default, args, {}, (q, q, q), (q, TensorMeta(q.shape[:3], torch.float32)))


def pointwise(rows: int, width: int) -> OpCall:
    x = TensorMeta((rows, width), BF16)
    return OpCall(aten.mul.Tensor, (Operand(0), Operand(1)), {}, (x, x), (x,))


def layer_seconds(run: Run, topology: Topology) -> tuple[float, float]:
    """(forward, backward) compute of one layer and micro-batch on one rank."""
    device, rows, t = topology.device, run.micro_batch * run.seq, run.tp
    head = run.hidden // run.heads
    products = [
        linear(rows, run.hidden, (run.hidden + 2 * head * run.kv_heads) // t),
        linear(rows, run.hidden // t, run.hidden),
        *[linear(rows, run.hidden, run.ffn // t)] * (run.ffn_products - 1),
        linear(rows, run.ffn // t, run.hidden),
    ]
    # Norms, residuals and rotary embeddings, fused: about 4 passes over the residual stream and 2 over the hidden layer.
    share = t if run.sequence_parallel else 1
    cheap = 4 * op_seconds(pointwise(rows // share, run.hidden), device) + 2 * op_seconds(pointwise(rows, run.ffn // t), device)
    dense, fused = sum(op_seconds(p, device) for p in products), op_seconds(attention(run), device)
    return dense + fused + cheap, 2 * dense + ATTENTION_BACKWARD * fused + 2 * cheap


def step_seconds(run: Run, topology: Topology) -> float:
    """Seconds of one optimizer step."""
    mesh = Mesh(("pp", "dp", "tp"), (run.pp, run.dp, run.tp))
    tp, dp = topology.span(mesh, "tp"), topology.span(mesh, "dp")
    forward, backward = layer_seconds(run, topology)
    again = {"none": 0.0, "selective": 0.1, "full": 1.0}[run.recompute]
    activation = 2 * run.micro_batch * run.seq * run.hidden
    reduces = 4 + 2 * (run.recompute == "full")
    tensor = reduces * collective_seconds("all_reduce", activation, tp)
    head = linear(run.micro_batch * run.seq, run.hidden, run.vocab // run.tp)
    per_microbatch = run.layers / run.pp * (forward * (1 + again) + backward + tensor)
    per_microbatch += 3 * op_seconds(head, topology.device) / run.pp
    transfer = collective_seconds("send", activation / run.tp, topology.span(mesh, "pp")) if run.pp > 1 else 0.0
    compute = (per_microbatch + 2 * transfer) * (run.microbatches + run.pp - 1)
    parameters = 2 * (run.layers * run.layer_parameters + run.vocab * run.hidden) / (run.tp * run.pp)
    if run.zero == 3:
        gathers = 2 * collective_seconds("all_gather", parameters, dp)
        data = (gathers + collective_seconds("reduce_scatter", parameters, dp)) * run.microbatches
    else:
        data = collective_seconds("all_reduce", parameters, dp)
    hidden = min(data * topology.overlap.get("data", 0.0), compute)
    held = parameters / 2 / (run.dp if run.zero else 1)
    update = held * 26 / (topology.device.bandwidth * topology.device.memory_efficiency)  # 13 bytes read, 13 written
    return compute + data - hidden + update
