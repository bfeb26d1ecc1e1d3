"""Layer norm (Ba et al., arXiv 1607.06450), with the residual's addition before it.

    h = x + residual                                        rounded to the type of x; without a residual h = x
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

over the last dimension of `[T, size]`, in float32, rounded once. The variance is that of the deviations, in a second
pass over registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.device import Device, device_of
from kernels.launch import Launch
from kernels.triton_compat import tl, triton


@triton.jit
def _layer_norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    eps,
    stride,
    SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    h = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
        h = h.to(total.dtype.element_ty)
        tl.store(total + row * SIZE + column, h, mask=inside)
        h = h.to(tl.float32)
    deviation = tl.where(inside, h - tl.sum(h, 0) / SIZE, 0.0)
    scale = tl.rsqrt(tl.sum(deviation * deviation, 0) / SIZE + eps)
    y = deviation * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, y, mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Norm of `x` `[T, size]`, contiguous in its last dimension."""
    if not dispatch.use_triton(x):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    layer_norm_launch(x, None, weight, bias, out, None, eps=eps).run()
    return out


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual` (the residual contiguous), and that sum."""
    if not dispatch.use_triton(x):
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias, eps), total
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    layer_norm_launch(x, residual, weight, bias, out, total, eps=eps).run()
    return out, total


def layer_norm_launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    *,
    eps: float,
    target: Device | None = None,
) -> Launch:
    target = target or device_of(x.device)
    block = triton.next_power_of_2(x.shape[1])
    return Launch(
        _layer_norm_kernel,
        (len(x),),
        {
            "x": x,
            "residual": residual,
            "weight": weight,
            "bias": bias,
            "out": out,
            "total": total,
            "eps": float(eps),
            "stride": x.stride(0),
        },
        {
            "SIZE": x.shape[1],
            "HAS_RESIDUAL": residual is not None,
            "HAS_BIAS": bias is not None,
            "BLOCK": block,
        },
        num_warps=min(16, max(1, block // (8 * target.warp_size))),
    )
