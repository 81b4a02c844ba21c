"""Tiny random models for tests of equality, each with a batch: `model, batch = MODELS["llama"]()`.

Models are in float32 and training mode; `model.double()` works for each. Sizes are small and, where the architecture
allows, odd.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import itertools

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Tensor]
BATCH, LENGTH, VOCABULARY = 4, 12, 97


def _tokens(*shape: int, high: int = VOCABULARY) -> Tensor:
    return torch.randint(0, high, shape)


def _masked(labels: Tensor) -> Tensor:
    """Some labels left out of the loss, unevenly over the batch."""
    labels = labels.clone()
    labels[0, labels.shape[1] // 2 :] = -100
    labels[-1, :2] = -100
    return labels


def llama(
    layers: int = 2, dropout: float = 0.0, batch: int = BATCH, length: int = LENGTH, **options: Any
) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = hf.LlamaConfig(**{**sizes, **options}, num_hidden_layers=layers, attention_dropout=dropout)
    tokens = _tokens(batch, length, high=config.vocab_size)
    return hf.LlamaForCausalLM(config).train(), {"input_ids": tokens, "labels": _masked(tokens)}


def gpt2(layers: int = 2, dropout: float = 0.0, batch: int = BATCH, length: int = LENGTH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=64, **drops)
    tokens = _tokens(batch, length)
    return hf.GPT2LMHeadModel(config).train(), {"input_ids": tokens, "labels": _masked(tokens)}


def bert(layers: int = 2, dropout: float = 0.0, batch: int = BATCH, length: int = LENGTH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    config = hf.BertConfig(**sizes, num_hidden_layers=layers, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    attention = torch.ones(batch, length, dtype=torch.long)
    attention[1, length // 2 + 1 :] = 0
    attention[-1, length - 2 :] = 0
    labels = torch.where(attention.bool(), _tokens(batch, length), -100)
    model = hf.BertForMaskedLM(config).train()
    return model, {"input_ids": _tokens(batch, length), "attention_mask": attention, "labels": _masked(labels)}


def t5(layers: int = 2, dropout: float = 0.0, batch: int = BATCH, length: int = LENGTH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "decoder_start_token_id": 0}
    config = hf.T5Config(**sizes, num_layers=layers, dropout_rate=dropout)
    labels = _masked(_tokens(batch, length - 3))
    return hf.T5ForConditionalGeneration(config).train(), {"input_ids": _tokens(batch, length), "labels": labels}


def vit(layers: int = 2, dropout: float = 0.0, batch: int = BATCH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": 10,
    }
    config = hf.ViTConfig(**sizes, num_hidden_layers=layers, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return hf.ViTForImageClassification(config).train(), {
        "pixel_values": torch.randn(batch, 3, 16, 16),
        "labels": _tokens(batch, high=10),
    }


def mixtral(layers: int = 2, dropout: float = 0.0, batch: int = BATCH, length: int = LENGTH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = hf.MixtralConfig(
        **sizes, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2, attention_dropout=dropout
    )
    tokens = _tokens(batch, length)
    return hf.MixtralForCausalLM(config).train(), {"input_ids": tokens, "labels": _masked(tokens)}


def resnet(batch: int = BATCH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=10)
    return hf.ResNetForImageClassification(config).train(), {
        "pixel_values": torch.randn(batch, 3, 16, 16),
        "labels": _tokens(batch, high=10),
    }


class HandAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(b, s, w))


class HandBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = HandAttention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width + 1), nn.GELU(), nn.Linear(2 * width + 1, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Adapted(nn.Module):
    """Frozen layers with low-rank adapters, merged into their weights in the forward, and a head that is trained."""

    def __init__(self, width: int = 24, layers: int = 3, rank: int = 4) -> None:
        super().__init__()
        self.frozen = nn.ParameterList(nn.Parameter(torch.randn(width, width) * 0.1, requires_grad=False) for _ in range(layers))
        self.down = nn.ParameterList(nn.Parameter(torch.randn(rank, width) * 0.1) for _ in range(layers))
        self.up = nn.ParameterList(nn.Parameter(torch.randn(width, rank) * 0.1) for _ in range(layers))
        self.head = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for weight, down, up in zip(self.frozen, self.down, self.up, strict=True):
            x = torch.tanh(F.linear(x, weight + up @ down))
        return F.mse_loss(self.head(x), y)


class HandGPT(nn.Module):
    """A GPT written by hand: fused qkv, learned positions, untied head; nothing about it is a power of two."""

    def __init__(
        self, width: int = 21, heads: int = 3, layers: int = 2, vocabulary: int = 37, length: int = 11, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(HandBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()), "logits": logits}


def gpt(layers: int = 2, dropout: float = 0.0, batch: int = BATCH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = HandGPT(layers=layers, dropout=dropout)
    tokens = _tokens(batch, 12, high=37)
    return model.train(), {"tokens": tokens[:, :-1].clone(), "targets": _masked(tokens[:, 1:])}


class HandMLP(nn.Module):
    """Layers of odd widths; mean squared error."""

    def __init__(self, sizes: tuple[int, ...] = (13, 27, 19, 5), dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.dropout(torch.tanh(layer(x)))
        return F.mse_loss(self.layers[-1](x), y)


def mlp(dropout: float = 0.0, batch: int = BATCH, layers: int = 3) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    sizes = (13, *(27 - 2 * k for k in range(layers - 1)), 5)
    return HandMLP(sizes, dropout).train(), {"x": torch.randn(batch, 13), "y": torch.randn(batch, 5)}


class HandLSTM(nn.Module):
    """Two layers of an LSTM over a short sequence."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, inner, num_layers=2, batch_first=True), nn.Linear(inner, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.lstm(x)[0]), y)


def lstm(batch: int = BATCH, inner: int = 6) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    return HandLSTM(inner).train(), {"x": torch.randn(batch, 4, 5), "y": torch.randn(batch, 4, 3)}


MODELS: dict[str, Callable[..., tuple[nn.Module, Batch]]] = {
    "llama": llama,
    "llama4": lambda **options: llama(layers=4, **options),
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
    "resnet": resnet,
    "gpt": gpt,
    "mlp": mlp,
    "lstm": lstm,
}
