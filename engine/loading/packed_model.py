"""A model with its linear layers replaced: from the checkpoint, or as it was packed at an earlier start."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.device.collectives import ALONE, Group
from engine.device.threads import Threads
from engine.errors import ModelError
from engine.linears import LinearReplacer
from engine.linears.onednn import OneDNNLinear
from engine.linears.packed import PackedLinear
from engine.linears.quantized import QuantizedLinear
from engine.linears.tiled import TiledLinear
from engine.loading.hub import is_gguf, weight_files
from engine.loading.meta_init import empty_model
from engine.loading.weight_cache import KeptWeights, WeightCache
from engine.loading.weights import choose_dtype, load_model
from engine.models.decoder import Decoder, NativeDecoder
from kernels.cpu.library import CpuKernelsUnavailable, library

_ROOT = Path(__file__).parents[2]
_SOURCES = ("engine/linears", "engine/loading", "engine/models", "engine/quantization", "kernels")
"""Packages whose code decides what packed weights are."""


def load_packed_model(
    path: Path,
    model_config: Any,
    config: EngineConfig,
    *,
    device: torch.device,
    threads: Threads,
    group: Group = ALONE,
) -> Decoder:
    """`load_model`, with linear layers as `LinearReplacer` makes them.

    Where `config` has a cache for packed weights, they come from it, or go to it. Raises `ModelError`.
    """

    def load() -> Decoder:
        return load_model(
            path,
            model_config,
            config,
            device=device,
            group=group,
            on_module_loaded=lambda model: LinearReplacer(model, config, device, threads).replace,
        )

    cache = WeightCache.of(config)
    if cache is None or device.type != "cpu" or group.size > 1 or config.random_weights:
        return load()
    identity = _identity(path, model_config, config, device)
    if identity is None:
        return load()
    kept = cache.open(path.name, identity)
    if kept is not None:
        return _restored(kept, model_config, config, device, threads)
    model = load()
    if isinstance(model, NativeDecoder) and (tensors := packed_tensors(model)) is not None:

        def is_unchanged() -> bool:
            try:
                return _identity(path, model_config, config, device) == identity
            except (ModelError, OSError):
                return False

        cache.keep(path.name, identity, KeptWeights(tensors, model.is_tied), is_unchanged)
    return model


def packed_tensors(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights of a model by name, those of packed layers by their parts, what two layers share by its first name.

    None where a layer has its weight in a form of a library's own.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[nn.Module, str] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        # A layer in tiles has the name of what computes it.
        parent = model.get_submodule(name.rpartition(".")[0])
        names[module] = names[parent] if isinstance(parent, TiledLinear) and module is not parent else name
        if isinstance(module, OneDNNLinear | QuantizedLinear):
            return None
        if isinstance(module, PackedLinear):
            tensors |= {f"{names[module]}.{part}": tensor for part, tensor in module.parts.items()}
        for part, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                tensors[f"{names[module]}.{part}"] = parameter.detach()
    return tensors


def _restored(
    kept: KeptWeights, model_config: Any, config: EngineConfig, device: torch.device, threads: Threads
) -> Decoder:
    if not kept.is_tied:
        model_config = copy.deepcopy(model_config)
        model_config.tie_word_embeddings = False
    model = empty_model(model_config, device=device)
    assert model is not None, "only native models are kept"
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in kept.tensors.items():
        layer, _, part = name.rpartition(".")
        parts[layer][part] = tensor
    packed = {layer: tensors for layer, tensors in parts.items() if "panels" in tensors}
    real: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        for part, parameter in list(module.named_parameters(recurse=False)):
            if part in parts.get(name, {}) and name not in packed:
                real[parameter] = nn.Parameter(parts[name][part], requires_grad=False)
            if parameter in real:
                setattr(module, part, real[parameter])
    LinearReplacer(model, config, device, threads, packed).replace_all()
    assert not any(parameter.is_meta for parameter in model.parameters()), "all weights of a model are kept"
    return model


def _identity(path: Path, model_config: Any, config: EngineConfig, device: torch.device) -> str | None:
    """A digest of all that packed weights depend on; None where nothing is packed, as there are no kernels.

    Files are known by what the system says of them: contents that change, change the times, and the time of the
    last change of any kind cannot be set by a program.
    """
    try:
        kernels = library()
    except CpuKernelsUnavailable:
        return None
    files = [path] if is_gguf(path) else weight_files(path)
    facts = {
        "files": [_facts_of(file) for file in files],
        "model": model_config.to_dict(),
        "dtype": str(choose_dtype(config, model_config, device)),
        "quantization": config.quantization,
        "kernels": kernels.path.name,
        "sources": _sources(),
        "versions": [version(package) for package in ("torch", *(["gguf"] if is_gguf(path) else []))],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _facts_of(file: Path) -> list[str | int]:
    state = file.stat()
    return [str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for package in _SOURCES:
        for file in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"\0{file.relative_to(_ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
