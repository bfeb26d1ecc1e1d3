"""Weights into a model, one tensor at a time, so that memory never holds more than the model and a few tensors."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.device.collectives import ALONE, Group
from engine.errors import InvalidWeights, ModelError, UnsupportedModel
from engine.linears.quantized import QuantizedLinear
from engine.linears.replace import linear_places
from engine.loading.hub import is_gguf, weight_files
from engine.loading.meta_init import ModelFiller, empty_model, storage_of
from engine.loading.progress import LoadProgress
from engine.models.decoder import Decoder, Target, Weights
from engine.models.generic import GenericDecoder
from engine.quantization import QuantizedLayers, quantization_of
from kernels.quantized_matmul import QuantizedWeight, joined

logger = logging.getLogger(__name__)

_SHOWN = 5
_MAPPED_BYTES = 2**25
"""Of a file that may be in memory at once, but for a tensor that is larger by itself."""

_LARGE = 2**24
"""Numbers in a tensor that is read before the others."""

_STD = 0.02


def load_model(
    path: Path,
    model_config: Any,
    config: EngineConfig,
    *,
    device: torch.device,
    group: Group = ALONE,
    on_module_loaded: Callable[[Decoder], Callable[[nn.Module], None]] = lambda model: lambda module: None,
) -> Decoder:
    """The model in a directory or a GGUF file, configured by transformers, with its weights or random ones.

    Of a model that a `group` of ranks shares, its own rank's part. Raises `ModelError`.

    `on_module_loaded(model)` makes the function that is called with each module of a native model once that module's
    own weights are complete. It may replace the module, so that at most one module's weights are in memory twice.
    """
    if is_gguf(path) and not config.random_weights:
        return _load_gguf_model(path, model_config, config, device, group, on_module_loaded)
    files = [] if config.random_weights else weight_files(path)
    dtype = choose_dtype(config, model_config, device)
    form = quantization_of(model_config) if files else None
    native = empty_model(model_config, device=device, group=group)
    if native is not None and files and _has_another_head(native.weights(), files, dtype):
        logger.warning("config.json ties the output head to the embedding, but the checkpoint holds two that differ")
        model_config = copy.deepcopy(model_config)
        model_config.tie_word_embeddings = False
        native = empty_model(model_config, device=device, group=group)
    if group.size > 1 and (native is None or form is not None):
        raise UnsupportedModel(
            "tensor parallelism is there for models with an implementation of their own and plain floating-point "
            f"weights: tensor_parallel_size must be 1 for this {'quantized ' if form else ''}{model_config.model_type}"
        )
    if native is None and form is not None:
        raise UnsupportedModel(
            f"the checkpoint is quantized, and models of the type {model_config.model_type!r} run in transformers' own "
            "code, for which only plain floating-point weights are loaded"
        )
    if native is None:
        model = GenericDecoder.load(model_config, path if files else None, dtype=dtype, device=device)
        if config.random_weights:
            for (name, parameter), seed in zip(model.named_parameters(), itertools.count(config.seed)):
                _randomize(parameter, name, seed=seed)
        return model
    filling = ModelFiller(native, dtype=dtype, device=device, on_module_loaded=on_module_loaded(native))
    if config.random_weights:
        randomize_weights(filling, seed=config.seed)
    else:
        load_weights(filling, files, None if form is None else QuantizedLayers(files, form))
    return native


def _load_gguf_model(
    path: Path,
    model_config: Any,
    config: EngineConfig,
    device: torch.device,
    group: Group,
    on_module_loaded: Callable[[Decoder], Callable[[nn.Module], None]],
) -> Decoder:
    from engine.loading.gguf.file import GGUFFile
    from engine.loading.gguf.tensors import load_gguf

    native = empty_model(model_config, device=device, group=group)
    if native is None:
        raise UnsupportedModel(f"{path.name} is a {model_config.model_type} that the models here do not cover")
    dtype = choose_dtype(config, model_config, device)
    filling = ModelFiller(native, dtype=dtype, device=device, on_module_loaded=on_module_loaded(native))
    load_gguf(filling, GGUFFile(path), model_config)
    return native


def load_weights(filling: ModelFiller, files: Sequence[Path], quantized: QuantizedLayers | None = None) -> None:
    """Fill the model from safetensors files, of which some layers may be `quantized`.

    Where there are kernels for those, they stay packed if they are linear layers of the model; all others are
    dequantized. Raises `InvalidWeights` when the files lack a tensor, hold one that the model does not know, hold one
    twice or in another shape, or are damaged.
    """
    weights = filling.model.weights()
    stand_ins = _stand_ins(weights, files)
    seen: dict[str, tuple[Path, str]] = {}
    unknown: list[str] = []

    def name_of(found: str) -> str:
        name = weights.resolve(found)
        return stand_ins.get(name, name)

    with torch.no_grad():
        for path, found, tensor in _tensors(files, lambda found: weights.targets.get(name_of(found))):
            if quantized is not None and quantized.owns(found):
                continue
            name = name_of(found)
            if name in seen:
                raise InvalidWeights(f"{found} is both in {seen[name][0].name} and in {path.name}")
            if name in weights.targets:
                _fill(filling, weights.targets[name], name, tensor)
                seen[name] = path, found
            elif name in weights.copies:
                seen[name] = path, found
            elif weights.ignores(found) or _is_empty_bias(found, tensor, quantized):
                continue
            else:
                unknown.append(found)
        if quantized is not None:
            unknown += _load_quantized(filling, weights, quantized, seen)
    missing = [name for name in weights.targets if name not in seen]
    if missing:
        raise InvalidWeights(f"the checkpoint lacks {_listed(missing)}")
    if unknown:
        raise InvalidWeights(f"the checkpoint holds weights that the model does not know: {_listed(unknown)}")


def _places(weights: Weights, files: Sequence[Path]) -> dict[str, tuple[Path, str]]:
    """Where each of the model's tensors lies, by its name in `weights`."""
    places: dict[str, tuple[Path, str]] = {}
    for path in files:
        with _opened(path) as file:
            places |= {weights.resolve(found): (path, found) for found in file.keys()}  # noqa: SIM118
    return places


def _has_another_head(weights: Weights, files: Sequence[Path], dtype: torch.dtype) -> bool:
    """Whether a tensor that the configuration ties to another is in the checkpoint with other numbers than that."""
    places = _places(weights, files) if weights.copies else {}
    return any(
        name in places and original in places and not _are_equal(places[name], places[original], dtype)
        for name, original in weights.copies.items()
    )


def _stand_ins(weights: Weights, files: Sequence[Path]) -> dict[str, str]:
    """Tied tensors of which the checkpoint holds the copy alone, and what they are a copy of."""
    places = _places(weights, files) if weights.copies else {}
    return {name: original for name, original in weights.copies.items() if original not in places}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise InvalidWeights(f"{path.name} is damaged or no safetensors file: {error}") from error


def _load_quantized(
    filling: ModelFiller, weights: Weights, quantized: QuantizedLayers, seen: dict[str, tuple[Path, str]]
) -> list[str]:
    """Fill in or replace the quantized layers and note them in `seen`; returns those that the model does not know."""
    layers: dict[str, str] = {}
    unknown: list[str] = []
    for layer in quantized:
        name = weights.resolve(f"{layer}.weight")
        if name in seen or name in layers:
            raise InvalidWeights(f"the checkpoint holds {name} twice")
        if name in weights.targets:
            layers[name] = layer
            seen[name] = quantized.place_of(layer)
        elif not weights.ignores(f"{layer}.weight"):
            unknown.append(layer)

    def read(name: str) -> QuantizedWeight:
        return _read(quantized, layers.pop(name), weights.targets[name], filling.device)

    def fill(name: str, weight: QuantizedWeight) -> None:
        with filling.part(weights.targets[name].tensor) as part:
            part.copy_(weight.dequantized(filling.dtype))

    places = linear_places(filling.model)
    for fused in weights.linears:
        if not all(name in layers for name in fused.names):
            continue
        parts = [read(name) for name in fused.names]
        whole = joined(parts)
        if whole is not None:
            for parent, name in places[fused.linear]:
                setattr(parent, name, QuantizedLinear(whole, fused.linear.bias))
            continue
        logger.debug("%s are dequantized", _listed(fused.names))
        for name, part in zip(fused.names, parts, strict=True):
            fill(name, part)
    for name in list(layers):
        fill(name, read(name))
    return unknown


def randomize_weights(filling: ModelFiller, *, seed: int) -> None:
    """Fill the model with random numbers: matrices normal with a deviation of 0.02, norms around one, biases around
    zero.

    The same seed gives the same weights on the same kind of device, however many ranks share them.
    """
    targets: dict[int, list[Target]] = defaultdict(list)
    for target in filling.model.weights().targets.values():
        targets[storage_of(target.tensor)].append(target)
    # Filling a parameter may replace its module.
    for (name, parameter), its_seed in zip(list(filling.model.named_parameters()), itertools.count(seed)):
        parts = targets[storage_of(parameter)]
        if any(target.shard is not None or target.is_zero for target in parts):
            _randomize_shards(filling, parameter, parts, name, seed=its_seed)
            continue
        with filling.part(parameter) as part:
            _randomize(part, name, seed=its_seed)


def _randomize_shards(
    filling: ModelFiller, parameter: Tensor, targets: Sequence[Target], name: str, *, seed: int
) -> None:
    """The rank's shards of the whole parameter's random numbers; its targets lie one after another in it."""
    ordered = sorted(targets, key=lambda target: target.tensor.storage_offset())
    sizes = [math.prod(target.whole_shape) for target in ordered]
    shape = (sum(sizes),) if parameter.dim() == 1 else (1, sum(sizes))
    whole = torch.empty(shape, dtype=filling.dtype, device=filling.device)
    _randomize(whole, name, seed=seed)
    for target, numbers in zip(ordered, torch.split(whole.view(-1), sizes), strict=True):
        held = numbers.view(target.whole_shape)
        with filling.part(target.tensor) as part:
            if target.is_zero:
                part.zero_()
            else:
                part.copy_(held if target.shard is None else target.shard.take(held, target.dim))


def choose_dtype(config: EngineConfig, model_config: Any, device: torch.device) -> torch.dtype:
    """What the configuration asks for, or else what the checkpoint was saved in; raises `ModelError`.

    A checkpoint of no type or of float32 is computed in bfloat16 on a GPU, because float32 has no tensor cores there.
    """
    name = config.dtype if config.dtype != "auto" else getattr(model_config, "dtype", None) or "float32"
    if config.dtype == "auto" and device.type == "cuda" and str(name).removeprefix("torch.") == "float32":
        logger.info("float32 weights are computed with in bfloat16 on the GPU; dtype='float32' keeps them")
        name = "bfloat16"
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."))
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"the checkpoint's type {dtype} cannot be computed with: set dtype")
    return dtype


def _randomize(parameter: Tensor, name: str, *, seed: int) -> None:
    with torch.no_grad():
        parameter.normal_(0.0, _STD, generator=torch.Generator(parameter.device).manual_seed(seed))
        if parameter.dim() == 1 and name.endswith(".weight"):
            parameter.add_(1.0)


def _tensors(files: Sequence[Path], target_of: Callable[[str], Target | None]) -> Iterator[tuple[Path, str, Tensor]]:
    """All tensors, one after another; each must be let go of before the next but one is asked for.

    Of one whose target is a shard, the shard alone is read, as the model has it.

    Large ones come first: what is being converted or packed is in memory twice, and at first little else is there.
    """
    places: deque[tuple[Path, str]] = deque()
    path = files[0]
    try:
        sizes: dict[tuple[Path, str], int] = {}
        for path in files:
            with safe_open(path, framework="pt", device="cpu") as file:
                sizes |= {(path, name): math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        progress = LoadProgress(sum(path.stat().st_size for path in files))
        places.extend(sorted(sizes, key=lambda place: -sizes[place] if sizes[place] > _LARGE else 0))
        while places:
            path = places[0][0]
            # What was read of a mapped file counts as this process's memory until the mapping ends.
            read = 0
            with safe_open(path, framework="pt", device="cpu") as file:
                while places and places[0][0] == path and read < _MAPPED_BYTES:
                    _, name = places.popleft()
                    target = target_of(name)
                    if target is None or target.shard is None:
                        tensor = file.get_tensor(name)
                    else:
                        tensor = _read_shard(file, name, target)
                    read += tensor.nbytes
                    progress.advance(sizes[path, name] * tensor.dtype.itemsize)
                    yield path, name, tensor
                    del tensor
    except SafetensorError as error:
        raise InvalidWeights(f"{path.name} is damaged or no safetensors file: {error}") from error


def _read_shard(file: Any, name: str, target: Target) -> Tensor:
    stored = file.get_slice(name)
    _check_shape(name, stored.get_shape(), target)
    return target.take(stored)


def _check_shape(name: str, shape: Sequence[int], target: Target) -> None:
    if tuple(shape) != target.shape:
        raise InvalidWeights(f"{name} has the shape {list(shape)} instead of {list(target.shape)}")


def _fill(filling: ModelFiller, target: Target, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        raise InvalidWeights(f"{name} holds {tensor.dtype}: only plain floating-point weights are loaded")
    if target.shard is None:
        _check_shape(name, tensor.shape, target)
        tensor = target.take(tensor)
    with filling.part(target.tensor) as part:
        if target.is_zero:
            part.zero_()
        else:
            part.copy_(tensor)


def _read(quantized: QuantizedLayers, layer: str, target: Target, device: torch.device) -> QuantizedWeight:
    if target.tensor.dim() != 2 or target.transposed:
        raise UnsupportedModel(f"{layer} is quantized, which is loaded of linear layers that are stored [out, in] only")
    outputs, inputs = target.tensor.shape
    return quantized.read(layer, (outputs, inputs), device)


def _is_empty_bias(name: str, tensor: Tensor, quantized: QuantizedLayers | None) -> bool:
    """Early GPTQ tools saved biases of zeros for layers that have none."""
    layer, _, part = name.rpartition(".")
    return quantized is not None and layer in quantized and part == "bias" and not tensor.any()


def _are_equal(one: tuple[Path, str], other: tuple[Path, str], dtype: torch.dtype) -> bool:
    """Whether two tensors of the checkpoint are the same to the model; read in pieces."""
    with safe_open(one[0], framework="pt", device="cpu") as file:
        shape = file.get_slice(one[1]).get_shape()
    with safe_open(other[0], framework="pt", device="cpu") as file:
        if file.get_slice(other[1]).get_shape() != shape:
            return False
    step = max(1, _LARGE // math.prod(shape[1:]))
    return all(
        torch.equal(_rows(one, start, start + step).to(dtype), _rows(other, start, start + step).to(dtype))
        for start in range(0, shape[0], step)
    )


def _rows(place: tuple[Path, str], start: int, end: int) -> Tensor:
    with safe_open(place[0], framework="pt", device="cpu") as file:
        rows: Tensor = file.get_slice(place[1])[start:end]
    return rows


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
