"""Products with weights of 4 or 8 bits that become numbers in registers: of a weight, only its bits are read.

    out[t, n] = sum_k x[t, k] w[n, k] + bias[n]
    w[n, k]   = (q[n, k] - zero[g, n]) * scale[g, n]        g = k // group_size

q is a whole number of 4 or 8 bits, or an e4m3 number without a zero.
"""

# Lin et al., "AWQ", arXiv 2306.00978, section 4; Frantar et al., "GPTQ", arXiv 2210.17323. w is rounded to the type of
# x, as a weight that was dequantized beforehand would be; the sum is float32, rounded once.
#
# Bytes lie `[out, in]`. Of 4 bits, a byte holds two inputs that are a tile apart, so that the lower halves of a tile of
# bytes are one tile of the weight and the upper halves the next, and nothing is to be interleaved:
#
#     byte t * TILE + r  of a row     input 2t * TILE + r  in bits 0..3,  input (2t + 1) * TILE + r  in bits 4..7
#
# A tile lies within one group. Rows are padded with zero bits to whole tiles, which meet zeros of x.
#
# Weights whose groups are scattered over the inputs (GPTQ with `desc_act`) are stored sorted by group: `order[k]` is
# the input that column k belongs to, and x is read in that order.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.device import Device, device_of
from kernels.float8 import from_e4m3
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.triton_compat import tl, triton

KINDS = ("int4", "int8", "e4m3")

_TILES = (64, 32, 16)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight `[out, in]` in the form that the kernel reads; `quantized_weight` makes it."""

    bits: Tensor
    """uint8 `[out, width]`, rows padded to whole tiles."""

    scales: Tensor
    """`[groups, out]`, of any floating-point type."""

    zeros: Tensor | None
    """int16 `[groups, out]`."""

    order: Tensor | None
    """int32 `[in]`; None where columns are in the order of the inputs."""

    kind: str
    """One of `KINDS`."""

    group_size: int
    tile: int
    in_features: int

    @property
    def out_features(self) -> int:
        return len(self.bits)

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.nbytes for part in (self.bits, self.scales, self.zeros, self.order) if part is not None)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """`[out, in]`, rounded once from float32."""
        bits, size = self.bits, self.in_features
        if self.kind == "int4":
            tiles = bits.view(len(bits), -1, self.tile)
            bits = torch.stack((tiles & 0xF, tiles >> 4), dim=2).flatten(1)
        bits = bits[:, :size]
        numbers = (bits.contiguous().view(torch.float8_e4m3fn) if self.kind == "e4m3" else bits).float()
        group = torch.arange(size, device=bits.device) // self.group_size
        if self.zeros is not None:
            numbers -= self.zeros.float()[group].t()
        numbers *= self.scales.float()[group].t()
        if self.order is not None:
            numbers = torch.empty_like(numbers).index_copy_(1, self.order.long(), numbers)
        return numbers.to(dtype)


def quantized_weight(
    numbers: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    *,
    kind: str,
    group_size: int,
) -> QuantizedWeight:
    """From `numbers` `[out, in]`, one of uint8 each (the bits of e4m3), the other parts as in `QuantizedWeight`.

    Raises ValueError for groups that are no multiple of 16 inputs, unless one holds all of them.
    """
    size = numbers.shape[1]
    group_size = min(group_size, size)
    tile = _TILES[0] if group_size == size else next((tile for tile in _TILES if group_size % tile == 0), None)
    if tile is None:
        raise ValueError(f"groups of {group_size} inputs: only multiples of {_TILES[-1]} are computed with")
    whole = 2 * tile if kind == "int4" else tile
    bits = F.pad(numbers, (0, -size % whole))
    if kind == "int4":
        low, high = bits.view(len(bits), -1, 2, tile).unbind(2)
        bits = (low | high << 4).flatten(1)
    return QuantizedWeight(bits, scales.contiguous(), zeros, order, kind, group_size, tile, size)


def joined(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight with the outputs of all, in turn, for `quantized_matmul`; None where it should be dequantized.

    That is where inputs are grouped or ordered differently, and where no kernel multiplies packed numbers: there,
    dequantizing in every product is slower than reading what dequantizing once makes.
    """
    first = weights[0]
    if not dispatch.use_triton(first.bits):
        return None
    if len(weights) == 1:
        return first
    for other in weights[1:]:
        if (other.kind, other.group_size, other.in_features) != (first.kind, first.group_size, first.in_features):
            return None
        if (other.zeros is None) != (first.zeros is None) or (other.order is None) != (first.order is None):
            return None
        if first.order is not None and not torch.equal(first.order, other.order):
            return None
    return QuantizedWeight(
        torch.cat([weight.bits for weight in weights]),
        torch.cat([weight.scales for weight in weights], dim=1),
        None if first.zeros is None else torch.cat([weight.zeros for weight in weights], dim=1),
        first.order,
        first.kind,
        first.group_size,
        first.tile,
        first.in_features,
    )


@triton.jit
def _add_tile(
    acc,
    numbers,
    tile,
    x,
    order,
    scales,
    zeros,
    row,
    column,
    is_row,
    is_column,
    in_features,
    out_features,
    stride,
    group_size,
    num_groups,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
):
    """`acc` and the product with one tile of the weight, `numbers` `[TILE, BLOCK_N]` before scales and zeros."""
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < in_features
    if HAS_ORDER:
        place = tl.load(order + place, mask=inside, other=0)
    a = tl.load(x + row[:, None] * stride + place[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
    # A tile of nothing but padding may begin a group too late.
    group = tl.minimum(tile * TILE // group_size, num_groups - 1).to(tl.int64)
    w = numbers.to(tl.float32)
    if HAS_ZEROS:
        w -= tl.load(zeros + group * out_features + column, mask=is_column, other=0).to(tl.float32)[None, :]
    w *= tl.load(scales + group * out_features + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    w = w.to(a.dtype)
    if UPCAST:  # the interpreter has no products of bfloat16
        a, w = a.to(tl.float32), w.to(tl.float32)
    return tl.dot(a, w, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_matmul_kernel(
    x,
    bits,
    scales,
    zeros,
    order,
    bias,
    out,
    num_rows,
    in_features,
    out_features,
    stride,
    width,
    group_size,
    num_groups,
    KIND: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_row = row < num_rows
    is_column = column < out_features
    byte = bits + column[None, :] * width + tl.arange(0, TILE)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, width // TILE):
        packed = tl.load(byte + step * TILE, mask=is_column[None, :], other=0)
        if KIND == "int4":
            numbers, tile = packed & 0xF, 2 * step
        elif KIND == "int8":
            numbers, tile = packed, step
        else:
            numbers, tile = from_e4m3(packed, NATIVE_FLOAT8), step
        acc = _add_tile(
            acc,
            numbers,
            tile,
            x,
            order,
            scales,
            zeros,
            row,
            column,
            is_row,
            is_column,
            in_features,
            out_features,
            stride,
            group_size,
            num_groups,
            HAS_ZEROS,
            HAS_ORDER,
            UPCAST,
            TILE,
        )
        if KIND == "int4":
            acc = _add_tile(
                acc,
                packed >> 4,
                2 * step + 1,
                x,
                order,
                scales,
                zeros,
                row,
                column,
                is_row,
                is_column,
                in_features,
                out_features,
                stride,
                group_size,
                num_groups,
                HAS_ZEROS,
                HAS_ORDER,
                UPCAST,
                TILE,
            )
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * out_features + column[None, :]
    tl.store(out + place, acc, mask=is_row[:, None] & is_column[None, :])


def quantized_matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """`[T, in]` (contiguous in its last dimension) to `[T, out]`, in the type of x: float32, bfloat16 or float16."""
    if not dispatch.use_triton(x):
        return quantized_matmul_reference(x, weight, bias)
    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    quantized_matmul_launch(x, weight, bias, out).run()
    return out


def quantized_matmul_launch(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor, *, target: Device | None = None
) -> Launch:
    target = target or device_of(x.device)
    block_m, block_n, num_warps = _blocks(len(x), x.dtype)
    return Launch(
        _quantized_matmul_kernel,
        (ceil_div(len(x), block_m), ceil_div(weight.out_features, block_n)),
        {
            "x": x,
            "bits": weight.bits,
            "scales": weight.scales,
            "zeros": weight.zeros,
            "order": weight.order,
            "bias": bias,
            "out": out,
            "num_rows": len(x),
            "in_features": weight.in_features,
            "out_features": weight.out_features,
            "stride": x.stride(0),
            "width": weight.bits.shape[1],
            "group_size": weight.group_size,
            "num_groups": len(weight.scales),
        },
        {
            "KIND": weight.kind,
            "NATIVE_FLOAT8": target.converts_float8,
            "HAS_ZEROS": weight.zeros is not None,
            "HAS_ORDER": weight.order is not None,
            "HAS_BIAS": bias is not None,
            "UPCAST": target.is_interpreter,
            "TILE": weight.tile,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        num_warps=num_warps,
        num_stages=2 if target.backend == "hip" else 3,
    )


def _blocks(rows: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and outputs of a program, and its warps: first guesses. Few rows: small blocks, so that all SMs have one."""
    if rows <= 16:
        return 16, 32, 4
    if dtype is torch.float32:
        return 32, 32, 8  # there are no tensor cores for it, and larger blocks do not fit into registers
    if rows <= 64:
        return 32 if rows <= 32 else 64, 64, 4
    return 128, 128, 8


def quantized_matmul_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """As `quantized_matmul`, in float32 after dequantizing the weight."""
    product = x.float() @ weight.dequantized(x.dtype).float().t()
    return (product if bias is None else product + bias.float()).to(x.dtype)
