"""Which implementation computes a model's linear layers."""

from __future__ import annotations

import logging

import torch
from torch import nn

from engine.config import EngineConfig
from engine.linears.onednn import OneDNNLinear
from engine.linears.packed import PackedEmbedding, PackedLinear
from engine.linears.replacing import replace_embeddings, replace_linears, tied_embeddings
from kernels.cpu.library import CpuKernelsUnavailable, Library, library

logger = logging.getLogger(__name__)


def prepare_linears(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Exchange the linear layers of a loaded model for the fastest that there are for the device, one by one.

    A layer's weight is freed as soon as its packed copy exists, so that no more than one is held twice.
    """
    del config
    if device.type != "cpu":
        return
    try:
        kernels: Library | None = library()
    except CpuKernelsUnavailable as error:
        logger.warning("linear layers run in oneDNN or plain torch: %s", error)
        kernels = None

    def make(layer: nn.Linear) -> nn.Module | None:
        embeddings = tied_embeddings(model, layer)
        if kernels is not None and PackedLinear.takes(layer) and not OneDNNLinear.is_best(layer):
            if not all(PackedEmbedding.takes(embedding) for embedding in embeddings):
                return None
            packed = PackedLinear(kernels, layer)
            replace_embeddings(model, embeddings, PackedEmbedding(packed))
            return packed
        # What oneDNN has packed cannot be read by an embedding.
        return OneDNNLinear(layer) if OneDNNLinear.takes(layer) and not embeddings else None

    replace_linears(model, make)
