"""Tiny random models of many architectures, with odd sizes, saved as transformers saves them.

Three key-value heads for six query heads, heads of 80, a vocabulary of 1,003. Weights are drawn wide, so that attention
is peaked and the most likely token leads clearly: with transformers' own small initial weights every position would
look alike, and a broken mask or position would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 1003
MAX_POSITIONS = 160

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 240,
    "intermediate_size": 328,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS_OF_80 = _SIZES | {"head_dim": 80}


@dataclass(frozen=True, eq=False)
class TinyModel:
    """One architecture in miniature."""

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=lambda: _HEADS_OF_80)
    embedding_std: float = 0.3
    seed: int = 0
    """One with which the most likely token always leads by more than rounding."""

    half_width: float = 2.0
    """How wide inner weights are drawn in half precision. Where 2 is too wide, transformers' bfloat16 is too far from
    its own float32 for any comparison, above all where rounding decides which expert is asked."""

    def make_config(self) -> Any:
        return AutoConfig.for_model(self.model_type, **{**self.sizes, **self.config})

    def make(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model in transformers, with attention spelled out."""
        config = self.make_config()
        options = {"attn_implementation": "eager"}
        if hasattr(config, "num_experts_per_tok"):
            options["experts_implementation"] = "eager"
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(config, **options)
        generator = torch.Generator().manual_seed(self.seed)
        embeddings = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
        head = model.get_output_embeddings().weight
        inner = 2.0 if dtype is torch.float32 else self.half_width
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 1:
                    parameter.add_(noise, alpha=0.2)
                elif id(parameter) in embeddings:
                    parameter.copy_(noise * self.embedding_std)
                else:
                    parameter.copy_(noise * (2 if parameter is head else inner) / parameter.shape[-1] ** 0.5)
        return model.to(dtype).eval()

    def save(self, directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Write it to a directory; returns it."""
        model = self.make(dtype)
        model.save_pretrained(directory)
        return model


_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 240,
    "n_head": 3,
    "n_layer": 3,
    "n_positions": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"query_pre_attn_scalar": 60, "sliding_window": 9, "tie_word_embeddings": False}
_FACTORS = [1.0 + 0.1 * i for i in range(40)]

NATIVE = (
    TinyModel("gpt2", "gpt2", sizes=_GPT2, embedding_std=0.1),
    TinyModel(
        "gpt2-scaled",
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": 100, "activation_function": "relu"},
        sizes=_GPT2,
    ),
    TinyModel("llama", "llama"),
    TinyModel(
        "llama-biased-tied",
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        half_width=1.0,
    ),
    TinyModel("mistral", "mistral", {"sliding_window": 9, "head_dim": 48}),
    TinyModel(
        "qwen2",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        sizes=_SIZES,
        seed=2,
    ),
    TinyModel("qwen3", "qwen3", {"attention_bias": True}, seed=2),
    TinyModel("phi3", "phi3", {"sliding_window": 20, "partial_rotary_factor": 0.5}, sizes=_SIZES, seed=1),
    TinyModel("gemma2", "gemma2", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 12.0}),
    TinyModel("gemma3", "gemma3_text", {**_GEMMA, "num_hidden_layers": 6, "sliding_window_pattern": 3}),
    TinyModel("gemma3-tied", "gemma3_text", {**_GEMMA, "tie_word_embeddings": True}, embedding_std=0.02),
    TinyModel("mixtral", "mixtral", {"num_local_experts": 5}, half_width=1.0),
    TinyModel("gptj", "gptj", {"rotary_dim": 32}, sizes=_GPT2, embedding_std=0.1),
    TinyModel(
        "gptj-tied",
        "gptj",
        {"rotary_dim": 80, "n_inner": 100, "tie_word_embeddings": True, "activation_function": "relu"},
        sizes=_GPT2,
        embedding_std=0.1,
    ),
    TinyModel("falcon", "falcon", sizes=_SIZES, embedding_std=0.1),
    TinyModel(
        "falcon-grouped",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "bias": True},
        sizes=_SIZES,
        embedding_std=0.1,
    ),
    TinyModel(
        "falcon-grouped-one-norm",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 100},
        sizes=_SIZES,
        embedding_std=0.1,
    ),
    TinyModel(
        "falcon-sequential",
        "falcon",
        {"parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
        sizes=_SIZES,
    ),
    TinyModel(
        "qwen3-moe",
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "mlp_only_layers": [1]},
        half_width=1.0,
    ),
)

# Embeddings that the model multiplies by the root of their size would drown the rest.
_SCALED = {"tie_word_embeddings": False}
_SQUARE = _SIZES | {"hidden_size": 480}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 240,
    "word_embed_proj_dim": 240,
    "ffn_dim": 328,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
}
_LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 9}
_MULTIPLIERS = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}

GENERIC = (
    TinyModel("opt", "opt", sizes=_OPT),
    TinyModel("gpt-neox", "gpt_neox", {"num_attention_heads": 3}, sizes=_SIZES),
    TinyModel("gpt-bigcode", "gpt_bigcode", sizes=_GPT2),
    TinyModel("phi", "phi", sizes=_SIZES),
    TinyModel("gemma", "gemma", _SCALED, embedding_std=0.02),
    TinyModel("starcoder2", "starcoder2", _WINDOW, sizes=_SIZES),
    TinyModel("olmo2", "olmo2", sizes=_SQUARE),
    TinyModel("cohere2", "cohere2", _WINDOW, seed=5),
    TinyModel("granite", "granite", _MULTIPLIERS),
    TinyModel("gpt-oss", "gpt_oss", {**_WINDOW, **_LOCAL_EXPERTS}, seed=1, half_width=0.5),
    TinyModel("qwen2-moe", "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}, half_width=1.0),
    TinyModel("deepseek-v3", "deepseek_v3", _LATENT, sizes=_SIZES, half_width=0.5),
)

MORE_GENERIC = (
    TinyModel("apertus", "apertus"),
    TinyModel("arcee", "arcee"),
    TinyModel("bitnet", "bitnet", sizes=_SQUARE),
    TinyModel("cohere", "cohere", seed=8),
    TinyModel("cwm", "cwm", seed=1),
    TinyModel("deepseek-v2", "deepseek_v2", _LATENT, sizes=_SIZES, seed=2),
    TinyModel("ernie-4.5", "ernie4_5", seed=2),
    TinyModel("exaone-4", "exaone4", _WINDOW),
    TinyModel("glm", "glm"),
    TinyModel("glm-4", "glm4"),
    TinyModel("granite-moe", "granitemoe", {**_MULTIPLIERS, **_LOCAL_EXPERTS}, seed=2, half_width=0.5),
    TinyModel("helium", "helium", {"head_dim": 80}, sizes=_SQUARE),
    TinyModel("hunyuan", "hunyuan_v1_dense"),
    TinyModel("jetmoe", "jetmoe", _LOCAL_EXPERTS, half_width=0.5),
    TinyModel("ministral", "ministral", _WINDOW, seed=1),
    TinyModel("nemotron", "nemotron"),
    TinyModel("olmo", "olmo"),
    TinyModel("olmo3", "olmo3", _WINDOW),
    TinyModel("olmoe", "olmoe", _EXPERTS, sizes=_SQUARE, half_width=0.5),
    TinyModel("persimmon", "persimmon", {"num_attention_heads": 3}, sizes=_SIZES),
    TinyModel("phimoe", "phimoe", _LOCAL_EXPERTS, half_width=0.5),
    TinyModel("seed-oss", "seed_oss"),
    TinyModel("smollm3", "smollm3"),
    TinyModel("stablelm", "stablelm", sizes=_SQUARE),
)

ROPE_KINDS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": _FACTORS,
        "long_factor": [2 * factor for factor in _FACTORS],
        "original_max_position_embeddings": 40,
    },
}
