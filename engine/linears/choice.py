"""Which implementation computes a model's linear layers."""

from __future__ import annotations

import logging

import torch
from torch import nn

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.linears.onednn import OneDNNInt8Linear, OneDNNLinear
from engine.linears.packed import PackedEmbedding, PackedLinear
from engine.linears.replacing import replace_embeddings, replace_linears, tied_embeddings
from engine.linears.tiled import TiledLinear, TiledProduct
from engine.models.decoder import Decoder
from engine.models.moe import SparseMLP
from engine.threads import Threads
from kernels.cpu.library import CpuKernelsUnavailable, Library, library

logger = logging.getLogger(__name__)


# Layers with fewer outputs are routers and gates: quantizing them saves nothing and changes which expert is asked.
_LEAST_QUANTIZED = 64


def prepare_linears(model: Decoder, config: EngineConfig, device: torch.device, threads: Threads | None = None) -> None:
    """Exchange the linear layers of a loaded model for the fastest that there are for the device, one by one.

    A layer's weight is freed as soon as its packed copy exists, so that no more than one is held twice. With
    `quantization="int8"` all but routers and the layer that makes the logits are rounded to int8. With
    `deterministic` the layers see tiles of a fixed number of rows; `threads` are those of the model's passes. Raises
    `ModelError` where the machine cannot do what the configuration asks for.
    """
    kernels = _kernels(config, device)
    if device.type != "cpu":
        return

    def make(layer: nn.Linear) -> nn.Module | None:
        embeddings = tied_embeddings(model, layer)
        if config.quantization == "int8" and _LEAST_QUANTIZED <= layer.out_features != model.vocab_size:
            if OneDNNInt8Linear.is_exact():
                return OneDNNInt8Linear(layer)
            if kernels is not None and PackedLinear.takes(layer):
                return PackedLinear(kernels, layer, int8=True)
        if kernels is not None and PackedLinear.takes(layer) and not OneDNNLinear.is_best(layer):
            if not all(PackedEmbedding.takes(embedding) for embedding in embeddings):
                return None
            packed = PackedLinear(kernels, layer)
            replace_embeddings(model, embeddings, PackedEmbedding(packed))
            return packed
        # What oneDNN has packed cannot be read by an embedding.
        return OneDNNLinear(layer) if OneDNNLinear.takes(layer) and not embeddings else None

    if not config.deterministic:
        replace_linears(model, make)
        return
    passes = threads or Threads()
    replace_linears(model, lambda layer: TiledLinear(make(layer) or layer, layer, passes))
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.product = TiledProduct(passes)


def _kernels(config: EngineConfig, device: torch.device) -> Library | None:
    """The C++ kernels, where there are any for the device; raises `ModelError` where int8 has nothing else."""
    if device.type != "cpu":
        if config.quantization is not None:
            raise ModelError(f"quantization {config.quantization!r} runs on the CPU only, not on {device.type}")
        return None
    try:
        return library()
    except CpuKernelsUnavailable as error:
        if config.quantization is not None and not OneDNNInt8Linear.is_exact():
            raise ModelError(f"quantization {config.quantization!r} needs the C++ kernels: {error}") from error
        logger.warning("linear layers run in oneDNN or plain torch: %s", error)
        return None
