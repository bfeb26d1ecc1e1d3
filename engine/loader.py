"""Weights into a model, one tensor at a time, so that memory never holds more than the model and a few tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.errors import InvalidWeights, ModelError, UnsupportedModel
from engine.hub import weight_files
from engine.models.decoder import Decoder, NativeDecoder, Weights
from engine.models.generic import GenericDecoder
from engine.models.registry import NATIVE

logger = logging.getLogger(__name__)

_SHOWN = 5
_MAPPED_BYTES = 2**26
"""Of a file that may be in memory at once, but for a tensor that is larger by itself."""

_DEFAULT_STD = 0.02


def load_model(directory: Path, model_config: Any, config: EngineConfig, *, device: torch.device) -> Decoder:
    """The model in `directory`, configured by transformers, with its weights or random ones. Raises `ModelError`."""
    files = [] if config.random_weights else weight_files(directory)
    dtype = choose_dtype(config, model_config)
    native = empty_model(model_config, dtype=dtype, device=device)
    model: Decoder
    if native is not None:
        model = native
        if files:
            load_weights(native, files)
    else:
        model = GenericDecoder.load(model_config, directory if files else None, dtype=dtype, device=device)
    if config.random_weights:
        randomize_weights(model, seed=config.seed)
    return model


def empty_model(config: Any, *, dtype: torch.dtype, device: torch.device) -> NativeDecoder | None:
    """A native model for transformers' configuration with memory for its weights, but nothing in it.

    None where there is no native implementation, or none that does all that the configuration asks for.
    """
    build = NATIVE.get(config.model_type)
    if build is None:
        return None
    try:
        with torch.device("meta"):
            model = build(config)
    except UnsupportedModel as reason:
        logger.info("transformers' own code runs this %s: %s", config.model_type, reason)
        return None
    _materialize(model, dtype=dtype, device=device)
    return model.requires_grad_(False).eval()


def load_weights(model: NativeDecoder, files: Sequence[Path]) -> None:
    """Fill the model from safetensors files.

    Raises `InvalidWeights` when the files lack a tensor, hold one that the model does not know, hold one twice or in
    another shape, or are damaged.
    """
    weights = model.weights()
    seen: dict[str, Path] = {}
    unknown: list[str] = []
    with torch.no_grad():
        for path, found, tensor in _tensors(files):
            name = weights.resolve(found)
            if name in seen:
                raise InvalidWeights(f"{found} is both in {seen[name].name} and in {path.name}")
            if name in weights.targets:
                _fill(weights, name, tensor)
                seen[name] = path
            elif name in weights.copies:
                seen[name] = path
            elif not any(pattern.fullmatch(found) for pattern in weights.ignored):
                unknown.append(found)
    missing = [name for name in weights.targets if name not in seen]
    if missing:
        raise InvalidWeights(f"the checkpoint lacks {_listed(missing)}")
    if unknown:
        raise InvalidWeights(f"the checkpoint holds weights that the model does not know: {_listed(unknown)}")
    _check_copies(weights, seen)


def randomize_weights(model: Decoder, *, seed: int, std: float = _DEFAULT_STD) -> None:
    """Fill the model with random numbers: matrices normal with deviation `std`, norms around one, biases around zero.

    The same seed gives the same weights on the same kind of device.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator(parameter.device).manual_seed(seed)
            seed += 1
            parameter.normal_(0.0, std, generator=generator)
            if parameter.dim() == 1 and name.endswith(".weight"):
                parameter.add_(1.0)


def choose_dtype(config: EngineConfig, model_config: Any) -> torch.dtype:
    """What the configuration asks for, or else what the checkpoint was saved in; raises `ModelError`."""
    name = config.dtype if config.dtype != "auto" else getattr(model_config, "dtype", None) or "float32"
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."))
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"the checkpoint's type {dtype} cannot be computed with: set dtype")
    return dtype


def _materialize(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give each parameter memory; tied ones stay one. Buffers were computed already and only move."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False
                )
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _tensors(files: Sequence[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """All tensors, one after another; each must be let go of before the next but one is asked for."""
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                remaining = list(file.keys())
            while remaining:
                # What was read of a mapped file counts as this process's memory until the mapping ends.
                read = 0
                with safe_open(path, framework="pt", device="cpu") as file:
                    while remaining and read < _MAPPED_BYTES:
                        name = remaining.pop(0)
                        tensor = file.get_tensor(name)
                        read += tensor.nbytes
                        yield path, name, tensor
                        del tensor
        except SafetensorError as error:
            raise InvalidWeights(f"{path.name} is damaged or no safetensors file: {error}") from error


def _fill(weights: Weights, name: str, tensor: Tensor) -> None:
    target = weights.targets[name]
    if tuple(tensor.shape) != target.shape:
        raise InvalidWeights(f"{name} has the shape {list(tensor.shape)} instead of {list(target.shape)}")
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        raise InvalidWeights(f"{name} holds {tensor.dtype}: only plain floating-point weights are loaded")
    target.fill(tensor)


def _check_copies(weights: Weights, seen: dict[str, Path]) -> None:
    """A tied weight that was saved twice must be the same twice, or the checkpoint is not what its config says."""
    for name, original in weights.copies.items():
        if name not in seen:
            continue
        target = weights.targets[original]
        for _, found, tensor in _tensors([seen[name]]):
            if weights.resolve(found) == name and not torch.equal(
                tensor.to(target.tensor.device, target.tensor.dtype), target.tensor
            ):
                raise InvalidWeights(f"config.json ties {name} to {original}, but the checkpoint holds two that differ")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
