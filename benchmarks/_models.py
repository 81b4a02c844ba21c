"""The models that the benchmarks train: Llama as in transformers, and a plain one that torch.distributed.pipelining can trace."""

from __future__ import annotations

import os
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Sizes:
    """batch: samples of the global batch; length: tokens of a sample."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 4096
    length: int = 128
    batch: int = 16
    microbatches: int = 4

    @property
    def hidden(self) -> int:
        """Width of the MLP: 8/3 of the model's, in multiples of 64, as Llama has it."""
        return -(-8 * self.width // 3 // 64) * 64


def hf_llama(sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


PUBLISHED = {
    # Llama 3 (Grattafiori et al. 2024, table 3): layers, width, MLP width, heads; 8 key-value heads, vocabulary 128,256.
    "llama3-8b": (32, 4096, 14336, 32),
    "llama3-70b": (80, 8192, 28672, 64),
    "llama3-405b": (126, 16384, 53248, 128),
}


def meta_llama(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A published model on the meta device."""
    layers, width, hidden, heads = PUBLISHED[name]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    return nn.Module.to(model, dtype)


class Attention(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.width // sizes.heads
        self.q = nn.Linear(sizes.width, sizes.width, bias=False)
        self.k = nn.Linear(sizes.width, sizes.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(sizes.width, sizes.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(sizes.width, sizes.width, bias=False)
        angles = torch.outer(torch.arange(sizes.length), 10000.0 ** -torch.linspace(0, 1, self.head_dim // 2 + 1)[:-1])
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.attention = Attention(sizes)
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    """Tokens [batch, length] to logits [batch, length, vocabulary]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean over all but the last position: position t predicts token t + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class PlainLlamaLoss(nn.Module):
    """The same with its loss inside, as shardwright takes it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.model = PlainLlama(sizes)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return next_token_loss(self.model(tokens), labels)
