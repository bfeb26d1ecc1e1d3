"""Rotary position embeddings (Su et al., arXiv 2104.09864), applied to the first R of a head's D dimensions.

x'[i] = x[i] cos[i] - x[j] sin[i]        x'[j] = x[j] cos[i] + x[i] sin[i]        i < R / 2

halves        j = i + R / 2          (GPT-NeoX, Llama, nearly all)
interleaved   2i and 2i + 1          (GPT-J, Cohere, GLM)
"""

# Heads are `[T, H, D]`, cos and sin `[T, 1, R / 2]` or `[T, R / 2]`, made in float32 by the model. Products and sums
# are taken in float32 and rounded once.

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.device import Device, device_of
from kernels.launch import Launch
from kernels.triton_compat import tl, triton


@triton.jit
def rotate_tile(
    heads,
    head,
    is_head,
    head_stride,
    dim,
    cos,
    sin,
    weight,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """One token's heads, rotated, as float32 `[heads, dims]`. `heads` points to the token, `cos`, `sin` to its angles.

    Each dimension is loaded with its partner: the second load finds the first's lines in the cache. With HAS_NORM heads
    are normalized first, as `rms_norm.py` does, and rounded as there.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    rotates = dim < ROTARY_DIM
    if INTERLEAVED:
        partner = dim ^ 1
        angle = dim // 2
        is_first = dim % 2 == 0
    else:
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        angle = tl.where(dim < HALF, dim, dim - HALF)
        is_first = dim < HALF
    rows = heads + head[:, None] * head_stride
    own = tl.load(rows + dim[None, :], mask=is_head[:, None] & (dim < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    other = tl.load(rows + partner[None, :], mask=is_head[:, None] & rotates[None, :], other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / HEAD_DIM + eps)[:, None]
        own_weight = tl.load(weight + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32) + OFFSET
        other_weight = tl.load(weight + partner, mask=rotates, other=0.0).to(tl.float32) + OFFSET
        own = (own * scale * own_weight[None, :]).to(heads.dtype.element_ty).to(tl.float32)
        other = (other * scale * other_weight[None, :]).to(heads.dtype.element_ty).to(tl.float32)
    c = tl.load(cos + angle, mask=rotates, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=rotates, other=0.0).to(tl.float32)
    return own * c[None, :] + other * tl.where(is_first, -s, s)[None, :]


@triton.jit
def _rotate_kernel(
    heads,
    cos,
    sin,
    out,
    stride,
    head_stride,
    angle_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, DIMS)
    rotated = rotate_tile(
        heads + token * stride,
        head,
        head < NUM_HEADS,
        head_stride,
        dim,
        cos + token * angle_stride,
        sin + token * angle_stride,
        None,
        0.0,
        HEAD_DIM,
        ROTARY_DIM,
        INTERLEAVED,
        False,
        0.0,
    )
    tl.store(
        out + (token * NUM_HEADS + head[:, None]) * HEAD_DIM + dim[None, :],
        rotated,
        mask=(head < NUM_HEADS)[:, None] & (dim < HEAD_DIM)[None, :],
    )


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """The rotated heads, contiguous; `heads` may be strided but for its last dimension."""
    if not dispatch.use_triton(heads):
        return rotate_fallback(heads, cos, sin, interleaved=interleaved)
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    rotate_launch(heads, cos, sin, out, interleaved=interleaved).run()
    return out


def rotate_fallback(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """As `rotate` with angles `[T, 1, R / 2]`, in the type of the heads."""
    dim = 2 * cos.shape[-1]
    if interleaved:
        first, second = heads[..., 0:dim:2], heads[..., 1:dim:2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        return torch.cat((rotated, heads[..., dim:]), dim=-1)
    first, second, rest = heads[..., : dim // 2], heads[..., dim // 2 : dim], heads[..., dim:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rotate_launch(
    heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, interleaved: bool, target: Device | None = None
) -> Launch:
    target = target or device_of(heads.device)
    num_tokens, num_heads, head_dim = heads.shape
    tile = triton.next_power_of_2(num_heads) * triton.next_power_of_2(head_dim)
    return Launch(
        _rotate_kernel,
        (num_tokens,),
        {
            "heads": heads,
            "cos": cos,
            "sin": sin,
            "out": out,
            "stride": heads.stride(0),
            "head_stride": heads.stride(1),
            "angle_stride": cos.stride(0),
        },
        {
            "NUM_HEADS": num_heads,
            "HEAD_DIM": head_dim,
            "ROTARY_DIM": 2 * cos.shape[-1],
            "INTERLEAVED": interleaved,
            "HEADS": triton.next_power_of_2(num_heads),
            "DIMS": triton.next_power_of_2(head_dim),
        },
        num_warps=min(8, max(1, tile // (16 * target.warp_size))),
    )
