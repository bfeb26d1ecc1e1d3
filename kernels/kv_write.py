"""Writing new keys and values into the paged KV cache.

Shapes: T new tokens, KH key-value heads, N blocks of B positions. The cache of one layer is one tensor for keys and one
for values, each `[N, B, KH, D]`; slot `block * B + offset` is one position in it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_kv_torch(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Put token t's key and value at slot `slots[t]`.

    `key` is `[T, KH, D]`, `value` `[T, KH, Dv]` (Dv may differ from D), `slots` `[T]` int64 without duplicates. Key and
    value may be strided views, as slices of a fused projection are.
    """
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slots, key)
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slots, value)


def read_kv_torch(cache: Tensor, slots: Tensor) -> Tensor:
    """The keys or values at slots `[S, M]`, as `[S, M, KH, D]`."""
    # index_select is several times faster than indexing with a matrix on the CPU.
    rows = torch.index_select(cache.view(-1, *cache.shape[2:]), 0, slots.reshape(-1))
    return rows.view(*slots.shape, *cache.shape[2:])
