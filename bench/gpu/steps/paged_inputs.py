"""Sequences in a paged cache, their blocks strewn about, for timing attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.integers import ceil_div
from kernels.paged_layout import LayerCache, StepSequences


@dataclass(frozen=True, slots=True)
class Heads:
    """A shape of attention; keys and values of a head have `dim` numbers."""

    name: str
    num_heads: int
    num_kv_heads: int
    dim: int


QWEN3 = Heads("Qwen3-0.6B", 16, 8, 128)
GPT2_LARGE = Heads("gpt2-large", 20, 20, 64)
TINY = Heads("tiny", 4, 2, 16)


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """What the attention kernels read; `new` rows of the query for each sequence."""

    query: Tensor
    cache: LayerCache
    sequences: StepSequences

    @classmethod
    def random(
        cls,
        heads: Heads,
        lengths: Sequence[int],
        block_size: int,
        *,
        new: int = 1,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PagedInputs:
        """`new` 1 for decodes; equal lengths, all of them new, for prompts."""
        widths = [ceil_div(length, block_size) for length in lengths]
        order = torch.randperm(sum(widths), dtype=torch.int32)
        # As wide as a multiple of 16, as the engine's tables are.
        tables = torch.zeros(len(lengths), ceil_div(max(widths), 16) * 16, dtype=torch.int32)
        for row, blocks in zip(tables, torch.split(order, widths), strict=True):
            row[: len(blocks)] = blocks
        shape = (sum(widths), block_size, heads.num_kv_heads, heads.dim)
        return cls(
            torch.randn(len(lengths) * new, heads.num_heads, heads.dim, dtype=dtype, device=device),
            LayerCache(*(torch.randn(shape, dtype=dtype, device=device) for _ in range(2))),
            StepSequences(
                tables.to(device),
                torch.tensor(lengths, dtype=torch.int32, device=device),
                torch.arange(0, (len(lengths) + 1) * new, new, dtype=torch.int32, device=device),
            ),
        )
