"""Names and layouts of a GGUF file's tensors in a native model; `GGUFFile.rows` dequantizes them by pieces.

llama.cpp's converters do more than rename, and each step is undone here: rows of Llama's queries and keys are in the
order of interleaved rotary pairs, Gemma's norms have one added, GPT-2's linear layers are [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import InvalidWeights
from engine.loading.gguf.file import GGUFFile, TensorEntry
from engine.loading.meta_init import ModelFiller
from engine.loading.progress import LoadProgress
from engine.models.decoder import Target

_AT_ONCE = 2**22
"""Numbers that are dequantized at once, where a tensor need not be whole: 16 MiB."""

_LARGE = 2**24
"""Numbers in a tensor that is read before the others."""

_SHOWN = 5
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")
"""Tensors that are part of the configuration."""

Undo = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Names:
    """What a checkpoint calls the modules of an architecture."""

    layers: str
    outer: dict[str, str]
    inner: dict[str, str]


_LLAMA_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = _Names("model.layers", _LLAMA_OUTER, _LLAMA_INNER)
_PHI3 = _Names(
    "model.layers", _LLAMA_OUTER, _LLAMA_INNER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
)
_GEMMA = _Names(
    "model.layers",
    _LLAMA_OUTER,
    _LLAMA_INNER
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
_GPT2 = _Names(
    "transformer.h",
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
)
_NAMES = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By the file's architecture."""


def checkpoint_name(architecture: str, name: str) -> str | None:
    """What a Hugging Face checkpoint calls a tensor of a GGUF file; None where it has none of that name."""
    names = _NAMES[architecture]
    block = _BLOCK.fullmatch(name)
    if block is not None:
        index, module, kind = block.groups()
        return f"{names.layers}.{index}.{names.inner[module]}.{kind}" if module in names.inner else None
    module, _, kind = name.rpartition(".")
    return f"{names.outer[module]}.{kind}" if module in names.outer else None


def undo_conversion(architecture: str, config: Any, name: str) -> Undo | None:
    """Return what turns a tensor of the file into the checkpoint's; None where they are the same."""
    block = _BLOCK.fullmatch(name)
    module, kind = (block[2], block[3]) if block is not None else (name.rpartition(".")[0], name.rpartition(".")[2])
    if architecture == "llama" and module in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if module == "attn_q" else config.num_key_value_heads
        return lambda tensor: _halves(tensor, heads)
    if architecture.startswith("gemma") and module.endswith("norm") and kind == "weight":
        return lambda tensor: tensor.float() - 1.0
    if architecture == "gpt2" and block is not None and kind == "weight" and not module.endswith("norm"):
        return lambda tensor: tensor.t()
    return None


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs side by side to one half after the other."""
    if tensor.shape[0] % (2 * heads):
        raise InvalidWeights(f"{tensor.shape[0]} rows of queries or keys are no {heads} heads of pairs")
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def load_gguf(filling: ModelFiller, file: GGUFFile, config: Any) -> None:
    """Fill the model from a file that `config` was made of.

    Raises `InvalidWeights` when the file lacks a tensor, or holds one that the model does not know or in another shape.
    """
    targets = filling.model.weights().targets
    places: dict[str, TensorEntry] = {}
    unknown: list[str] = []
    for entry in file.tensors.values():
        name = checkpoint_name(file.architecture, entry.name)
        if name in targets:
            places[name] = entry
        elif not _ROPE.fullmatch(entry.name):
            unknown.append(entry.name)
    missing = [name for name in targets if name not in places]
    for says, names in (("lacks", missing), ("holds tensors that the model does not know:", unknown)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise InvalidWeights(f"{file.path.name} {says} {', '.join(names[:_SHOWN])}{more}")
    progress = LoadProgress(sum(entry.num_bytes for entry in places.values()))
    with torch.no_grad():
        # What is converted or packed is in memory twice: large tensors come while little else is there.
        for name in sorted(places, key=lambda name: -_numel(places[name]) if _numel(places[name]) > _LARGE else 0):
            entry, target = places[name], targets[name]
            undo = undo_conversion(file.architecture, config, entry.name)
            if entry.shape != target.whole_shape:
                raise InvalidWeights(
                    f"{file.path.name}: {entry.name} has the shape {list(entry.shape)} "
                    f"instead of {list(target.whole_shape)}"
                )
            with filling.part(target.tensor) as part:
                _copy(part, file, entry, undo, target)
            progress.advance(entry.num_bytes)


def _copy(part: Tensor, file: GGUFFile, entry: TensorEntry, undo: Undo | None, target: Target) -> None:
    if target.is_zero:
        part.zero_()
        return
    if undo is not None or target.shard is not None:
        whole = file.read(entry.name)
        part.copy_(target.take(whole if undo is None else undo(whole)))
        return
    start = 0
    rows = part.view(1, -1) if part.dim() == 1 else part
    for piece in file.rows(entry.name, _AT_ONCE):
        piece = piece.view(1, -1) if piece.dim() == 1 else piece
        rows[start : start + len(piece)].copy_(piece)
        start += len(piece)


def _numel(entry: TensorEntry) -> int:
    numel = 1
    for size in entry.shape:
        numel *= size
    return numel
