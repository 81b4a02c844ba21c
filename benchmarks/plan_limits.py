"""Plans under limits of memory: of models of a middle size, what fits in ever fewer bytes, and how near it is to the fastest.

python -m benchmarks.plan_limits
python -m benchmarks.plan_limits --only vit-large --shares 0.5,0.25

A limit is a share of what the fastest plan takes without one. The gap is what the plan proves: none that fits is faster by more.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._report import GIB, print_table, write_json

Batch = dict[str, torch.Tensor]
Sizes = dict[str, Any]


def tokens(rows: int, length: int) -> Batch:
    return {name: torch.empty(rows, length, dtype=torch.int64) for name in ("input_ids", "labels")}


def gpt2_xl() -> tuple[nn.Module, Batch]:
    """Radford et al. 2019, table 2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: Sizes = {"n_layer": 48, "n_embd": 1600, "n_head": 25, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes)), tokens(4, 1024)


def llama_1b() -> tuple[nn.Module, Batch]:
    """Llama 3.2 1B: its published configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**sizes)), tokens(2, 4096)


def t5_large() -> tuple[nn.Module, Batch]:
    """Raffel et al. 2020, section 3.7."""
    return t5(4, d_model=1024, d_ff=4096, num_heads=16, num_layers=24)


def t5_small() -> tuple[nn.Module, Batch]:
    """The same: few blocks, of which each counts."""
    return t5(8, d_model=512, d_ff=2048, num_heads=8, num_layers=6)


def t5(rows: int, **sizes: Any) -> tuple[nn.Module, Batch]:
    from transformers import T5Config, T5ForConditionalGeneration

    fixed: Sizes = {"d_kv": 64, "decoder_start_token_id": 0, "use_cache": False}
    return T5ForConditionalGeneration(T5Config(**fixed, **sizes)), tokens(rows, 512)


def vit_large() -> tuple[nn.Module, Batch]:
    """Dosovitskiy et al. 2021, table 1."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: Sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    sizes |= {"num_labels": 1000}
    images = torch.empty(16, 3, 224, 224, dtype=torch.bfloat16)
    model = ViTForImageClassification(ViTConfig(**sizes))
    return model, {"pixel_values": images, "labels": torch.empty(16, dtype=torch.int64)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "llama-1b": llama_1b,
    "gpt2-xl": gpt2_xl,
    "vit-large": vit_large,
    "t5-large": t5_large,
    "t5-small": t5_small,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="models, by name: vit-large,t5-large")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--topology", default="h100")
    parser.add_argument("--shares", default="0.8,0.6,0.45,0.35,0.25")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(MODELS)
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        parser.error(f"no models {', '.join(unknown)}; there are {', '.join(MODELS)}")
    warnings.simplefilter("ignore")  # of outputs that are left out

    found = []
    for name in names:
        shares = [None, *map(float, options.shares.split(","))]
        found += limited(name, options.topology, options.devices, shares)
    rows = [[r["model"], *(f"{r[k]:.2f}" if r[k] else "-" for k in ("limit", "peak")), *row_of(r)] for r in found]
    columns = ["model", "limit, GiB", "peak, GiB", "ms a sample", "gap", "seconds to plan", "plan"]
    print_table(f"Plans on {options.devices} {options.topology}", columns, rows)
    write_json(options.json, {"plans": found})
    return 0


def row_of(found: dict[str, Any]) -> list[str]:
    if "plan" not in found:
        return ["-", "-", f"{found['seconds']:.1f}", found["why"]]
    return [f"{found['sample'] * 1e3:.2f}", f"{found['gap']:.2%}", f"{found['seconds']:.1f}", found["plan"]]


def limited(name: str, preset: str, devices: int, shares: list[float | None]) -> list[dict[str, Any]]:
    """The plan for each share of the bytes that the first takes, None for no limit. Times in seconds, sizes in GiB."""
    from shardwright import Topology, plan
    from shardwright.compiler.choose import DoesNotFit

    with torch.device("meta"):
        model, batch = MODELS[name]()
    model = model.bfloat16().train()
    topology, found, peak = Topology.preset(preset, devices=devices), [], 0.0
    for share in shares:
        start, limit = time.perf_counter(), None if share is None else int(share * peak)
        row: dict[str, Any] = {"model": name, "limit": (limit or 0) / GIB, "peak": 0.0}
        try:
            made = plan(model, topology, example_inputs=batch, memory_limit=limit).plan
            assert made.predicted is not None
            peak = peak or made.predicted.peak_bytes
            samples = made.data_size * next(iter(batch.values())).shape[0]
            row |= {"plan": made.name, "sample": made.predicted.step_seconds / samples, "gap": made.predicted.gap}
            row["peak"] = made.predicted.peak_bytes / GIB
        except DoesNotFit:
            row["why"] = "nothing fits"
        row["seconds"] = time.perf_counter() - start
        print(", ".join([name, "-" if share is None else f"{share:.0%}", *row_of(row)]), flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
