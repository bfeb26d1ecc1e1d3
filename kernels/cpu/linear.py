"""Linear layers in C++ (`source/linear.cpp`): out = activation(x W^T + bias) + residual, weights packed beforehand.

The twin is `torch.nn.functional.linear`; for int8 weights it is `quantized_linear_torch`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import Library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
INT8_MAX = 127
# Rows of a weight that are packed at a time, so that little more than the packed weight is in memory.
_PACKED_AT_ONCE = 4096


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input", "weight", "weight_scale", "bias", "residual", "output")],
        *[(name, ctypes.c_int64) for name in ("rows", "in_features", "out_features", "input_stride")],
        *[(name, ctypes.c_int32) for name in ("type", "activation", "threads")],
    ]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[out, in]` in the order that the kernel of one width reads."""

    panels: Tensor
    """`[panels, in, 2 * width]`; bfloat16 as `[panels, in, width, 2]`, int8 as `[panels, in / 2, 2 * width, 2]`."""

    scale: Tensor | None
    """Of each output, float32, padded to whole panels: with int8 only."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    def rows(self, indices: Tensor) -> Tensor:
        """Rows `[len(indices), in]` of the weight; not for int8."""
        width = self.panels.shape[2] * (self.panels.shape[3] if self.panels.dim() == 4 else 1)
        panel, column = indices // width, indices % width
        if self.dtype is torch.bfloat16:
            half = width // 2
            return self.panels[panel, :, column % half, column // half]
        return self.panels[panel, :, column]


def quantize_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `[rows, n]` as int8 and its float32 scale `[rows]`: the row is about int8 * scale."""
    wide = tensor.float()
    scale = wide.abs().amax(dim=-1) / INT8_MAX
    factor = torch.where(scale > 0, 1 / scale, 0.0)
    return (wide * factor[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def pack_weight(weight: Tensor, width: int, *, int8: bool = False) -> PackedWeight:
    """Pack `[out, in]` of float32, bfloat16 or float16 for a library with vectors of `width`."""
    out_features, in_features = weight.shape
    columns = 2 * width
    num_panels = -(-out_features // columns)
    dtype = torch.int8 if int8 else weight.dtype
    if int8:
        panels = torch.zeros(num_panels, -(-in_features // 2), columns, 2, dtype=dtype)
        scale = torch.zeros(num_panels * columns)
    elif dtype is torch.bfloat16:
        panels, scale = torch.zeros(num_panels, in_features, width, 2, dtype=dtype), None
    else:
        panels, scale = torch.zeros(num_panels, in_features, columns, dtype=dtype), None
    step = _PACKED_AT_ONCE // columns * columns
    for start in range(0, out_features, step):
        part = weight[start : start + step]
        if scale is not None:
            part, its_scale = quantize_rows(part)
            scale[start : start + len(part)] = its_scale
            part = F.pad(part, (0, in_features % 2))
        whole = -(-len(part) // columns)
        part = F.pad(part, (0, 0, 0, whole * columns - len(part)))
        target = panels[start // columns : start // columns + whole]
        if int8:
            target.copy_(part.view(whole, columns, -1, 2).transpose(1, 2))
        elif dtype is torch.bfloat16:
            target.copy_(part.view(whole, 2, width, in_features).permute(0, 3, 2, 1))
        else:
            target.copy_(part.view(whole, columns, in_features).transpose(1, 2))
    return PackedWeight(panels, scale, in_features, out_features, dtype)


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
    residual: Tensor | None = None,
) -> Tensor:
    """`[..., in]` to `[..., out]`; `bias` from `pad_bias`, `residual` `[..., out]`.

    Weights have the type of `hidden`, or are int8: then each row of `hidden` is rounded to int8 by its largest element.
    """
    if hidden.dtype not in TYPES or (weight.scale is None and weight.dtype is not hidden.dtype):
        raise ValueError(f"weights of {weight.dtype} do not go with {hidden.dtype}")
    if hidden.shape[-1] != weight.in_features:
        raise ValueError(f"rows of {hidden.shape[-1]} do not go with a weight of {weight.in_features}")
    rows = hidden.reshape(-1, weight.in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(len(rows), weight.out_features, dtype=hidden.dtype)
    shape = (*hidden.shape[:-1], weight.out_features)
    if residual is not None:
        if residual.dtype is not hidden.dtype or residual.shape != shape:
            raise ValueError("the residual must be like the result")
        residual = residual.contiguous()
    if len(rows):
        library.functions.pagemill_linear(
            ctypes.byref(
                _Arguments(
                    rows.data_ptr(),
                    weight.panels.data_ptr(),
                    None if weight.scale is None else weight.scale.data_ptr(),
                    None if bias is None else bias.data_ptr(),
                    None if residual is None else residual.data_ptr(),
                    out.data_ptr(),
                    len(rows),
                    weight.in_features,
                    weight.out_features,
                    rows.stride(0),
                    TYPES[hidden.dtype],
                    ACTIVATIONS[activation],
                    torch.get_num_threads(),
                )
            )
        )
    return out.view(shape)


def quantized_linear_torch(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """What int8 weights `[out, in]` with `scale` `[out]` compute, in plain torch: rows of `hidden` rounded likewise."""
    rows, row_scale = quantize_rows(hidden.reshape(-1, hidden.shape[-1]))
    # Whole numbers below 2^53 are exact in float64.
    sums = (rows.double() @ weight.double().t()).float()
    result = sums * (scale * row_scale[:, None])
    if bias is not None:
        result = result + bias.float()
    return result.to(hidden.dtype).view(*hidden.shape[:-1], len(weight))
