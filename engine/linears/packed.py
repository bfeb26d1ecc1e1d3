"""Linear layers by the C++ kernel, with weights in the order that it reads, or rounded to int8."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kernels.cpu.library import Library
from kernels.cpu.linear import ACTIVATIONS, TYPES, PackedWeight, linear, pack_weight, pad_bias


class PackedLinear(nn.Module):
    """A linear layer with a packed weight; made by `pack` of a loaded layer, or by `restore` of one packed before."""

    activations = frozenset(ACTIVATIONS)

    def __init__(self, library: Library, weight: PackedWeight, bias: Tensor | None) -> None:
        """`bias` as `pad_bias` makes it."""
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight: PackedWeight = weight
        self._library = library
        self._bias = bias

    @classmethod
    def pack(cls, library: Library, layer: nn.Linear, *, int8: bool = False) -> PackedLinear:
        """Take a linear layer's weight over: the layer is not to be used afterwards."""
        weight = pack_weight(layer.weight.detach(), library.width, int8=int8)
        bias = None if layer.bias is None else pad_bias(layer.bias.detach(), library.width)
        del layer.weight
        return cls(library, weight, bias)

    @classmethod
    def restore(cls, library: Library, layer: nn.Linear, parts: Mapping[str, Tensor]) -> PackedLinear:
        """Stand for a layer that has no weights yet, with the `parts` that its packed form had."""
        panels = parts["panels"]
        weight = PackedWeight(panels, parts.get("scale"), layer.in_features, layer.out_features, panels.dtype)
        return cls(library, weight, parts.get("bias"))

    @property
    def parts(self) -> dict[str, Tensor]:
        """All of its numbers, for `restore`."""
        named = {"panels": self.weight.panels, "scale": self.weight.scale, "bias": self._bias}
        return {name: part for name, part in named.items() if part is not None}

    @staticmethod
    def takes(layer: nn.Linear) -> bool:
        return layer.weight.dtype in TYPES

    @property
    def can_gate(self) -> bool:
        """Whether `is_gated` may be asked for."""
        return self.weight.can_gate

    def forward(self, hidden: Tensor, activation: str = "none", is_gated: bool = False) -> Tensor:
        """`[..., in]` to `[..., out]`, or to `[..., out / 2]` where the first half of the outputs gates the second."""
        return linear(self._library, hidden, self.weight, self._bias, activation=activation, is_gated=is_gated)


class PackedEmbedding(nn.Module):
    """An embedding that reads its rows from the packed weight of the layer it is tied to."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self._head = [head]  # in a list, so that it is no submodule a second time

    @staticmethod
    def takes(embedding: nn.Embedding) -> bool:
        """Whether it does nothing but look rows up: subclasses scale, for example."""
        return type(embedding) is nn.Embedding and embedding.max_norm is None

    def forward(self, token_ids: Tensor) -> Tensor:
        """`[T]` to `[T, hidden]`."""
        rows = self._head[0].weight.rows(token_ids.reshape(-1))
        return rows.view(*token_ids.shape, rows.shape[-1])
