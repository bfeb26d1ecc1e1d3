"""GGUF files of tiny random models, written with the `gguf` package as llama.cpp's converters write them.

Beside each file stands its twin: a Hugging Face directory with the same weights, dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 320
HIDDEN, LAYERS = 256, 2
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _LLAMA_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_SCALES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
"""Where the blocks' float16 scales lie: random bytes there would be anything, NaN too."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One architecture in miniature."""

    name: str
    architecture: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Of the file, below the architecture's name, besides sizes."""

    tensors: Callable[[], Mapping[str, Array]] = dict
    """Further ones of the file."""


_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama_3_factors() -> Mapping[str, Array]:
    """As llama.cpp's converter computes them."""
    frequencies = 1.0 / 500000.0 ** (np.arange(0, 64, 2, dtype=np.float32) / 64)
    factors = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return {"rope_freqs.weight": np.array(factors, dtype=np.float32)}


def _long_factors() -> Mapping[str, Array]:
    return {
        "rope_factors_short.weight": np.linspace(1, 2, 32, dtype=np.float32),
        "rope_factors_long.weight": np.linspace(1, 4, 32, dtype=np.float32),
    }


_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": np.linspace(1, 2, 32, dtype=np.float32).tolist(),
    "long_factor": np.linspace(1, 4, 32, dtype=np.float32).tolist(),
    "original_max_position_embeddings": 32,
}
_GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 8, "num_hidden_layers": 7}
CASES = (
    Case("llama", "llama", "llama"),
    Case(
        "llama-tied-biased",
        "llama",
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    Case("llama-3", "llama", "llama", {"rope_parameters": _LLAMA_3_ROPE}, tensors=_llama_3_factors),
    Case("qwen2", "qwen2", "qwen2", {"use_sliding_window": False}),
    Case("qwen3", "qwen3", "qwen3", {"head_dim": 32}),
    Case(
        "qwen3-yarn",
        "qwen3",
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    Case("phi3", "phi3", "phi3", {"sliding_window": 9}, {"attention.sliding_window": 9}),
    Case(
        "phi3-long",
        "phi3",
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32, "sliding_window": None},
        {"rope.scaling.original_context_length": 32},
        tensors=_long_factors,
    ),
    Case(
        "gemma2",
        "gemma2",
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 12.0, "tie_word_embeddings": True},
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 12.0, "attention.sliding_window": 8},
    ),
    Case(
        "gemma3",
        "gemma3",
        "gemma3_text",
        {**_GEMMA, "tie_word_embeddings": True},
        {"attention.sliding_window": 8, "rope.freq_base": 1000000.0},
    ),
    Case("gpt2", "gpt2", "gpt2", {"tie_word_embeddings": True, "activation_function": "gelu_new"}),
)


def write_pair(case: Case, type_: Type, directory: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write a GGUF file whose matrices are all of one type, and its twin; returns both paths."""
    sizes = dict(_SIZES)
    if case.model_type == "gpt2":
        sizes = {"vocab_size": VOCAB_SIZE, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(case.model_type, **{**sizes, **case.config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    draw = np.random.default_rng(seed)
    path = directory / f"{case.name}-{type_.name}.gguf"
    writer = GGUFWriter(path, case.architecture)
    _write_metadata(writer, case, config)
    state = model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _write_tensor(writer, case, config, name, parameter, type_, draw)
    assert state.keys() >= dict(model.named_parameters()).keys()
    for name, array in case.tensors().items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    twin = directory / f"{case.name}-{type_.name}"
    model.save_pretrained(twin)
    return path, twin


def _write_metadata(writer: GGUFWriter, case: Case, config: Any) -> None:
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if case.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"] if "full_attention" in rope else rope["rope_theta"])
    for key, value in case.metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        if key != "rope.freq_base":
            add(f"{case.architecture}.{key}", value)


def _write_tensor(
    writer: GGUFWriter, case: Case, config: Any, name: str, parameter: torch.Tensor, type_: Type, draw: Any
) -> None:
    """Draw a tensor, put it into the model, and write what a converter would make of it."""
    found = _gguf_name(case, name)
    if parameter.dim() == 1:
        values = draw.normal(1.0 if "norm" in found else 0.0, 0.2, parameter.shape).astype(np.float32)
        if case.architecture.startswith("gemma"):
            values -= 1.0
        parameter.copy_(torch.from_numpy(values))
        written = values + np.float32(1.0) if case.architecture.startswith("gemma") else values
        if case.architecture == "llama" and found.split(".")[2:3] in (["attn_q"], ["attn_k"]):
            written = _permuted(written, _heads(config, found))
        writer.add_tensor(found, written)
        return
    is_conv = case.model_type == "gpt2" and name.rpartition(".")[0].endswith(("c_attn", "c_proj", "c_fc"))
    shape = tuple(parameter.shape[::-1] if is_conv else parameter.shape)
    raw = _random_blocks(shape, type_, draw)
    values = torch.from_numpy(dequantize(raw, type_).reshape(shape))
    parameter.copy_(values.t() if is_conv else values)
    if case.architecture == "llama" and found.split(".")[2:3] in (["attn_q"], ["attn_k"]):
        raw = _permuted(raw, _heads(config, found))
    writer.add_tensor(found, raw, raw_dtype=type_)


def _gguf_name(case: Case, name: str) -> str:
    names = {"gpt2": _GPT2_NAMES, "gemma2": _GEMMA_NAMES, "gemma3": _GEMMA_NAMES}.get(case.architecture, _LLAMA_NAMES)
    module, _, kind = name.rpartition(".")
    if module in names:
        return f"{names[module]}.{kind}"
    _, _, inner = module.partition(".layers." if "layers" in module else ".h.")
    index, _, inner = inner.partition(".")
    return f"blk.{index}.{names[inner]}.{kind}"


def _heads(config: Any, found: str) -> int:
    heads: int = config.num_attention_heads if "attn_q" in found else config.num_key_value_heads
    return heads


def _permuted(array: Array, heads: int) -> Array:
    """llama.cpp's `permute`, of rows that may be packed."""
    return np.ascontiguousarray(
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    )


def _random_blocks(shape: tuple[int, ...], type_: Type, draw: Any) -> Array:
    """A random matrix as it lies in a file; the package quantizes to all types but those with superblocks."""
    wanted = 1.5 / shape[-1] ** 0.5
    if type_ not in _SCALES:
        return quantize(draw.normal(0.0, wanted, shape).astype(np.float32), type_)
    block_bytes = {Type.Q4_K: 144, Type.Q5_K: 176, Type.Q6_K: 210}[type_]
    blocks = draw.integers(0, 256, (*shape[:-1], shape[-1] // 256, block_bytes), dtype=np.uint8)

    def scaled(scale: float) -> Array:
        for place in _SCALES[type_]:
            # The second one is taken off: about as much as the first gives on the average.
            factor = scale if place != 2 else scale * (8 if type_ is Type.Q4_K else 16)
            blocks[..., place : place + 2] = np.frombuffer(np.float16(factor).tobytes(), np.uint8)
        return blocks.reshape(*shape[:-1], -1)

    spread = dequantize(scaled(0.01), type_).std() / 0.01
    return scaled(wanted / spread)
