"""Plan Llama-3-8B for 64 H100s and read what rank 0 will run, on a machine without a GPU.

python examples/emit_on_a_laptop.py | less
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright import Topology, emit, plan

config = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
with torch.device("meta"):
    model = LlamaForCausalLM(config).bfloat16()
batch = {name: torch.empty(1, 8192, dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}

planned = plan(model, Topology.preset("h100", nodes=8), example_inputs=batch)
print(planned.explain(), file=sys.stderr)
print(emit(planned, rank=0).print_readable())
