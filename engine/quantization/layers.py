"""Which layers of a checkpoint are quantized, and where their parts are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import InvalidWeights
from engine.quantization.interface import Format
from kernels.quantized_matmul import QuantizedWeight

_FLOAT8 = "F8_E4M3"
"""What safetensors call the type."""


class QuantizedLayers:
    """The quantized layers of some safetensors files, found by what their tensors are called and hold."""

    def __init__(self, files: Sequence[Path], form: Format) -> None:
        """Read the files' headers; raises `InvalidWeights`."""
        self._format = form
        self._files: dict[str, dict[str, Path]] = {}
        found: dict[str, dict[str, Path]] = {}
        for path, name, is_float8 in _headers(files):
            layer, _, part = name.rpartition(".")
            # Norms and layers that were left alone have a weight, too.
            if part not in form.parts or (part == "weight" and not is_float8):
                continue
            parts = found.setdefault(layer, {})
            if part in parts:
                raise InvalidWeights(f"{name} is both in {parts[part].name} and in {path.name}")
            parts[part] = path
        for layer, parts in found.items():
            if form.parts[0] not in parts:
                raise InvalidWeights(f"the checkpoint holds {layer}.{next(iter(parts))}, but no {form.parts[0]} for it")
            self._files[layer] = parts

    def __iter__(self) -> Iterator[str]:
        """The layers' names in the checkpoint."""
        return iter(self._files)

    def __contains__(self, layer: str) -> bool:
        return layer in self._files

    def owns(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is part of a quantized layer, its bias excepted."""
        layer, _, part = name.rpartition(".")
        return part in self._files.get(layer, ())

    def place_of(self, layer: str) -> tuple[Path, str]:
        """The file and the name of the layer's first part."""
        part = self._format.parts[0]
        return self._files[layer][part], f"{layer}.{part}"

    def read(self, layer: str, shape: tuple[int, int], device: torch.device) -> QuantizedWeight:
        """The layer's weight `[out, in]` of `shape`; raises `ModelError`."""
        tensors: dict[str, Tensor] = {}
        for part, path in self._files[layer].items():
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors[part] = file.get_tensor(f"{layer}.{part}").to(device)
        return self._format.weight(layer, tensors, shape)


def _headers(files: Sequence[Path]) -> Iterator[tuple[Path, str, bool]]:
    """Each tensor's file and name, and whether it is float8."""
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in list(file.keys()):
                    yield path, name, name.endswith(".weight") and file.get_slice(name).get_dtype() == _FLOAT8
        except SafetensorError as error:
            raise InvalidWeights(f"{path.name} is damaged or no safetensors file: {error}") from error
