"""From the `quantization_config` of a config.json to a format, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import UnsupportedModel
from engine.quantization.float8 import Float8
from engine.quantization.interface import Format
from engine.quantization.packed_integers import Awq, Gptq

_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 0}


def quantization_of(model_config: Any) -> Format | None:
    """The format of the checkpoint's quantized layers; None where none are said to be. Raises `UnsupportedModel`."""
    config = getattr(model_config, "quantization_config", None)
    if not config:
        return None
    method = config.get("quant_method")
    if method not in _METHODS:
        raise UnsupportedModel(
            f"the checkpoint is quantized by {method!r}; what is loaded: {', '.join(sorted(_METHODS))}"
        )
    return _METHODS[method](config)


def _awq(config: Mapping[str, Any]) -> Format:
    _expect("awq", config, "bits", [4])
    version = config.get("version") or config.get("format") or "gemm"
    _expect("awq", {"version": str(version).lower()}, "version", ["gemm"])
    _expect("awq", config, "zero_point", [True], default=True)
    return Awq(_group_size("awq", config))


def _gptq(config: Mapping[str, Any]) -> Format:
    _expect("gptq", config, "bits", [4, 8])
    _expect("gptq", config, "pack_dtype", ["int32"], default="int32")
    _expect("gptq", config, "is_marlin_format", [False], default=False)
    if config.get("dynamic"):
        raise _refusal("gptq", "layers that are quantized differently (`dynamic`) are not loaded")
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    _expect("gptq", {"checkpoint_format": version}, "checkpoint_format", list(_GPTQ_VERSIONS))
    return Gptq(
        config["bits"],
        _group_size("gptq", config),
        scatters=bool(config.get("desc_act", False)),
        added_to_zeros=_GPTQ_VERSIONS[version],
    )


def _fp8(config: Mapping[str, Any]) -> Format:
    _expect("fp8", config, "activation_scheme", ["dynamic"], default="dynamic")
    _expect("fp8", config, "fmt", ["e4m3"], default="e4m3")
    return Float8(_block("fp8", config.get("weight_block_size")))


def _compressed_tensors(config: Mapping[str, Any]) -> Format:
    method = "compressed-tensors"
    groups = config.get("config_groups") or {}
    if not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refusal(method, "config_groups does not say how the weights are quantized")
    _expect(method, config.get("sparsity_config") or {}, "format", ["dense"], default="dense")
    blocks = set()
    for group in groups.values():
        _expect(method, {"format": group.get("format") or config.get("format")}, "format", ["float-quantized"])
        weights = group.get("weights") or {}
        _expect(method, weights, "type", ["float"])
        _expect(method, weights, "num_bits", [8])
        _expect(method, weights, "symmetric", [True], default=True)
        _expect(method, weights, "dynamic", [False], default=False)
        _expect(method, weights, "strategy", ["tensor", "channel", "block"])
        inputs = group.get("input_activations")
        if inputs and not inputs.get("dynamic"):
            raise _refusal(method, "static scales of activations are not loaded")
        if group.get("output_activations"):
            raise _refusal(method, "quantized outputs (output_activations) are not computed")
        blocks.add(_block(method, weights.get("block_structure") if weights["strategy"] == "block" else None))
    if len(blocks) > 1:
        raise _refusal(method, "groups of layers with blocks of different sizes are not loaded")
    return Float8(blocks.pop())


_METHODS = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors}


def _refusal(method: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"the checkpoint is quantized by {method!r}, but {reason}")


def _expect(method: str, config: Mapping[str, Any], key: str, known: list[Any], default: Any = None) -> None:
    value = config.get(key)
    value = default if value is None else value
    if value not in known:
        raise _refusal(method, f"with {key} = {value!r}; what is loaded: {', '.join(map(str, known))}")


def _group_size(method: str, config: Mapping[str, Any]) -> int:
    size = config.get("group_size", config.get("q_group_size"))
    if not isinstance(size, int) or not (size == -1 or size > 0):
        raise _refusal(method, f"group_size is {size!r}")
    return size


def _block(method: str, block: Any) -> tuple[int, int] | None:
    if block is None:
        return None
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise _refusal(method, f"its blocks are {block!r}")
    return block[0], block[1]
