"""Writing new keys and values into the paged KV cache, normalized and rotated on the way where the model says so.

    key_cache[slot_t] = quantize( rotate(norm(key_t)) )        value_cache[slot_t] = quantize( value_t )

T new tokens, KH key-value heads, N blocks of B positions; slot `block * B + offset` is one position (`LayerCache`).
"""

# Quantization (caches of float8_e4m3fn): each head of a token is divided by the power of two that makes it fit, and
# rounded to the nearest, ties to even; the exponents go to `[N, KH, B]` (`float8.py`). Rotation: see `rotary.py`. A
# negative slot is padding: nothing is written for it.

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor

from kernels.device import Device, device_of
from kernels.float8 import as_bits, power_of_two, quantize_reference, scale_exponent, to_e4m3
from kernels.launch import Launch
from kernels.paged_layout import LayerCache
from kernels.rms_norm import HeadNorms
from kernels.rotary import rotate_tile
from kernels.triton_compat import tl, triton


@triton.jit
def _write_kernel(
    query,
    key,
    value,
    cos,
    sin,
    key_cache,
    value_cache,
    slots,
    key_scales,
    value_scales,
    query_norm,
    key_norm,
    rotated,
    eps,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    angle_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FLOAT8: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    dim = tl.arange(0, DIMS)
    if ROTARY_DIM:
        head = tl.arange(0, HEADS)
        q = rotate_tile(
            query + token * query_stride,
            head,
            head < NUM_HEADS,
            query_head_stride,
            dim,
            cos + token * angle_stride,
            sin + token * angle_stride,
            query_norm,
            eps,
            HEAD_DIM,
            ROTARY_DIM,
            INTERLEAVED,
            HAS_NORMS,
            OFFSET,
        )
        tl.store(
            rotated + (token * NUM_HEADS + head[:, None]) * HEAD_DIM + dim[None, :],
            q,
            mask=(head < NUM_HEADS)[:, None] & (dim < HEAD_DIM)[None, :],
        )
    if slot < 0:
        return

    head = tl.arange(0, KV_HEADS)
    is_head = head < NUM_KV_HEADS
    is_key = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    if ROTARY_DIM:
        k = rotate_tile(
            key + token * key_stride,
            head,
            is_head,
            key_head_stride,
            dim,
            cos + token * angle_stride,
            sin + token * angle_stride,
            key_norm,
            eps,
            HEAD_DIM,
            ROTARY_DIM,
            INTERLEAVED,
            HAS_NORMS,
            OFFSET,
        )
    else:
        k = tl.load(key + token * key_stride + head[:, None] * key_head_stride + dim[None, :], mask=is_key)
    value_dim = tl.arange(0, VALUE_DIMS)
    is_value = is_head[:, None] & (value_dim < VALUE_DIM)[None, :]
    v = tl.load(value + token * value_stride + head[:, None] * value_head_stride + value_dim[None, :], mask=is_value)
    if FLOAT8:
        # Rounded to the model's type first, so that a fused write stores what a separate one does.
        k = k.to(key.dtype.element_ty).to(tl.float32)
        v = v.to(tl.float32)
        key_exponent = scale_exponent(tl.max(tl.where(is_key, tl.abs(k), 0.0), 1))
        value_exponent = scale_exponent(tl.max(tl.where(is_value, tl.abs(v), 0.0), 1))
        place = (slot // BLOCK_SIZE * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
        tl.store(key_scales + place, key_exponent.to(tl.uint8), mask=is_head)
        tl.store(value_scales + place, value_exponent.to(tl.uint8), mask=is_head)
        k = to_e4m3(k * power_of_two(254 - key_exponent)[:, None])
        v = to_e4m3(v * power_of_two(254 - value_exponent)[:, None])
    place = slot * NUM_KV_HEADS + head
    tl.store(key_cache + place[:, None] * HEAD_DIM + dim[None, :], k, mask=is_key)
    tl.store(value_cache + place[:, None] * VALUE_DIM + value_dim[None, :], v, mask=is_value)


def write_kv(key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Put token t's key and value at slot `slots[t]`; arguments as for `write_kv_reference`."""
    write_launch(key, value, cache, slots).run()


def rotate_and_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slots: Tensor,
    *,
    interleaved: bool = False,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Rotate query `[T, H, D]` and key, write key and value; returns the rotated query, contiguous.

    `cos` and `sin` are `[T, 1, R / 2]` or `[T, R / 2]`. With `norms` the heads are normalized first. One launch instead
    of two norms', a rotation's and a write's, and what becomes of the key never passes through memory.
    """
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    write_launch(
        key, value, cache, slots, query=query, rotated=rotated, cos=cos, sin=sin, interleaved=interleaved, norms=norms
    ).run()
    return rotated


def write_launch(
    key: Tensor,
    value: Tensor,
    cache: LayerCache,
    slots: Tensor,
    *,
    query: Tensor | None = None,
    rotated: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    norms: HeadNorms | None = None,
    target: Device | None = None,
) -> Launch:
    """What the wrappers above run; without `query` nothing is rotated or normalized."""
    target = target or device_of(key.device)
    num_tokens, num_kv_heads, head_dim = key.shape
    value_dim = value.shape[2]
    num_heads = 1 if query is None else query.shape[1]
    rotary_dim = 0 if cos is None else 2 * cos.shape[-1]
    constants, num_warps = _constants(
        num_heads,
        num_kv_heads,
        head_dim,
        value_dim,
        rotary_dim,
        interleaved,
        None if norms is None else float(norms.offset),
        cache.block_size,
        cache.is_float8,
        target.warp_size,
    )
    return Launch(
        _write_kernel,
        (num_tokens,),
        {
            "query": query,
            "key": key,
            "value": value,
            "cos": cos,
            "sin": sin,
            "key_cache": as_bits(cache.keys),
            "value_cache": as_bits(cache.values),
            "slots": slots,
            "key_scales": cache.key_scales,
            "value_scales": cache.value_scales,
            "query_norm": None if norms is None else norms.query,
            "key_norm": None if norms is None else norms.key,
            "rotated": rotated,
            "eps": 0.0 if norms is None else float(norms.eps),
            "query_stride": 0 if query is None else query.stride(0),
            "query_head_stride": 0 if query is None else query.stride(1),
            "key_stride": key.stride(0),
            "key_head_stride": key.stride(1),
            "value_stride": value.stride(0),
            "value_head_stride": value.stride(1),
            "angle_stride": 0 if cos is None else cos.stride(0),
        },
        constants,
        num_warps=num_warps,
    )


@cached
def _constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    rotary_dim: int,
    interleaved: bool,
    norm_offset: float | None,
    block_size: int,
    is_float8: bool,
    warp_size: int,
) -> tuple[Mapping[str, Any], int]:
    """Constants and warps, made once for each kind of layer: a step builds its launches hundreds of times."""
    numbers = triton.next_power_of_2(max(num_heads, num_kv_heads)) * triton.next_power_of_2(max(head_dim, value_dim))
    constants = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "HAS_NORMS": norm_offset is not None,
        "OFFSET": norm_offset or 0.0,
        "BLOCK_SIZE": block_size,
        "FLOAT8": is_float8,
        "HEADS": triton.next_power_of_2(num_heads),
        "KV_HEADS": triton.next_power_of_2(num_kv_heads),
        "DIMS": triton.next_power_of_2(head_dim),
        "VALUE_DIMS": triton.next_power_of_2(value_dim),
    }
    # About 16 numbers a thread.
    return constants, min(8, max(1, numbers // (16 * warp_size)))


def write_kv_reference(key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Put token t's key and value at slot `slots[t]`.

    `key` is `[T, KH, D]`, `value` `[T, KH, Dv]` (Dv may differ from D), `slots` `[T]` int64 without duplicates and none
    negative. Key and value may be strided views, as slices of a fused projection are.
    """
    key_cache, value_cache = cache.keys, cache.values
    if cache.key_scales is not None and cache.value_scales is not None:
        blocks, offsets = slots // cache.block_size, slots % cache.block_size
        (key, key_exponents), (value, value_exponents) = quantize_reference(key), quantize_reference(value)
        cache.key_scales[blocks, :, offsets], cache.value_scales[blocks, :, offsets] = key_exponents, value_exponents
        # Torch scatters no float8, but their bits.
        key, value = key.view(torch.uint8), value.view(torch.uint8)
        key_cache, value_cache = as_bits(key_cache), as_bits(value_cache)
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slots, key)
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slots, value)


def read_kv(cache: Tensor, slots: Tensor) -> Tensor:
    """The keys or values at slots `[S, M]`, as `[S, M, KH, D]`."""
    # index_select is several times faster than indexing with a matrix on the CPU.
    rows = torch.index_select(cache.view(-1, *cache.shape[2:]), 0, slots.reshape(-1))
    return rows.view(*slots.shape, *cache.shape[2:])
