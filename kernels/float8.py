"""e4m3 numbers (Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433), as the KV cache holds them.

    s eeee mmm     value = (-1)^s 2^(e - 7) 1.mmm;  e = 0: (-1)^s 2^-6 0.mmm;  largest 448;  s 1111 111 is NaN

Kernels see the bits as uint8 and convert by hand where the device has no instruction for it, so that one kernel serves
every GPU and the interpreter. A stored number is the true one divided by its scale, a float32 tensor `[1]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.language import tl, triton

LARGEST = 448.0


@triton.jit
def from_e4m3(bits, NATIVE: tl.constexpr):
    """uint8 to float16, exactly (but for NaN where not NATIVE, which is never stored)."""
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    wide = bits.to(tl.uint16)
    # The same fields, further left: half precision has a bias of 15 instead of 7, hence the factor 2^8.
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def to_e4m3(number):
    """float32 to uint8, to the nearest, ties to even; beyond the largest stays the largest."""
    bits = number.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(number), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    # Normal numbers: round the 23 bits of the mantissa to 3, and take the difference of the biases off the exponent.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # The others are multiples of 2^-9; adding 2^23 rounds to a whole number and leaves it in the lowest bits.
    subnormal = (size * 512.0 + 8388608.0).to(tl.uint32, bitcast=True) & 0xF
    return (sign | tl.where(size < 0.015625, subnormal, normal)).to(tl.uint8)


def quantize_torch(numbers: Tensor, scale: Tensor) -> Tensor:
    """The twin of what `kv_write` stores: `numbers / scale` as float8_e4m3fn."""
    return (numbers.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def as_bits(cache: Tensor) -> Tensor:
    """How kernels are handed a cache: uint8 in place of float8."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache
