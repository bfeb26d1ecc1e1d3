"""Whether a model's logits really do not depend on what else is in a step: tried at load, promised afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.batch import Batch, BatchEntry
from engine.errors import UnsupportedModel
from kernels.integers import ceil_div

# Longer than a pass and than a tile of attention, if only just.
_LENGTHS = (37, 23)


def check_invariance(
    run: Callable[[Batch, int], Tensor], *, vocab_size: int, max_positions: int, block_size: int
) -> None:
    """Run a sequence by itself, then in pieces beside another; raises `UnsupportedModel` where a bit differs.

    `run(batch, num_blocks)` runs batches on a cache of at least so many blocks, the same one at each call.
    """
    generator = torch.Generator().manual_seed(0)
    tried, other = (
        torch.randint(vocab_size, (min(length, max_positions),), generator=generator).tolist() for length in _LENGTHS
    )
    blocks = ceil_div(len(tried), block_size)
    alone, beside, others = (range(blocks * place, blocks * (place + 1)) for place in range(3))
    expected = run(Batch([BatchEntry(tried, 0, alone, len(tried))]), 3 * blocks)
    cuts, other_cuts = _cuts(len(tried)), _cuts(len(other))
    for step in range(3):
        start, end = cuts[step : step + 2]
        other_start, other_end = other_cuts[step : step + 2]
        entries = [
            BatchEntry(other[other_start:other_end], other_start, others, 1),
            BatchEntry(tried[start:end], start, beside, end - start),
        ]
        present = [entry for entry in entries if entry.token_ids]
        found = run(Batch(present), 3 * blocks)[-(end - start) :] if end > start else expected[:0]
        # As integers: a NaN equals itself here.
        if not torch.equal(found.view(torch.int32), expected[start:end].view(torch.int32)):
            raise UnsupportedModel(
                "deterministic=True cannot be kept: the model's logits depend on what else is in the batch"
            )


def _cuts(length: int) -> list[int]:
    """A chunk, the rest but one, the last token."""
    return [0, length * 4 // 7, length - 1, length]
