"""Pin parts of the strategy and see what is planned for the rest. Needs no devices and no torchrun.

python examples/strategies.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright import Strategy, StrategyError, Topology, plan

STRATEGIES = {
    "everything searched": "auto",
    "data parallel": Strategy(dp=8, zero=0),
    "fully sharded (ZeRO-3)": Strategy(dp=8, zero=3),
    "hybrid: replicated over 2, sharded over 4": Strategy(dp_replicate=2, dp_shard=4, zero=3),
    "tensor and sequence parallel": Strategy(tp=8, sequence_parallel=True),
    "three dimensions, 1F1B": Strategy(dp=2, tp=2, pp=2, schedule="1f1b", microbatches=4),
    "tensor parallel by 2, the rest searched": Strategy(tp=2),
    "impossible": Strategy(tp=3),
}

config = LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
batch = {name: torch.empty(8, 512, dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}

for name, strategy in STRATEGIES.items():
    print(f"\n=== {name}: {strategy}")
    try:
        print(plan(model, Topology.preset("h100", devices=8), example_inputs=batch, strategy=strategy).explain())
    except StrategyError as error:
        print(f"refused: {error}")
