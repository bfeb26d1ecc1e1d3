"""AWQ and GPTQ: whole numbers of 4 or 8 bits, several in an int32, the lowest bits first.

            qweight                         qzeros                        scales
    AWQ     [in, out / 8]                   [groups, out / 8]             [groups, out]
    GPTQ    [in / P, out]                   [groups, out / P]             [groups, out]       P = 32 / bits

    w[o, i] = (q - zero) * scale            group: i // group_size, or with GPTQ g_idx[i]
As AutoAWQ (`WQLinear_GEMM`), AutoGPTQ (`QuantLinear`) and GPTQModel write them.
"""

# AWQ's eight outputs of an int32 stand in the order 0, 2, 4, 6, 1, 3, 5, 7. GPTQ's files hold zero - 1 in their first
# version (`gptq`), so that 15 means 16, and zero itself in the second (`gptq_v2`). With `desc_act`, g_idx scatters the
# groups over the inputs.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import InvalidWeights
from engine.quantization.interface import packed_weight, part
from kernels.integers import ceil_div
from kernels.quantized_matmul import QuantizedWeight

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in an int32 the output 0, 1, 2 ... stands."""


@dataclass(frozen=True, slots=True)
class Awq:
    """4 bits in AutoAWQ's layout for matrix products (`version: gemm`)."""

    group_size: int
    """-1: all inputs."""

    parts = ("qweight", "qzeros", "scales")

    def weight(self, layer: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """See `Format.weight`."""
        outputs, inputs = shape
        group_size = inputs if self.group_size == -1 else self.group_size
        _check_divisible(layer, "outputs", outputs, 8)
        _check_divisible(layer, "inputs", inputs, group_size)
        groups = inputs // group_size
        numbers = self._unpack(part(layer, tensors, "qweight", (inputs, outputs // 8), torch.int32))
        zeros = self._unpack(part(layer, tensors, "qzeros", (groups, outputs // 8), torch.int32))
        scales = part(layer, tensors, "scales", (groups, outputs), None)
        return packed_weight(
            layer, numbers.t().contiguous(), scales, zeros.to(torch.int16), kind="int4", group_size=group_size
        )

    @staticmethod
    def _unpack(words: Tensor) -> Tensor:
        return _unpack(words, 4)[:, :, _AWQ_ORDER].flatten(1)


@dataclass(frozen=True, slots=True)
class Gptq:
    """4 or 8 bits."""

    bits: int
    group_size: int
    """-1: all inputs."""

    scatters: bool
    """`desc_act`: g_idx must be there."""

    added_to_zeros: int
    """1 for files of the first version."""

    parts = ("qweight", "qzeros", "scales", "g_idx")

    def weight(self, layer: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """See `Format.weight`."""
        outputs, inputs = shape
        in_word = 32 // self.bits
        group_size = inputs if self.group_size == -1 else self.group_size
        _check_divisible(layer, "outputs", outputs, in_word)
        _check_divisible(layer, "inputs", inputs, in_word)
        groups = ceil_div(inputs, group_size)
        words = part(layer, tensors, "qweight", (inputs // in_word, outputs), torch.int32)
        numbers = _unpack(words.t(), self.bits).flatten(1)
        zeros = _unpack(part(layer, tensors, "qzeros", (groups, outputs // in_word), torch.int32), self.bits).flatten(1)
        scales = part(layer, tensors, "scales", (groups, outputs), None)
        order = self._order(layer, tensors, inputs, group_size)
        if order is not None:
            numbers = numbers[:, order]
        return packed_weight(
            layer,
            numbers,
            scales,
            zeros.to(torch.int16) + self.added_to_zeros,
            None if order is None else order.to(torch.int32),
            kind=f"int{self.bits}",
            group_size=group_size,
        )

    def _order(self, layer: str, tensors: Mapping[str, Tensor], inputs: int, group_size: int) -> Tensor | None:
        """The inputs sorted by group; None where they are sorted."""
        if "g_idx" not in tensors and not self.scatters:
            return None
        group = part(layer, tensors, "g_idx", (inputs,), torch.int32)
        expected = torch.arange(inputs, dtype=torch.int32, device=group.device) // group_size
        if torch.equal(group, expected):
            return None
        grouped, order = group.sort(stable=True)
        if not torch.equal(grouped, expected):
            raise InvalidWeights(f"{layer}.g_idx does not part {inputs} inputs into groups of {group_size}")
        return order


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 `[rows, n]` to uint8 `[rows, n, 32 / bits]`."""
    if bits == 8:
        return words.contiguous().view(torch.uint8).view(*words.shape, 4)
    pairs = words.contiguous().view(torch.uint8).view(*words.shape, 4, 1)
    return torch.cat((pairs & 0xF, pairs >> 4), dim=-1).flatten(2)


def _check_divisible(layer: str, what: str, number: int, divisor: int) -> None:
    if number % divisor:
        raise InvalidWeights(f"{layer} has {number} {what}, which the format cannot hold: {divisor} go together")
