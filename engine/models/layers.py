"""Parts that several models share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Generic, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UnsupportedModel
from engine.models.decoder import Weights
from kernels.device import has_kernels
from kernels.gated_activation import gated_activation
from kernels.layer_norm import add_layer_norm
from kernels.rms_norm import add_rms_norm, rms_norm

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}

_KERNEL_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What kernels call them."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name in transformers' configurations; raises `UnsupportedModel`."""
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"the activation function {name!r} is not known")
    return _ACTIVATIONS[name]


def gate(name: str) -> str | None:
    """What the kernels call that function where it is the gate of an MLP; None where they do not have it."""
    return _KERNEL_NAMES.get(name)


@runtime_checkable
class ActivatingLinear(Protocol):
    """A linear layer that can apply an activation function to its sums before they are stored."""

    activations: Collection[str]
    """Which, by the names that the kernels give them."""

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
        self._act = activation(act)
        self._name = _KERNEL_NAMES.get(act, act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        layer: nn.Module = self.linear
        if isinstance(layer, ActivatingLinear) and self._name in layer.activations:
            return cast(Tensor, layer(hidden, self._name))
        return self._act(layer(hidden))


Layer = TypeVar("Layer", bound=nn.Module)


class Stack(nn.ModuleList, Generic[Layer]):
    """A `ModuleList` that knows the type of its layers."""

    def __iter__(self) -> Iterator[Layer]:
        return cast(Iterator[Layer], super().__iter__())


class RMSNorm(nn.RMSNorm):
    """RMS norm over the last dimension, with a kernel of our own on a GPU."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__(size, eps=eps)
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Of `[T, size]`, or of single heads `[T, H, size]`."""
        if has_kernels(hidden):
            return rms_norm(hidden, self.weight, self._eps)
        return super().forward(hidden)

    def after_adding(self, hidden: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden + update`, `[T, size]`, and the norm of it."""
        if has_kernels(hidden):
            normed, hidden = add_rms_norm(update, hidden, self.weight, self._eps)
            return hidden, normed
        hidden = hidden + update
        return hidden, super().forward(hidden)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, which can take the addition before it along."""

    def after_adding(self, hidden: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden + update`, `[T, size]`, and the norm of it."""
        if has_kernels(hidden):
            normed, hidden = add_layer_norm(update, hidden, self.weight, self.bias, self.eps)
            return hidden, normed
        hidden = hidden + update
        return hidden, self(hidden)


class OffsetRMSNorm(nn.Module):
    """RMS norm that scales by 1 + weight, in float32 throughout."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Over the last dimension."""
        if has_kernels(hidden):
            return rms_norm(hidden, self.weight, self._eps, offset=1.0)
        return F.rms_norm(hidden.float(), self.weight.shape, 1.0 + self.weight.float(), self._eps).type_as(hidden)


class GatedMLP(nn.Module):
    """down( act(gate(x)) * up(x) ), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self._act = activation(act)
        self._gate = gate(act)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        layer: nn.Module = self.gate_up
        if isinstance(layer, ActivatingLinear) and layer.can_gate and self._gate in layer.activations:
            return cast(Tensor, self.down(layer(hidden, self._gate, True)))
        gate_up = layer(hidden)
        if self._gate is not None and has_kernels(gate_up):
            return cast(Tensor, self.down(gated_activation(gate_up, self._gate)))
        gates, up = gate_up.chunk(2, dim=-1)
        result: Tensor = self.down(self._act(gates) * up)
        return result

    def add_weights(self, weights: Weights, name: str, *, saved_fused: bool = False) -> None:
        inner = self.down.in_features
        if saved_fused:
            weights.add_linear(f"{name}.gate_up_proj", self.gate_up)
        else:
            weights.add_fused([f"{name}.gate_proj", f"{name}.up_proj"], [inner, inner], self.gate_up)
        weights.add_linear(f"{name}.down_proj", self.down)
