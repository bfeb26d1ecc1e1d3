"""Parts that several models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UnsupportedModel
from engine.models.decoder import Weights

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name in transformers' configurations; raises `UnsupportedModel`."""
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"the activation function {name!r} is not known")
    return _ACTIVATIONS[name]


Layer = TypeVar("Layer", bound=nn.Module)


class Stack(nn.ModuleList, Generic[Layer]):
    """A `ModuleList` that knows the type of its layers."""

    def __iter__(self) -> Iterator[Layer]:
        return cast(Iterator[Layer], super().__iter__())


class OffsetRMSNorm(nn.Module):
    """RMS norm that scales by 1 + weight, in float32 throughout."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Over the last dimension."""
        return F.rms_norm(hidden.float(), self.weight.shape, 1.0 + self.weight.float(), self._eps).type_as(hidden)


class GatedMLP(nn.Module):
    """down( act(gate(x)) * up(x) ), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self._act = activation(act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        result: Tensor = self.down(self._act(gate) * up)
        return result

    def add_weights(self, weights: Weights, name: str, *, saved_fused: bool = False) -> None:
        inner = self.down.in_features
        if saved_fused:
            weights.add_linear(f"{name}.gate_up_proj", self.gate_up)
        else:
            weights.add_fused([f"{name}.gate_proj", f"{name}.up_proj"], [inner, inner], self.gate_up)
        weights.add_linear(f"{name}.down_proj", self.down)
