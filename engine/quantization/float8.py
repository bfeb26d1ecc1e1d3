"""Weights of float8 (e4m3) with scales: w = weight * scale.

    weight      float8_e4m3fn `[out, in]`
    scale       one for all, one for each output (`[out]` or `[out, 1]`), or one for each block (`[out / B, in / C]`)

As compressed-tensors writes them (`weight_scale`), and DeepSeek's and transformers' `fp8` (`weight_scale_inv`, which is
the scale all the same). Both multiply rows that were rounded to float8, too; here they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import InvalidWeights
from engine.quantization.interface import packed_weight, part
from kernels.integers import ceil_div
from kernels.quantized_matmul import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Float8:
    """See above."""

    block: tuple[int, int] | None
    """Outputs and inputs that share a scale; None: all inputs do."""

    parts = ("weight", "weight_scale", "weight_scale_inv")

    def weight(self, layer: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """See `Format.weight`."""
        numbers = part(layer, tensors, "weight", shape, torch.float8_e4m3fn).contiguous().view(torch.uint8)
        if ((numbers & 0x7F) == 0x7F).any():
            raise InvalidWeights(f"{layer}.weight holds numbers that are none")
        names = [name for name in self.parts[1:] if name in tensors]
        if not names:
            raise InvalidWeights(f"the checkpoint lacks {layer}.{self.parts[1]}")
        if len(names) > 1:
            raise InvalidWeights(f"the checkpoint holds both {' and '.join(f'{layer}.{name}' for name in names)}")
        return packed_weight(
            layer,
            numbers,
            self._scales(layer, tensors, names[0], shape),
            kind="e4m3",
            group_size=shape[1] if self.block is None else self.block[1],
        )

    def _scales(self, layer: str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
        """`[groups, out]`."""
        outputs, inputs = shape
        found = tuple(tensors[name].shape)
        if self.block is not None:
            rows, columns = self.block
            scales = part(layer, tensors, name, (ceil_div(outputs, rows), ceil_div(inputs, columns)), None)
            return scales.t().repeat_interleave(rows, dim=1)[:, :outputs]
        if found in ((), (1,), (1, 1)):
            return part(layer, tensors, name, found, None).reshape(1, 1).expand(1, outputs)
        return part(layer, tensors, name, (outputs,) if len(found) == 1 else (outputs, 1), None).reshape(1, outputs)
