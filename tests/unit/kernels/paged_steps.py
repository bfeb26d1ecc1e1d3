"""Steps over a paged cache that is poisoned wherever no kernel may look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.float8 import quantize_reference
from kernels.paged_layout import LayerCache, StepSequences

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class PagedStep:
    """Sequences of `seq_lens` tokens, of which the last ones are new; everything on the device."""

    query: Tensor
    cache: LayerCache
    sequences: StepSequences

    def poisoned_out(self) -> Tensor:
        return torch.full_like(self.query[..., :1], float("nan")).repeat(1, 1, self.cache.values.shape[-1])


def make_step(
    lengths: Sequence[int],
    new_tokens: Sequence[int],
    *,
    device: torch.device,
    heads: int = 6,
    kv_heads: int = 3,
    head_dim: int = 80,
    value_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    float8: bool = False,
    seed: int = 0,
) -> PagedStep:
    """NaN in all slots that hold no token; block tables end in numbers that name no block."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(widths) + 2, generator=generator).tolist()
    # Far outside of the cache: a kernel that follows it reads foreign memory.
    tables = torch.full((len(lengths), max(widths, default=0) + 2), 2**24, dtype=torch.int32)
    caches = [
        torch.full((len(order), block_size, kv_heads, dim), float("nan"), dtype=dtype)
        for dim in (head_dim, value_dim or head_dim)
    ]
    for sequence, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        blocks = [order.pop() for _ in range(width)]
        tables[sequence, :width] = torch.tensor(blocks, dtype=torch.int32)
        for cache in caches:
            for position in range(length):
                numbers = torch.randn(kv_heads, cache.shape[-1], generator=generator)
                if float8:  # heads and positions of very different size
                    numbers *= 4.0 ** torch.randint(-3, 3, (kv_heads, 1), generator=generator)
                cache[blocks[position // block_size], position % block_size] = numbers.to(dtype)
    scales = []
    if float8:
        for place in range(2):
            is_poison = caches[place].isnan().all(dim=-1)
            caches[place], exponents = quantize_reference(caches[place])
            # An infinite scale.
            scales.append(exponents.masked_fill(is_poison, 255).transpose(1, 2).contiguous())
    query = torch.randn(sum(new_tokens), heads, head_dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32)
    return PagedStep(
        query.to(device),
        LayerCache(*(tensor.to(device) for tensor in (*caches, *scales))),
        StepSequences(tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), starts.to(device)),
    )
