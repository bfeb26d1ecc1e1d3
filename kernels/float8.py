"""e4m3 numbers (Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433), as the KV cache holds them.

s eeee mmm     value = (-1)^s 2^(e - 7) 1.mmm;  e = 0: (-1)^s 2^-6 0.mmm;  largest 448;  s 1111 111 is NaN

scale = 2^(byte - 127)       |stored * scale - true|  <=  max( 2^-4 |true|, 2^-10 scale ),   scale < largest / 224
"""

# Kernels see the bits as uint8 and convert by hand where the device has no instruction for it, so that one kernel
# serves every GPU and the interpreter.
#
# A stored number is the true one divided by a scale that the numbers of one head at one position share: the least power
# of two that brings the largest of them to 448 or below. (So do the MX formats with each 32 numbers: Rouhani et al.,
# arXiv 2310.10537.) Its exponent takes a byte and stands beside the block, at `[block, head, offset]`; nothing is
# calibrated, and nothing that is written later changes what a block holds. Powers of two divide and multiply exactly,
# so that e4m3's rounding is all that is lost.

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_compat import tl, triton

LARGEST = 448.0
# 448 is 1.75 * 2^8: what adding carries mantissas beyond 1.75 into the exponent.
_BEYOND = 0x1FFFFF


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


@triton.jit
def scale_exponent(largest):
    """The largest size of numbers, float32, to their scale's exponent, int32 from 1 to 247."""
    return tl.maximum(((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)


@triton.jit
def power_of_two(exponent):
    """An exponent, an integer up to 254, to 2^(exponent - 127) in float32; 0 to 0."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


def quantize_reference(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What `kv_write` stores, in torch: `[..., D]` as float8_e4m3fn, and the scales' exponents, `[...]` uint8."""
    numbers = numbers.float()
    largest = numbers.abs().amax(dim=-1).view(torch.int32)
    exponents = (((largest + _BEYOND) >> 23) - 8).clamp(min=1)
    scaled = numbers * _power_of_two_reference(254 - exponents)[..., None]
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), exponents.to(torch.uint8)


def dequantize_reference(cache: Tensor, scales: Tensor) -> Tensor:
    """A cache `[N, B, KH, D]` with its scales' exponents `[N, KH, B]` as float32."""
    return cache.float() * _power_of_two_reference(scales).transpose(1, 2)[..., None]


def _power_of_two_reference(exponents: Tensor) -> Tensor:
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def as_bits(cache: Tensor) -> Tensor:
    """How kernels are handed a cache: uint8 in place of float8."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache
