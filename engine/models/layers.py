"""Parts that several models share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Generic, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from engine.device.collectives import Group
from engine.errors import UnsupportedModel
from engine.models.decoder import Weights
from engine.models.shard import Shard, shard
from kernels.gated_activation import FUNCTIONS, gated_activation
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.rms_norm import HeadNorms, add_rms_norm, rms_norm

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Names in transformers' configurations, and what kernels call them."""


def activation(name: str) -> str:
    """What kernels call the function of that name in transformers' configurations; raises `UnsupportedModel`."""
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"the activation function {name!r} is not known")
    return _ACTIVATIONS[name]


@runtime_checkable
class ActivatingLinear(Protocol):
    """A linear layer that can apply an activation function to its sums before they are stored."""

    activations: Collection[str]
    """Which, by the names that kernels give them."""

    can_gate: bool
    """Whether it can also multiply the second half of its sums with the first, once the function is applied to that."""

    def __call__(self, hidden: Tensor, activation: str, is_gated: bool = False) -> Tensor:
        """`[..., in]` to `[..., out]`, or to `[..., out / 2]` with a gate."""


class Activated(nn.Module):
    """act(linear(x)), at once where the layer can."""

    def __init__(self, linear: nn.Linear, act: str) -> None:
        """`act` as in transformers' configurations; raises `UnsupportedModel`."""
        super().__init__()
        self.linear = linear
        self._activation = activation(act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        layer: nn.Module = self.linear
        if isinstance(layer, ActivatingLinear) and self._activation in layer.activations:
            return cast(Tensor, layer(hidden, self._activation))
        return FUNCTIONS[self._activation](layer(hidden))


Layer = TypeVar("Layer", bound=nn.Module)


class Stack(nn.ModuleList, Generic[Layer]):
    """A `ModuleList` that knows the type of its layers."""

    def __iter__(self) -> Iterator[Layer]:
        return cast(Iterator[Layer], super().__iter__())


class RMSNorm(nn.Module):
    """RMS norm over the last dimension; it can take the addition before it along."""

    offset = 0.0
    """Added to the weight."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Of `[T, size]`, or of single heads `[T, H, size]`."""
        return rms_norm(hidden, self.weight, self.eps, offset=self.offset)

    def after_adding(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """`hidden + update`, `[T, size]`, and the norm of it; before the first layer there is no update."""
        if update is None:
            return hidden, self(hidden)
        normed, hidden = add_rms_norm(update, hidden, self.weight, self.eps, offset=self.offset)
        return hidden, normed


def head_norms(query: RMSNorm | None, key: RMSNorm | None) -> HeadNorms | None:
    """The norms of single heads as one value, where a layer has them; of the same epsilon."""
    if query is None or key is None:
        return None
    return HeadNorms(query.weight, key.weight, query.eps, query.offset)


class OffsetRMSNorm(RMSNorm):
    """RMS norm that scales by 1 + weight, in float32 throughout."""

    offset = 1.0


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, which can take the addition before it along."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Of `[T, size]`."""
        return layer_norm(hidden, self.weight, self.bias, self.eps)

    def after_adding(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """`hidden + update`, `[T, size]`, and the norm of it; before the first layer there is no update."""
        if update is None:
            return hidden, self(hidden)
        normed, hidden = add_layer_norm(update, hidden, self.weight, self.bias, self.eps)
        return hidden, normed


class GatedMLP(nn.Module):
    """down( act(gate(x)) * up(x) ), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, group: Group, *, bias: bool = False) -> None:
        super().__init__()
        self._group = group
        self._inner = shard(intermediate_size, group)
        self.gate_up = nn.Linear(hidden_size, 2 * self._inner.length, bias=bias)
        self.down = nn.Linear(self._inner.length, hidden_size, bias=bias)
        self._activation = activation(act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        layer: nn.Module = self.gate_up
        if isinstance(layer, ActivatingLinear) and layer.can_gate and self._activation in layer.activations:
            inner = layer(hidden, self._activation, True)
        else:
            inner = gated_activation(layer(hidden), self._activation)
        return self._group.all_reduce(self.down(inner))

    def add_weights(self, weights: Weights, name: str, *, saved_fused: bool = False) -> None:
        inner = self._inner
        if saved_fused:
            weights.add_linear(f"{name}.gate_up_proj", self.gate_up, outputs=Shard.stacked([inner, inner]))
        else:
            weights.add_fused([f"{name}.gate_proj", f"{name}.up_proj"], [inner, inner], self.gate_up)
        weights.add_linear(f"{name}.down_proj", self.down, inputs=inner)
