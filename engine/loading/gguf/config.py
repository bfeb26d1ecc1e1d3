"""From a GGUF file's metadata to transformers' configuration.

Where the metadata leaves something open, what llama.cpp's code does for the architecture is written into the
configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType

from engine.errors import InvalidWeights, UnsupportedModel
from engine.loading.configurations import auto_config
from engine.loading.gguf.file import GGUFFile
from engine.models.rotary import inverse_frequencies

logger = logging.getLogger(__name__)

_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all Llama models since 3.1."""

_GEMMA_2_27B_LAYERS, _GEMMA_3_27B_LAYERS = 46, 62
_SLIDING_THETA = 10000.0
"""The base of the rotary embedding in Gemma 3's layers with a sliding window."""

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"}
)
"""Special tokens that end a completion in llama.cpp, whether or not the metadata names them as ends."""

_CONTROL = 3


class Metadata:
    """The numbers of a file's architecture, by their names below it."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self._number(name, default, int))

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._number(name, default, (int, float)))

    def _number(self, name: str, default: float | None, kind: Any) -> float:
        key = f"{self.file.architecture}.{name}"
        value = self.file.metadata.get(key, default)
        if value is None:
            raise InvalidWeights(f"{self.file.path.name}: the metadata lacks {key}")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UnsupportedModel(f"{self.file.path.name}: {key} is no single number")
        result: float = value
        return result

    def has(self, name: str) -> bool:
        return f"{self.file.architecture}.{name}" in self.file.metadata

    def text(self, name: str) -> str | None:
        value = self.file.metadata.get(f"{self.file.architecture}.{name}")
        return None if value is None else str(value)


def model_config(file: GGUFFile) -> Any:
    """Return transformers' configuration of the model. Raises `UnsupportedModel` and `InvalidWeights`."""
    if file.architecture not in _CONFIGS:
        raise UnsupportedModel(
            f"{file.path.name} is of the architecture {file.architecture!r}; "
            f"of GGUF files these are read: {', '.join(sorted(_CONFIGS))}"
        )
    metadata = Metadata(file)
    if metadata.integer("expert_count", 0):
        raise UnsupportedModel(f"{file.path.name} is a mixture of experts, which is not read from GGUF files")
    if "token_embd.weight" not in file.tensors:
        raise InvalidWeights(f"{file.path.name} lacks token_embd.weight")
    model_type, values = _CONFIGS[file.architecture](metadata)
    tokens = {f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    tokens["eos_token_id"] = sorted(end_tokens(file)) or None
    try:
        return auto_config().for_model(
            model_type,
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            tie_word_embeddings="output.weight" not in file.tensors,
            dtype=_dtype(file),
            **tokens,
            **values,
        )
    except Exception as error:
        raise UnsupportedModel(f"{file.path.name}: the metadata make no configuration: {error}") from error


_TOKENS = {"bos": "bos", "pad": "padding"}


def end_tokens(file: GGUFFile) -> frozenset[int]:
    """Return the tokens that end a completion: those that the metadata name, and special ones known for it."""
    named = {file.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS}
    tokens = file.metadata.get("tokenizer.ggml.tokens") or []
    types = file.metadata.get("tokenizer.ggml.token_type") or []
    kinds = zip(tokens, types, strict=False)
    known = {index for index, (token, kind) in enumerate(kinds) if kind == _CONTROL and token in _END_TEXTS}
    return frozenset(token for token in named | known if isinstance(token, int))


def _dtype(file: GGUFFile) -> str:
    """The type that all matrices have, float32 where they are quantized or of several types."""
    kinds = {entry.type for entry in file.tensors.values() if len(entry.shape) > 1}
    plain = {GGMLQuantizationType.BF16: "bfloat16", GGMLQuantizationType.F16: "float16"}
    return plain.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _llama_line(metadata: Metadata) -> dict[str, Any]:
    """What Llama and its relatives share."""
    heads = metadata.integer("attention.head_count")
    hidden = metadata.integer("embedding_length")
    head_dim = metadata.integer("attention.key_length", hidden // max(heads, 1))
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{metadata.file.path.name}: keys and values are of different sizes")
    return {
        "max_position_embeddings": metadata.integer("context_length"),
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(metadata, head_dim),
    }


def _rope(metadata: Metadata, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10000.0)}
    turning = metadata.integer("rope.dimension_count", head_dim)
    if turning != head_dim:
        rope["partial_rotary_factor"] = turning / head_dim
    file, kind = metadata.file, metadata.text("rope.scaling.type")
    if "rope_freqs.weight" in file.tensors:
        return rope | _llama_3_scaling(file, rope, turning)
    if "rope_factors_long.weight" in file.tensors:
        return rope | _long_scaling(metadata)
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if kind == "yarn":
        original = metadata.integer("rope.scaling.original_context_length", metadata.integer("context_length"))
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind in ("linear", None):
        return rope | ({"rope_type": "linear", "factor": factor} if factor != 1.0 else {})
    if kind != "none":
        raise UnsupportedModel(f"{file.path.name}: rotary embeddings scaled by {kind!r} are not read")
    return rope


def _llama_3_scaling(file: GGUFFile, rope: dict[str, Any], turning: int) -> dict[str, Any]:
    """The parameters of which the factors in `rope_freqs.weight` were made; the largest of them is one."""
    factors = file.read("rope_freqs.weight").float()
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA_3}
    plain, _ = inverse_frequencies(rope, turning, 0)
    expected, _ = inverse_frequencies(rope | scaling, turning, 0)
    if factors.shape != plain.shape or not torch.allclose(plain / factors, expected, rtol=1e-4, atol=0.0):
        raise UnsupportedModel(f"{file.path.name}: rope_freqs.weight is not what Llama 3's scaling gives")
    return scaling


def _long_scaling(metadata: Metadata) -> dict[str, Any]:
    file, context = metadata.file, metadata.integer("context_length")
    if "rope_factors_short.weight" not in file.tensors:
        raise InvalidWeights(f"{file.path.name} holds rope_factors_long.weight without rope_factors_short.weight")
    original = metadata.integer("rope.scaling.original_context_length", context)
    scaling = {
        "rope_type": "longrope",
        "long_factor": file.read("rope_factors_long.weight").tolist(),
        "short_factor": file.read("rope_factors_short.weight").tolist(),
        "original_max_position_embeddings": original,
        "factor": context / original,
    }
    if metadata.has("rope.scaling.attn_factor"):
        scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor")
    return scaling


def _llama(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    tensors = metadata.file.tensors
    return "llama", _llama_line(metadata) | {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _qwen2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    return "qwen2", _llama_line(metadata) | {"use_sliding_window": False}


def _qwen3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    has_bias = "blk.0.attn_q.bias" in metadata.file.tensors
    return "qwen3", _llama_line(metadata) | {"use_sliding_window": False, "attention_bias": has_bias}


def _phi3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    window = metadata.integer("attention.sliding_window", 0)
    values = _llama_line(metadata)
    original = values["rope_parameters"].get("original_max_position_embeddings", values["max_position_embeddings"])
    return "phi3", values | {"sliding_window": window or None, "original_max_position_embeddings": original}


def _gemma(metadata: Metadata) -> dict[str, Any]:
    values = _llama_line(metadata)
    layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
    large = _GEMMA_2_27B_LAYERS if metadata.file.architecture == "gemma2" else _GEMMA_3_27B_LAYERS
    return values | {
        "query_pre_attn_scalar": values["hidden_size"] // heads if layers == large else values["head_dim"],
        "sliding_window": metadata.integer("attention.sliding_window", 4096),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def _gemma2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    return "gemma2", _gemma(metadata) | {
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
        "layer_types": _layer_types(metadata, pattern=2),
    }


def _gemma3(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    values = _gemma(metadata)
    sliding = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", _SLIDING_THETA)}
    cap = metadata.number("final_logit_softcapping", 0.0)
    return "gemma3_text", values | {
        "final_logit_softcapping": cap or None,
        "layer_types": _layer_types(metadata, pattern=metadata.integer("attention.sliding_window_pattern", 6)),
        "rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": sliding},
    }


def _layer_types(metadata: Metadata, *, pattern: int) -> list[str]:
    """Every `pattern`-th layer attends to everything."""
    layers = range(1, metadata.integer("block_count") + 1)
    return ["full_attention" if index % pattern == 0 else "sliding_attention" for index in layers]


def _gpt2(metadata: Metadata) -> tuple[str, dict[str, Any]]:
    return "gpt2", {
        "n_positions": metadata.integer("context_length"),
        "n_embd": metadata.integer("embedding_length"),
        "n_layer": metadata.integer("block_count"),
        "n_head": metadata.integer("attention.head_count"),
        "n_inner": metadata.integer("feed_forward_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
    }


_CONFIGS: dict[str, Callable[[Metadata], tuple[str, dict[str, Any]]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
