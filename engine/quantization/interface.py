"""What a format of quantized checkpoints is to the loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import InvalidWeights, UnsupportedModel
from kernels.quantized_matmul import QuantizedWeight, quantized_weight


class Format(Protocol):
    """How the tensors of one linear layer, `LAYER.PART` in the checkpoint, make its weight."""

    @property
    def parts(self) -> Sequence[str]:
        """What a quantized layer may consist of; the first is the part that makes a layer a quantized one."""
        ...

    def weight(self, layer: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """The weight `[out, in]` of `shape` from the layer's parts; raises `ModelError`."""
        ...


def part(
    layer: str, tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype | None
) -> Tensor:
    """A tensor of the given shape and type (None: any plain floating-point type); raises `InvalidWeights`."""
    if name not in tensors:
        raise InvalidWeights(f"the checkpoint lacks {layer}.{name}")
    tensor = tensors[name]
    if list(tensor.shape) != list(shape):
        raise InvalidWeights(f"{layer}.{name} has the shape {list(tensor.shape)} instead of {list(shape)}")
    is_plain = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (is_plain if dtype is None else tensor.dtype is dtype):
        wanted = "float32, bfloat16 or float16" if dtype is None else str(dtype)
        raise InvalidWeights(f"{layer}.{name} holds {tensor.dtype} instead of {wanted}")
    return tensor


def packed_weight(
    layer: str,
    numbers: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    *,
    kind: str,
    group_size: int,
) -> QuantizedWeight:
    """`quantized_weight`, which raises `UnsupportedModel` where the groups are too odd."""
    try:
        return quantized_weight(numbers, scales, zeros, order, kind=kind, group_size=group_size)
    except ValueError as error:
        raise UnsupportedModel(f"{layer} is quantized in {error}") from error
