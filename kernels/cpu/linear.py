"""Linear layers in C++ (`source/linear.cpp`): out = activation(x W^T + bias), weights packed beforehand.

With a gate, the first half of these outputs gates the second: out = activation(first) * second.

The reference is `torch.nn.functional.linear`; for int8 weights it is `quantized_linear_reference`: weights are rounded
to int8 in groups of 64 inputs, rows to int16, so that next to nothing is lost in rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import Library
from kernels.integers import ceil_div

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
GROUP = 64
"""Neighbours in a row of an int8 weight that share a scale."""

INT8_MAX, INT16_MAX = 127, 32767
# Numbers of a weight that are packed at a time: what lies between weight and panels stays in the processor's cache.
_PACKED_AT_ONCE = 2**17


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input", "weight", "weight_scale", "bias", "output")],
        *[(name, ctypes.c_int64) for name in ("rows", "in_features", "out_features", "input_stride")],
        *[(name, ctypes.c_int32) for name in ("type", "activation", "is_gated", "threads")],
    ]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[out, in]` in the order that the kernel of one width reads."""

    panels: Tensor
    """`[panels, in, 2 * width]`; bfloat16 as `[panels, in, width, 2]`, int8 as `[panels, in / 2, 2 * width, 2]`."""

    scale: Tensor | None
    """Of each group of inputs, `[panels, groups, 2 * width]` float32: with int8 only."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    @property
    def can_gate(self) -> bool:
        """Whether either half of the outputs is whole panels."""
        return len(self.panels) % 2 == 0 and self.out_features == len(self.panels) * self._columns

    @property
    def _columns(self) -> int:
        """Of a panel."""
        if self.dtype is torch.bfloat16:
            return self.panels.shape[2] * 2
        return self.panels.shape[2]

    def rows(self, indices: Tensor) -> Tensor:
        """Rows `[len(indices), in]` of the weight; not for int8."""
        panel, column = indices // self._columns, indices % self._columns
        if self.dtype is torch.bfloat16:
            half = self._columns // 2
            return self.panels[panel, :, column % half, column // half]
        return self.panels[panel, :, column]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[out, in]` as int8, and the scales of its groups, float32 `[out, ceil(in / GROUP)]`."""
    grouped = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    numbers, scale = _rounded(grouped, INT8_MAX)
    return numbers.to(torch.int8).flatten(1)[:, : weight.shape[1]], scale


def quantize_rows(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `[rows, n]` as int16 and its float32 scale `[rows]`: the row is about int16 * scale."""
    numbers, scale = _rounded(hidden.float(), INT16_MAX)
    return numbers.to(torch.int16), scale


def _rounded(numbers: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Whole numbers `[..., n]` of at most `most`, and scales `[...]`, by which they are about `numbers`."""
    scale = numbers.abs().amax(dim=-1) / most
    factor = torch.where(scale > 0, 1 / scale, 0.0)
    return (numbers * factor[..., None]).round().clamp(-most, most), scale


def pack_weight(weight: Tensor, width: int, *, int8: bool = False) -> PackedWeight:
    """Pack `[out, in]` of float32, bfloat16 or float16 for a library with vectors of `width`."""
    out_features, in_features = weight.shape
    columns = 2 * width
    num_panels = ceil_div(out_features, columns)
    dtype = torch.int8 if int8 else weight.dtype
    groups = ceil_div(in_features, GROUP)
    scale = torch.zeros(num_panels, groups, columns) if int8 else None
    # Two neighbours of 8 bits go to one place of 16.
    inputs = ceil_div(in_features, 2) if int8 else in_features
    panels = torch.empty(num_panels, inputs, columns, dtype=torch.int16 if int8 else dtype)
    step = max(1, _PACKED_AT_ONCE // (in_features * columns)) * columns
    for start in range(0, out_features, step):
        part = weight[start : start + step]
        whole = len(part) // columns
        first = start // columns
        if scale is not None:
            part, scales = quantize_weight(part)
            part = F.pad(part, (0, in_features % 2)).view(torch.int16)
            padded = F.pad(scales, (0, 0, 0, -len(part) % columns)).view(-1, columns, groups)
            scale[first : first + len(padded)] = padded.transpose(1, 2)
        _pack(part[: whole * columns].reshape(whole, columns, inputs), panels[first : first + whole])
        if len(rest := part[whole * columns :]):
            padded = F.pad(rest, (0, 0, 0, columns - len(rest)))
            _pack(padded[None], panels[first + whole : first + whole + 1])
    if int8:
        panels = panels.view(torch.int8).view(num_panels, inputs, columns, 2)
    elif dtype is torch.bfloat16:
        panels = panels.view(num_panels, inputs, width, 2)
    return PackedWeight(panels, scale, in_features, out_features, dtype)


def _pack(rows: Tensor, panels: Tensor) -> None:
    """`[panels, columns, in]` into `[panels, in, columns]`."""
    rows = rows.transpose(1, 2)
    if panels.dtype is not torch.bfloat16:
        panels.copy_(rows)
        return
    # Column j beside column j + width. Whole numbers of 16 bits are copied several times as fast.
    width = panels.shape[2] // 2
    pairs, rows = panels.view(torch.int16).view(*panels.shape[:2], width, 2), rows.view(torch.int16)
    pairs[..., 0].copy_(rows[..., :width])
    pairs[..., 1].copy_(rows[..., width:])


def pad_bias(bias: Tensor, width: int) -> Tensor:
    """A bias as `linear` takes it."""
    return F.pad(bias.float(), (0, -len(bias) % (2 * width)))


def linear(
    library: Library,
    hidden: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    is_gated: bool = False,
) -> Tensor:
    """`[..., in]` to `[..., out]`, or to `[..., out / 2]` with a gate, if `weight.can_gate`; `bias` from `pad_bias`.

    Weights have the type of `hidden`, or are int8: then each row of `hidden` is rounded to int16 by its largest number.
    """
    if hidden.dtype not in TYPES or (weight.scale is None and weight.dtype is not hidden.dtype):
        raise ValueError(f"weights of {weight.dtype} do not go with {hidden.dtype}")
    if hidden.shape[-1] != weight.in_features:
        raise ValueError(f"rows of {hidden.shape[-1]} do not go with a weight of {weight.in_features}")
    if is_gated and not weight.can_gate:
        raise ValueError(f"{weight.out_features} outputs are not two halves of whole panels")
    rows = hidden.reshape(-1, weight.in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(len(rows), weight.out_features // 2 if is_gated else weight.out_features, dtype=hidden.dtype)
    shape = (*hidden.shape[:-1], out.shape[1])
    if len(rows):
        library.functions.pagemill_linear(
            ctypes.byref(
                _Arguments(
                    rows.data_ptr(),
                    weight.panels.data_ptr(),
                    None if weight.scale is None else weight.scale.data_ptr(),
                    None if bias is None else bias.data_ptr(),
                    out.data_ptr(),
                    len(rows),
                    weight.in_features,
                    weight.out_features,
                    rows.stride(0),
                    TYPES[hidden.dtype],
                    ACTIVATIONS[activation],
                    is_gated,
                    torch.get_num_threads(),
                )
            )
        )
    return out.view(shape)


def quantized_linear_reference(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """What an int8 weight `[out, in]` with the scales of its groups computes, in plain torch; rows are rounded, too."""
    rows, row_scale = quantize_rows(hidden.reshape(-1, hidden.shape[-1]))
    result = torch.zeros(len(rows), len(weight))
    for group, numbers in enumerate(weight.split(GROUP, dim=1)):
        # Whole numbers below 2^53 are exact in float64.
        sums = rows[:, group * GROUP : (group + 1) * GROUP].double() @ numbers.double().t()
        result += sums.float() * scale[:, group]
    result *= row_scale[:, None]
    if bias is not None:
        result = result + bias.float()
    return result.to(hidden.dtype).view(*hidden.shape[:-1], len(weight))
