"""The whole of it: torchrun --nproc-per-node 4 examples/train.py"""

import torch
from stdlib_text import StdlibText
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright import auto_parallelize

config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
text = StdlibText(length=64)

parallel = auto_parallelize(model, example_inputs=next(iter(DataLoader(text, batch_size=4))))
optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-4)
sampler = DistributedSampler(text, parallel.data_world_size, parallel.data_rank)
for step, batch in zip(range(20), DataLoader(text, batch_size=4, sampler=sampler), strict=False):
    loss = parallel(**{name: x.to(parallel.device) for name, x in batch.items()}).loss
    loss.backward()
    parallel.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")
torch.distributed.destroy_process_group()
