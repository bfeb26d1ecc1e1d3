"""Which implementation computes a model's linear layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.device.threads import Threads
from engine.errors import ModelError
from engine.linears.onednn import OneDNNLinear
from engine.linears.packed import PackedEmbedding, PackedLinear
from engine.linears.replace import linear_places, replace_embeddings, return_memory, tied_embeddings
from engine.linears.tiled import TiledLinear, TiledProduct
from engine.models.decoder import Decoder
from engine.models.moe import SparseMLP
from kernels.cpu.library import CpuKernelsUnavailable, Library, library

logger = logging.getLogger(__name__)


# Layers with fewer outputs are routers and gates: quantizing them saves nothing and changes which expert is asked.
_LEAST_QUANTIZED = 64


class LinearReplacer:
    """Exchanges the linear layers of a model for the fastest that there are for the device, one by one.

    A layer's weight is freed as soon as its packed copy exists, so that no more than one is held twice. With
    `quantization="int8"` all but routers and the layer that makes the logits are rounded to int8. With
    `deterministic` the layers see tiles of a fixed number of rows; `threads` are those of the model's passes.

    Where parts of layers were packed before, by the layer's name in the model, those layers are restored of them and
    all others stay as they are.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        device: torch.device,
        threads: Threads,
        packed: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Raises `ModelError` where the machine cannot do what the configuration asks for."""
        self._model = model
        self._config = config
        self._kernels = _kernels(config, device)
        self._threads = threads
        self._places = linear_places(model) if device.type == "cpu" else {}
        self._packed = packed
        self._names = {} if packed is None else {module: name for name, module in model.named_modules()}

    def replace(self, module: nn.Module) -> None:
        """Exchange a linear layer, wherever it stands, once its weights are there. Other modules stay."""
        if not isinstance(module, nn.Linear) or module not in self._places:
            return
        places = self._places.pop(module)
        made = self._make(module)
        if self._config.deterministic:
            made = TiledLinear(made or module, module, self._threads)
        if made is not None:
            for parent, name in places:
                setattr(parent, name, made)

    def replace_all(self) -> None:
        """Exchange all that are left."""
        for layer in list(self._places):
            self.replace(layer)
            return_memory()
        if self._config.deterministic:
            for module in self._model.modules():
                if isinstance(module, SparseMLP):
                    module.product = TiledProduct(self._threads)

    def _make(self, layer: nn.Linear) -> nn.Module | None:
        embeddings = tied_embeddings(self._model, layer)
        packed = self._pack(layer, embeddings) if self._packed is None else self._restore(layer)
        if packed is not None:
            if embeddings:
                replace_embeddings(self._model, embeddings, PackedEmbedding(packed))
            return packed
        # What oneDNN has packed cannot be read by an embedding.
        is_for_onednn = self._packed is None and OneDNNLinear.takes(layer) and not embeddings
        return OneDNNLinear(layer) if is_for_onednn else None

    def _restore(self, layer: nn.Linear) -> PackedLinear | None:
        assert self._packed is not None
        parts = self._packed.get(self._names[layer])
        return None if parts is None or self._kernels is None else PackedLinear.restore(self._kernels, layer, parts)

    def _pack(self, layer: nn.Linear, embeddings: Sequence[nn.Embedding]) -> PackedLinear | None:
        is_quantized = (
            self._config.quantization == "int8" and _LEAST_QUANTIZED <= layer.out_features != self._model.vocab_size
        )
        if self._kernels is None or not PackedLinear.takes(layer):
            return None
        if is_quantized:
            return PackedLinear.pack(self._kernels, layer, int8=True)
        if OneDNNLinear.is_best(layer) or not all(PackedEmbedding.takes(embedding) for embedding in embeddings):
            return None
        return PackedLinear.pack(self._kernels, layer)


def prepare_linears(model: Decoder, config: EngineConfig, device: torch.device, threads: Threads | None = None) -> None:
    """Replace all linear layers of a loaded model that were not replaced yet. Raises `ModelError`."""
    LinearReplacer(model, config, device, threads or Threads()).replace_all()
    return_memory()


def _kernels(config: EngineConfig, device: torch.device) -> Library | None:
    """The C++ kernels, where there are any for the device; raises `ModelError` where int8 has nothing else."""
    if device.type != "cpu":
        if config.quantization is not None:
            raise ModelError(f"quantization {config.quantization!r} runs on the CPU only, not on {device.type}")
        return None
    try:
        return library()
    except CpuKernelsUnavailable as error:
        if config.quantization is not None:
            raise ModelError(f"quantization {config.quantization!r} needs the C++ kernels: {error}") from error
        logger.warning("linear layers run in oneDNN or plain torch: %s", error)
        return None
