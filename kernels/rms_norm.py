"""Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), with the residual's addition before it.

    h = x + residual                                        rounded to the type of x; without a residual h = x
    y = h / sqrt(mean(h^2) + eps) * weight                  or * (1 + weight), as Gemma has it

over the last dimension, in float32, rounded once. Fusing the addition saves a pass over the hidden state; norms of
single heads (`[T, H, D]`, which may be a slice of a projection) take many short rows a program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.device import Device, device_of
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.triton_compat import tl, triton

# Numbers that a program holds.
_NUMBERS = 2048


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    num_rows,
    eps,
    stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    place = (row // NUM_HEADS * stride + row % NUM_HEADS * head_stride)[:, None] + column[None, :]
    flat = row[:, None] * SIZE + column[None, :]
    h = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + flat, mask=inside, other=0.0).to(tl.float32)
        h = h.to(total.dtype.element_ty)
        tl.store(total + flat, h, mask=inside)
        h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 1) / SIZE + eps)
    w = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32) + OFFSET
    tl.store(out + flat, h * scale[:, None] * w[None, :], mask=inside)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of single heads: of queries, and of keys."""

    query: Tensor
    """The weight, `[D]`."""

    key: Tensor
    eps: float
    offset: float = 0.0

    def apply(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Of query `[T, H, D]` and key `[T, KH, D]`."""
        return (
            rms_norm(query, self.query, self.eps, offset=self.offset),
            rms_norm(key, self.key, self.eps, offset=self.offset),
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Norm of `x` `[T, size]` or `[T, H, size]`, contiguous in its last dimension; `offset` is added to the weight."""
    if not dispatch.use_triton(x):
        return _fallback(x, weight, eps, offset)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rms_norm_launch(x, None, weight, out, None, eps=eps, offset=offset).run()
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, both `[T, size]` (the residual contiguous), and that sum."""
    if not dispatch.use_triton(x):
        total = x + residual
        return _fallback(total, weight, eps, offset), total
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rms_norm_launch(x, residual, weight, out, total, eps=eps, offset=offset).run()
    return out, total


def _fallback(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    if not offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    # A weight near zero loses bits when it is added to one in half precision.
    return F.rms_norm(x.float(), weight.shape, offset + weight.float(), eps).type_as(x)


def rms_norm_launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor | None,
    *,
    eps: float,
    offset: float,
    target: Device | None = None,
) -> Launch:
    target = target or device_of(x.device)
    size = x.shape[-1]
    num_heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * num_heads
    constants, rows, num_warps = _constants(num_heads, size, residual is not None, float(offset), target.warp_size)
    return Launch(
        _rms_norm_kernel,
        (ceil_div(num_rows, rows),),
        {
            "x": x,
            "residual": residual,
            "weight": weight,
            "out": out,
            "total": total,
            "num_rows": num_rows,
            "eps": float(eps),
            "stride": x.stride(0),
            "head_stride": x.stride(1) if x.dim() == 3 else 0,
        },
        constants,
        num_warps=num_warps,
    )


@cache
def _constants(
    num_heads: int, size: int, has_residual: bool, offset: float, warp_size: int
) -> tuple[Mapping[str, Any], int, int]:
    """Constants, rows of a program and warps, made once for each kind of norm."""
    block = triton.next_power_of_2(size)
    rows = max(1, _NUMBERS // block)
    constants = {
        "NUM_HEADS": num_heads,
        "SIZE": size,
        "HAS_RESIDUAL": has_residual,
        "OFFSET": offset,
        "ROWS": rows,
        "BLOCK": block,
    }
    return constants, rows, min(16, max(4, block * rows // (16 * warp_size)))
