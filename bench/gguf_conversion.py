"""A saved model of the workloads as a GGUF file, as llama.cpp's own converter would write it.

Runs in llama.cpp's environment, where there is neither torch nor anything of ours but this package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    TensorNameMap,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import quantize

Array = npt.NDArray[np.float32]

ARCHITECTURES = {"gpt2": MODEL_ARCH.GPT2, "llama": MODEL_ARCH.LLAMA, "qwen3": MODEL_ARCH.QWEN3}
"""By `model_type` of config.json."""


def write_gguf(source: Path, target: Path, type_name: str) -> None:
    """Write the model in the directory `source` with its matrices as the type; all else is float32."""
    config = json.loads((source / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[architecture])
    _add_sizes(writer, config)
    _add_tokenizer(writer, source, config)
    names = get_tensor_name_map(architecture, config.get("num_hidden_layers") or config["n_layer"])
    quantization = GGMLQuantizationType[type_name]
    for name, tensor in _tensors(source / "model.safetensors"):
        if config["tie_word_embeddings"] and name == "lm_head.weight":
            continue
        found = _gguf_name(names, name)
        tensor = _converted(config, name, tensor)
        # As its own quantizer does, which leaves positions as they are.
        if tensor.ndim == 2 and not found.startswith("position_embd"):
            writer.add_tensor(found, quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(found, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: GGUFWriter, config: dict[str, Any]) -> None:
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: GGUFWriter, source: Path, config: dict[str, Any]) -> None:
    document = json.loads((source / "tokenizer.json").read_text())
    model = document["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {token["content"] for token in document["added_tokens"] if token["special"]}
    kinds = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if "Digits" in json.dumps(document["pre_tokenizer"]) else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # The workloads' own tokenizers have no merges, which cannot be written; prompts are token ids anyway.
    writer.add_token_merges(merges or [f"{tokens[1]} {tokens[1]}"])
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[-1] if isinstance(ends, list) else ends)


def _tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """The tensors of a safetensors file, in float32."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            raw = file.read(end - begin)
            if entry["dtype"] == "BF16":
                # The upper half of a float32.
                numbers = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                numbers = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
            yield name, numbers.reshape(entry["shape"])


def _gguf_name(names: TensorNameMap, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"GGUF has no name for {name}")
    return found


def _converted(config: dict[str, Any], name: str, tensor: Array) -> Array:
    module = name.rpartition(".")[0]
    if config["model_type"] == "gpt2" and tensor.ndim == 2 and module.endswith(("c_attn", "c_proj", "c_fc")):
        return np.ascontiguousarray(tensor.T)  # `Conv1D` has its weights the other way round
    if config["model_type"] == "llama" and module.endswith(("q_proj", "k_proj")):
        heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
        return _interleaved(tensor, heads)
    return tensor


def _interleaved(tensor: Array, heads: int) -> Array:
    """Rows of each head from one half after the other to rotary pairs side by side."""
    return np.ascontiguousarray(
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    )
