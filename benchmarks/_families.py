"""The model families of benchmarks/model_sweep.py: each one row of a table, built small with random weights, no download.

A row names a class of `transformers` or `diffusers`, the sizes that its configuration does not share with the others, and what it
is called with. Sizes that most configurations know by one name are in `SIZES`; dropout is off everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Any]
BATCH, LENGTH, VOCABULARY, LABELS, IMAGE = 8, 16, 96, 8, 32

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


@dataclass(frozen=True)
class Family:
    """name      as in the table
    kind      decoder, encoder, encoder-decoder, vision, audio, multimodal, mixture of experts, state space, diffusion
    model     class name in `library`
    inputs    makes the keyword arguments of a call from the configuration
    sizes     of the configuration, beyond `SIZES`; nested configurations are mappings
    loss      the model's own where None, else `loss(output, target)`
    """

    name: str
    kind: str
    model: str
    inputs: Callable[[Any], Batch]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    library: str = "transformers"
    loss: Callable[[Any, Any], Tensor] | None = None

    def build(self) -> tuple[nn.Module, Batch]:
        """The model in training mode, float32, and a batch of `BATCH` samples."""
        import importlib

        torch.manual_seed(0)
        cls = getattr(importlib.import_module(self.library), self.model)
        if self.library == "diffusers":
            model = cls(**self.sizes)
            batch = self.inputs(model.config)
        else:
            config = configuration(cls.config_class, self.sizes)
            model = cls(config)
            batch = self.inputs(config)
        model.train()
        if self.loss is not None:
            with torch.no_grad():
                batch["target"] = torch.randn_like(first_tensor(model(**batch)))
        return model, batch


def configuration(cls: type, sizes: Mapping[str, Any]) -> Any:
    """A configuration of class `cls`: `SIZES` as far as it knows them, then `sizes`, and every rate of dropout zero."""
    plain = cls()
    renamed = getattr(cls, "attribute_map", {})
    known = {renamed.get(k, k): v for k, v in SIZES.items() if _takes(plain, k) or k in ("num_labels", "use_cache")}
    config = cls(**{**known, **sizes})
    without_dropout(config)
    return config


def _takes(config: Any, name: str) -> bool:
    """Whether a configuration has one number of this name, as a field."""
    name = type(config).attribute_map.get(name, name)
    return name in vars(config) and not isinstance(vars(config)[name], list | tuple)


def without_dropout(config: Any) -> None:
    """Set every rate of dropout in a configuration, and in those nested in it, to zero."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict") and hasattr(value, "attribute_map"):
            without_dropout(value)


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def squared_error(output: Any, target: Tensor) -> Tensor:
    return F.mse_loss(first_tensor(output), target)


def tokens(config: Any = None, length: int = LENGTH, high: int = VOCABULARY, batch: int = BATCH) -> Tensor:
    """Ids above the special ones."""
    return torch.randint(3, high, (batch, length))


def masked(labels: Tensor) -> Tensor:
    """Some labels left out of the loss, unevenly over the batch."""
    labels = labels.clone()
    labels[0, labels.shape[1] // 2 :] = -100
    labels[-1, :2] = -100
    return labels


def text(config: Any) -> Batch:
    """A language model's call: tokens and labels."""
    ids = tokens()
    return {"input_ids": ids, "labels": masked(ids)}


def padded_text(config: Any) -> Batch:
    """The same with padding behind some samples."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, -5:] = 0
    mask[-1, -2:] = 0
    return {**text(config), "attention_mask": mask}


def text_pair(config: Any) -> Batch:
    """A translation's call: source and target of other lengths."""
    return {"input_ids": tokens(), "labels": masked(tokens(length=LENGTH - 4))}


def masked_text_pair(config: Any) -> Batch:
    """The same, with the masks that say that nothing is padding."""
    pair = text_pair(config)
    masks = {"attention_mask": torch.ones_like(pair["input_ids"]), "decoder_attention_mask": torch.ones_like(pair["labels"])}
    return {**pair, **masks}


def labelled_text(config: Any) -> Batch:
    return {"input_ids": tokens(), "labels": torch.randint(0, LABELS, (BATCH,))}


def images(config: Any = None, size: int = IMAGE) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


def labelled_images(config: Any) -> Batch:
    return {"pixel_values": images(), "labels": torch.randint(0, LABELS, (BATCH,))}


def segmented_images(config: Any) -> Batch:
    return {"pixel_values": images(), "labels": torch.randint(0, LABELS, (BATCH, IMAGE, IMAGE))}


def image_and_text(config: Any) -> Batch:
    return {"pixel_values": images(), "input_ids": tokens(), "return_loss": True}


CLIP_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_TEXT |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1}
CLIP_IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_IMAGE |= {"image_size": IMAGE, "patch_size": 8}
SEQ2SEQ = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}
SEQ2SEQ |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2}
SPEECH = {
    "vocab_size": 32,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "apply_spec_augment": False,
}
SPEECH |= {"classifier_proj_size": 16, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def image_then_text(config: Any) -> Batch:
    """An image token stands in the text for every patch of the image."""
    patches = (IMAGE // 8) ** 2
    ids = tokens(length=patches + 8, high=VOCABULARY - 2)
    ids[:, 2 : 2 + patches] = config.image_token_id
    return {"input_ids": ids, "pixel_values": images(), "labels": masked(ids)}


def waveform(config: Any) -> Batch:
    return {"input_values": torch.randn(BATCH, 640), "labels": torch.randint(0, LABELS, (BATCH,))}


def spectrogram_to_text(config: Any) -> Batch:
    return {
        "input_features": torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions),
        "labels": masked(tokens(length=12)),
    }


def spectrogram(config: Any) -> Batch:
    return {
        "input_values": torch.randn(BATCH, config.max_length, config.num_mel_bins),
        "labels": torch.randint(0, LABELS, (BATCH,)),
    }


def text_about_image(config: Any) -> Batch:
    return {
        "pixel_values": images(),
        "input_ids": tokens(),
        "labels": torch.randint(0, LABELS, (BATCH,)).float()[:, None].expand(-1, LABELS).clone(),
    }


def noisy_images(config: Any) -> Batch:
    return {"sample": images(), "timestep": torch.randint(0, 1000, (BATCH,))}


def conditioned_images(config: Any) -> Batch:
    return {
        "sample": torch.randn(BATCH, 4, 16, 16),
        "timestep": torch.randint(0, 1000, (BATCH,)),
        "encoder_hidden_states": torch.randn(BATCH, 6, 32),
    }


def classed_images(config: Any) -> Batch:
    labels = torch.randint(0, config.num_embeds_ada_norm, (BATCH,))
    return {"hidden_states": torch.randn(BATCH, 4, 8, 8), "timestep": torch.randint(0, 1000, (BATCH,)), "class_labels": labels}


def packed_images(config: Any) -> Batch:
    """Images as rows of patches with their places, and a text."""
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": torch.randn(BATCH, 16, config.in_channels),
        "encoder_hidden_states": torch.randn(BATCH, 6, config.joint_attention_dim),
        "pooled_projections": torch.randn(BATCH, config.pooled_projection_dim),
        "timestep": torch.rand(BATCH),
        "img_ids": places,
        "txt_ids": torch.zeros(6, 3),
    }


def series(config: Any) -> Batch:
    return {
        "past_values": torch.randn(BATCH, config.context_length, config.num_input_channels),
        "future_values": torch.randn(BATCH, config.prediction_length, config.num_input_channels),
    }


FAMILIES: tuple[Family, ...] = (
    Family("llama", "decoder", "LlamaForCausalLM", padded_text),
    Family("gpt2", "decoder", "GPT2LMHeadModel", padded_text),
    Family("mistral", "decoder", "MistralForCausalLM", text, {"sliding_window": 8}),
    Family("qwen3", "decoder", "Qwen3ForCausalLM", text),
    Family(
        "gemma3",
        "decoder",
        "Gemma3ForCausalLM",
        text,
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family("phi3", "decoder", "Phi3ForCausalLM", text),
    Family("olmo2", "decoder", "Olmo2ForCausalLM", text),
    Family("opt", "decoder", "OPTForCausalLM", padded_text, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Family("bloom", "decoder", "BloomForCausalLM", padded_text),
    Family("gpt-neox", "decoder", "GPTNeoXForCausalLM", text),
    Family("gpt-neo", "decoder", "GPTNeoForCausalLM", text, {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    Family("gpt-j", "decoder", "GPTJForCausalLM", text, {"rotary_dim": 4}),
    Family("falcon", "decoder", "FalconForCausalLM", text),
    Family("mpt", "decoder", "MptForCausalLM", text, {"max_seq_len": 64}),
    Family(
        "cohere2",
        "decoder",
        "Cohere2ForCausalLM",
        text,
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ),
    Family("stablelm", "decoder", "StableLmForCausalLM", text),
    Family("starcoder2", "decoder", "Starcoder2ForCausalLM", text),
    Family("bert", "encoder", "BertForMaskedLM", padded_text),
    Family("roberta", "encoder", "RobertaForSequenceClassification", labelled_text),
    Family("albert", "encoder", "AlbertForMaskedLM", padded_text, {"embedding_size": 16}),
    Family("electra", "encoder", "ElectraForMaskedLM", text, {"embedding_size": 16}),
    Family(
        "deberta-v2",
        "encoder",
        "DebertaV2ForMaskedLM",
        padded_text,
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "pooler_hidden_size": 32,
        },
    ),
    Family(
        "modernbert",
        "encoder",
        "ModernBertForMaskedLM",
        padded_text,
        {"local_attention": 8, "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    Family("xlnet", "encoder", "XLNetLMHeadModel", text, {"d_inner": 64, "d_head": 8}),
    Family("fnet", "encoder", "FNetForMaskedLM", text),
    Family("convbert", "encoder", "ConvBertForMaskedLM", text, {"embedding_size": 16, "conv_kernel_size": 3}),
    Family(
        "funnel", "encoder", "FunnelForMaskedLM", text, {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64, "num_decoder_layers": 1}
    ),
    Family("t5", "encoder-decoder", "T5ForConditionalGeneration", text_pair, {"d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0}),
    Family("bart", "encoder-decoder", "BartForConditionalGeneration", text_pair, SEQ2SEQ),
    Family("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", text_pair, SEQ2SEQ),
    Family(
        "led",
        "encoder-decoder",
        "LEDForConditionalGeneration",
        text_pair,
        {**SEQ2SEQ, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    ),
    Family("vit", "vision", "ViTForImageClassification", labelled_images),
    Family("beit", "vision", "BeitForImageClassification", labelled_images, {"use_relative_position_bias": True}),
    Family("dinov2", "vision", "Dinov2ForImageClassification", labelled_images),
    Family(
        "swin",
        "vision",
        "SwinForImageClassification",
        labelled_images,
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
    ),
    Family(
        "convnext",
        "vision",
        "ConvNextForImageClassification",
        labelled_images,
        {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "patch_size": 4},
    ),
    Family(
        "resnet",
        "vision",
        "ResNetForImageClassification",
        labelled_images,
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]},
    ),
    Family(
        "regnet",
        "vision",
        "RegNetForImageClassification",
        labelled_images,
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "groups_width": 8},
    ),
    Family(
        "segformer",
        "vision",
        "SegformerForSemanticSegmentation",
        segmented_images,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    Family(
        "mobilevit",
        "vision",
        "MobileViTForImageClassification",
        labelled_images,
        {"hidden_sizes": [16, 16, 32], "neck_hidden_sizes": [8, 8, 8, 16, 16, 32, 32], "patch_size": 1, "expand_ratio": 2.0},
    ),
    Family(
        "whisper",
        "audio",
        "WhisperForConditionalGeneration",
        spectrogram_to_text,
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 24},
    ),
    Family("wav2vec2", "audio", "Wav2Vec2ForSequenceClassification", waveform, SPEECH),
    Family(
        "ast",
        "audio",
        "ASTForAudioClassification",
        spectrogram,
        {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
    Family(
        "clip",
        "multimodal",
        "CLIPModel",
        image_and_text,
        {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 24},
    ),
    Family("siglip", "multimodal", "SiglipModel", image_and_text, {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE}),
    Family("vilt", "multimodal", "ViltForQuestionAnswering", text_about_image),
    Family(
        "llava",
        "multimodal",
        "LlavaForConditionalGeneration",
        image_then_text,
        {
            "text_config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": VOCABULARY,
                "use_cache": False,
            },
            "vision_config": {"model_type": "clip_vision_model", **CLIP_IMAGE},
            "image_token_id": VOCABULARY - 1,
        },
    ),
    Family(
        "patchtst",
        "time series",
        "PatchTSTForPrediction",
        series,
        {
            "num_input_channels": 4,
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "ffn_dim": 64,
            "loss": "mse",
        },
    ),
    Family("mixtral", "mixture of experts", "MixtralForCausalLM", text, {"num_local_experts": 4}),
    Family("qwen3-moe", "mixture of experts", "Qwen3MoeForCausalLM", text, {"num_experts": 4, **EXPERTS}),
    Family(
        "deepseek-v3",
        "mixture of experts",
        "DeepseekV3ForCausalLM",
        text,
        {
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": 4,
            **EXPERTS,
        },
    ),
    Family(
        "gpt-oss",
        "mixture of experts",
        "GptOssForCausalLM",
        text,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    Family(
        "switch",
        "mixture of experts",
        "SwitchTransformersForConditionalGeneration",
        masked_text_pair,
        {
            "d_kv": 8,
            "d_ff": 64,
            "decoder_start_token_id": 0,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "router_jitter_noise": 0.0,
            "num_decoder_layers": 2,
        },
    ),
    Family("mamba", "state space", "MambaForCausalLM", text, {"state_size": 4, "time_step_rank": 4}),
    Family(
        "mamba2",
        "state space",
        "Mamba2ForCausalLM",
        text,
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    Family("rwkv", "state space", "RwkvForCausalLM", text, {"attention_hidden_size": 32}),
    Family(
        "recurrent-gemma",
        "state space",
        "RecurrentGemmaForCausalLM",
        text,
        {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    ),
    Family(
        "jamba",
        "state space",
        "JambaForCausalLM",
        text,
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    Family(
        "unet",
        "diffusion",
        "UNet2DModel",
        noisy_images,
        {
            "sample_size": IMAGE,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
        },
        "diffusers",
        squared_error,
    ),
    Family(
        "unet-conditional",
        "diffusion",
        "UNet2DConditionModel",
        conditioned_images,
        {
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
        },
        "diffusers",
        squared_error,
    ),
    Family(
        "dit",
        "diffusion",
        "DiTTransformer2DModel",
        classed_images,
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 16,
            "in_channels": 4,
        },
        "diffusers",
        squared_error,
    ),
    Family(
        "flux",
        "diffusion",
        "FluxTransformer2DModel",
        packed_images,
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 2, 2),
        },
        "diffusers",
        squared_error,
    ),
    Family(
        "autoencoder",
        "diffusion",
        "AutoencoderKL",
        lambda config: {"sample": images()},
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": IMAGE,
        },
        "diffusers",
        squared_error,
    ),
)
