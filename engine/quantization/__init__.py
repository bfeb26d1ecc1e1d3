"""Checkpoints whose weights are quantized: what config.json says of them, and what lies in their files."""

from engine.quantization.choice import quantization_of
from engine.quantization.layers import QuantizedLayers

__all__ = ["QuantizedLayers", "quantization_of"]
