"""A native model without memory for its weights, and how each parameter gets its own."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.device.collectives import ALONE, Group
from engine.errors import UnsupportedModel
from engine.loading.buffer_pool import BufferPool
from engine.models.decoder import NativeDecoder
from engine.models.registry import NATIVE

logger = logging.getLogger(__name__)


def empty_model(config: Any, *, device: torch.device, group: Group = ALONE) -> NativeDecoder | None:
    """A native model for transformers' configuration, without memory for its weights: they are on the meta device.

    Of the ranks in `group`, it is the one's that it stands for.

    None where there is no native implementation, or none that does all that the configuration asks for.
    """
    build = NATIVE.get(config.model_type)
    if build is None:
        return None
    try:
        with torch.device("meta"), _NoInitialValues():
            model = build(config, group)
    except UnsupportedModel as reason:
        logger.info("transformers' own code runs this %s: %s", config.model_type, reason)
        return None
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.requires_grad_(False).eval()


class _NoInitialValues(TorchFunctionMode):
    """Without the initial values that modules give their parameters when they are made.

    On the meta device they would be nothing, after importing torch's compiler: two seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class ModelFiller:
    """A native model on its way from the meta device to having its weights.

    A parameter gets memory when its first number comes. `on_module_loaded` gets each module whose last number came.
    """

    def __init__(
        self,
        model: NativeDecoder,
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_module_loaded: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._on_module_loaded = on_module_loaded
        self._buffers = BufferPool()
        self._owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._owners[parameter].append((module, name))
        # What a part belongs to is known by its storage.
        self._parameters = {storage_of(parameter): parameter for parameter in self._owners}
        self._real: dict[nn.Parameter, nn.Parameter] = {}
        self._missing = {parameter: parameter.numel() for parameter in self._owners}
        self._incomplete = Counter(module for owners in self._owners.values() for module, _ in owners)

    @contextmanager
    def part(self, meta: Tensor) -> Iterator[Tensor]:
        """Memory for a parameter of the model, or for a part of one; filled once what is inside ends."""
        parameter = self._parameters[storage_of(meta)]
        if parameter not in self._real:
            self._real[parameter] = self._materialize(parameter)
        yield self._real[parameter].detach().as_strided(meta.shape, meta.stride(), meta.storage_offset())
        self._missing[parameter] -= meta.numel()
        if self._missing[parameter] == 0:
            self._complete(parameter)

    def _materialize(self, parameter: nn.Parameter) -> nn.Parameter:
        if self.device.type == "cpu":
            memory = self._buffers.empty(parameter.shape, self.dtype)
        else:
            memory = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        real = nn.Parameter(memory, requires_grad=False)
        for module, name in self._owners[parameter]:
            setattr(module, name, real)
        return real

    def _complete(self, parameter: nn.Parameter) -> None:
        """Forget it, with what may be replaced now: nothing but the model is to keep weights."""
        del self._real[parameter]
        complete = []
        for module, _ in self._owners.pop(parameter):
            self._incomplete[module] -= 1
            if self._incomplete[module] == 0:
                del self._incomplete[module]
                complete.append(module)
        for module in complete:
            self._on_module_loaded(module)


def storage_of(tensor: Tensor) -> int:
    """What tells apart the memory that tensors lie in, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)
