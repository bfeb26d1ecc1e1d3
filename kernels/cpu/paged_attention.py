"""Attention over the paged KV cache in C++ (`source/paged_attention.cpp`); see `paged_attention_reference`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.cpu.linear import TYPES
from kernels.paged_layout import AttentionMetadata, LayerCache, Scoring


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
    cache: LayerCache,
    step: AttentionMetadata,
    scoring: Scoring,
) -> Tensor:
    """Write key `[T, KH, D]` and value `[T, KH, Dv]` to the step's slots, then attend with query `[T, H, D]`.

    The cache has the query's type. Returns `[T, H, Dv]`.
    """
    num_tokens, heads, head_dim = query.shape
    _, block_size, kv_heads, value_dim = cache.values.shape
    if any(tensor.dtype is not query.dtype for tensor in (key, value, cache.keys, cache.values)):
        raise ValueError("query, keys, values and caches must have one type")
    query, key, value = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value))
    starts, query_lens, block_tables = (
        np.ascontiguousarray(array, dtype=np.int64) for array in (step.starts, step.query_lens, step.block_tables)
    )
    sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
    out = torch.empty(num_tokens, heads, value_dim, dtype=query.dtype)
    library.functions.pagemill_paged_attention(
        ctypes.byref(
            _Arguments(
                query.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
                out.data_ptr(),
                cache.keys.data_ptr(),
                cache.values.data_ptr(),
                starts.ctypes.data,
                query_lens.ctypes.data,
                block_tables.ctypes.data,
                step.slots.data_ptr(),
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
                scoring.window or 0,
                scoring.scale,
                scoring.soft_cap or 0.0,
                TYPES[query.dtype],
                torch.get_num_threads(),
            )
        )
    )
    return out
