"""Quantized checkpoints of tiny models, packed number by number as the formats are defined.

Nothing of the engine is used, so that what it reads is not what it wrote: AWQ after AutoAWQ's
`WQLinear_GEMM.from_linear`, GPTQ after AutoGPTQ's `QuantLinear.pack`, float8 after compressed-tensors and transformers'
`FineGrainedFP8`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_NOT_QUANTIZED = re.compile(r".*(embed_tokens|embed_in|embed_out|wte|wpe|lm_head|\.gate)\.weight")

Layer = tuple[dict[str, Tensor], Tensor]
"""What a checkpoint holds of a layer, and the weight that it stands for, float32."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantize."""

    name: str
    config: Mapping[str, Any]
    quantize: Callable[[str, Tensor], Layer]

    def write(self, plain: Path, quantized: Path, dequantized: Path) -> None:
        """From the checkpoint in `plain`, one that is quantized and one with the same weights in float32."""
        kept: dict[str, Tensor] = {}
        packed: dict[str, Tensor] = {}
        for name, tensor in load_file(plain / "model.safetensors").items():
            if tensor.dim() != 2 or _NOT_QUANTIZED.fullmatch(name):
                kept[name] = packed[name] = tensor
                continue
            layer = name.removesuffix(".weight")
            parts, dense = self.quantize(layer, tensor)
            kept[name] = dense.contiguous()
            packed |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
        for directory, tensors, extra in (
            (quantized, packed, {"quantization_config": self.config}),
            (dequantized, kept, {}),
        ):
            shutil.copytree(plain, directory)
            config = json.loads((plain / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps(config | extra))
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _grouped(weight: Tensor, group: np.ndarray, bits: int, *, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Numbers `[in, out]`, zeros and float16 scales `[groups, out]`, and the weight `[out, in]` that they mean."""
    w = weight.float().numpy().T
    groups, largest = int(group.max()) + 1, 2**bits - 1
    scales = np.empty((groups, w.shape[1]), np.float16)
    zeros = np.empty(scales.shape, np.int64)
    for index in range(groups):
        rows = w[group == index]
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[index] = (high - low) / largest
        zeros[index] = (largest + 1) // 2 if symmetric else np.round(-low / scales[index].astype(np.float32))
    # Zeros of the first GPTQ version are stored less one.
    zeros = zeros.clip(1, largest)
    scale, zero = scales.astype(np.float32)[group], zeros[group]
    numbers = np.round(w / scale + zero).clip(0, largest).astype(np.int64)
    return numbers, zeros, scales, ((numbers - zero) * scale).T.astype(np.float32)


def _words(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.uint32).view(np.int32).copy())


def awq(name: str = "awq", group_size: int = GROUP) -> Scheme:
    def quantize(layer: str, weight: Tensor) -> Layer:
        inputs, size = weight.shape[1], weight.shape[1] if group_size == -1 else group_size
        numbers, zeros, scales, dense = _grouped(weight, np.arange(inputs) // size, 4, symmetric=False)

        def pack(values: np.ndarray) -> Tensor:
            words = np.zeros((len(values), values.shape[1] // 8), np.uint64)
            for word in range(words.shape[1]):
                for place, output in enumerate(AWQ_ORDER):
                    words[:, word] |= values[:, 8 * word + output].astype(np.uint64) << np.uint64(4 * place)
            return _words(words)

        parts = {"qweight": pack(numbers), "qzeros": pack(zeros), "scales": torch.from_numpy(scales)}
        return parts, torch.from_numpy(dense)

    return Scheme(
        name,
        {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True},
        quantize,
    )


def gptq(
    name: str,
    *,
    bits: int = 4,
    group_size: int = GROUP,
    symmetric: bool = False,
    version: int = 1,
    order: Callable[[str, int], np.ndarray] | None = None,
) -> Scheme:
    """`order(layer, inputs)`: the inputs in the order in which they are put in groups (`desc_act`)."""

    def quantize(layer: str, weight: Tensor) -> Layer:
        inputs, in_word = weight.shape[1], 32 // bits
        group = np.arange(inputs) // (inputs if group_size == -1 else group_size)
        if order is not None:
            scattered = np.empty_like(group)
            scattered[order(layer, inputs)] = group
            group = scattered
        numbers, zeros, scales, dense = _grouped(weight, group, bits, symmetric=symmetric)
        weight_words = np.zeros((inputs // in_word, numbers.shape[1]), np.uint64)
        zero_words = np.zeros((len(zeros), numbers.shape[1] // in_word), np.uint64)
        stored = zeros - 1 if version == 1 else zeros
        for place in range(in_word):
            shift = np.uint64(bits * place)
            weight_words |= numbers[place::in_word].astype(np.uint64) << shift
            zero_words |= stored[:, place::in_word].astype(np.uint64) << shift
        parts = {
            "qweight": _words(weight_words),
            "qzeros": _words(zero_words),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return parts, torch.from_numpy(dense)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric}
    config |= {"desc_act": order is not None, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return Scheme(name, config, quantize)


def same_order(layer: str, inputs: int) -> np.ndarray:
    """What layers that see the same inputs get."""
    return np.random.default_rng(inputs).permutation(inputs)


def own_order(layer: str, inputs: int) -> np.ndarray:
    return np.random.default_rng(sum(layer.encode())).permutation(inputs)


def _float8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The float8 numbers, and the weight that they mean; `scale` has a number for each."""
    numbers = (weight.float() / scale).to(torch.float8_e4m3fn)
    return numbers, numbers.float() * scale


def fp8_block(name: str = "fp8-block", block: tuple[int, int] = (32, 64)) -> Scheme:
    """Scales in bfloat16, as some have them."""

    def quantize(layer: str, weight: Tensor) -> Layer:
        rows, columns = (-(-size // width) for size, width in zip(weight.shape, block, strict=True))
        scale = torch.empty(rows, columns, dtype=torch.bfloat16)
        full = torch.empty(weight.shape)
        for row in range(rows):
            for column in range(columns):
                place = slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1])
                # Rounding a scale down must not take the largest number out of range.
                scale[row, column] = weight[place].abs().max() / 440
                full[place] = scale[row, column].float()
        numbers, dense = _float8(weight, full)
        return {"weight": numbers, "weight_scale_inv": scale}, dense

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    return Scheme(name, config, quantize)


def fp8_tensor(name: str = "fp8-tensor") -> Scheme:
    def quantize(layer: str, weight: Tensor) -> Layer:
        scale = weight.abs().max() / 448
        numbers, dense = _float8(weight, scale.expand(weight.shape))
        return {"weight": numbers, "weight_scale": scale}, dense

    return Scheme(name, {"quant_method": "fp8", "activation_scheme": "dynamic"}, quantize)


def compressed_tensors(name: str = "compressed-tensors-channel") -> Scheme:
    def quantize(layer: str, weight: Tensor) -> Layer:
        scale = weight.abs().amax(1, keepdim=True) / 448
        numbers, dense = _float8(weight, scale.expand(weight.shape))
        return {"weight": numbers, "weight_scale": scale}, dense

    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False, "block_structure": None},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
    return Scheme(name, config, quantize)


SCHEMES = (
    awq(),
    awq("awq-one-group", -1),
    gptq("gptq", symmetric=True),
    gptq("gptq-v2", version=2, group_size=48),
    gptq("gptq-int8", bits=8, group_size=-1),
    gptq("gptq-desc-act", order=same_order),
    gptq("gptq-int8-each-its-order", bits=8, symmetric=True, order=own_order),
    fp8_block(),
    fp8_tensor(),
    compressed_tensors(),
)
