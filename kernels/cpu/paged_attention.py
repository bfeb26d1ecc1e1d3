"""Attention over the paged KV cache in C++ (`source/paged_attention.cpp`); see `paged_attention_reference`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.cpu.linear import TYPES


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "key_cache", "value_cache")],
        *[(name, ctypes.c_void_p) for name in ("starts", "query_lens", "block_tables", "slots", "sinks")],
        *[(name, ctypes.c_int64) for name in ("tokens", "sequences", "table_width", "heads", "kv_heads")],
        *[(name, ctypes.c_int64) for name in ("head_dim", "value_dim", "block_size")],
        *[(name, ctypes.c_int64 * 2) for name in ("query_stride", "key_stride", "value_stride")],
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


def paged_attention(
    library: Library,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    starts: np.ndarray,
    query_lens: np.ndarray,
    block_tables: np.ndarray,
    slots: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write key `[T, KH, D]` and value `[T, KH, Dv]` to `slots` `[T]`, then attend with query `[T, H, D]`.

    The caches are `[N, B, KH, D]` and `[N, B, KH, Dv]`, contiguous and of the query's type. `starts`, `query_lens`
    `[S]` and `block_tables` `[S, blocks]` are int64 as in `plan_tiles`. Returns `[T, H, Dv]`.
    """
    num_tokens, heads, head_dim = query.shape
    _, block_size, kv_heads, value_dim = value_cache.shape
    if any(tensor.dtype is not query.dtype for tensor in (key, value, key_cache, value_cache)):
        raise ValueError("query, keys, values and caches must have one type")
    query, key, value = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value))
    starts, query_lens, block_tables = (
        np.ascontiguousarray(array, dtype=np.int64) for array in (starts, query_lens, block_tables)
    )
    sinks = None if sinks is None else sinks.float().contiguous()
    out = torch.empty(num_tokens, heads, value_dim, dtype=query.dtype)
    library.functions.pagemill_paged_attention(
        ctypes.byref(
            _Arguments(
                query.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
                out.data_ptr(),
                key_cache.data_ptr(),
                value_cache.data_ptr(),
                starts.ctypes.data,
                query_lens.ctypes.data,
                block_tables.ctypes.data,
                slots.data_ptr(),
                None if sinks is None else sinks.data_ptr(),
                num_tokens,
                len(starts),
                block_tables.shape[1],
                heads,
                kv_heads,
                head_dim,
                value_dim,
                block_size,
                (ctypes.c_int64 * 2)(*query.stride()[:2]),
                (ctypes.c_int64 * 2)(*key.stride()[:2]),
                (ctypes.c_int64 * 2)(*value.stride()[:2]),
                sliding_window or 0,
                scale,
                soft_cap or 0.0,
                TYPES[query.dtype],
                torch.get_num_threads(),
            )
        )
    )
    return out
