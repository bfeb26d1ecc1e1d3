"""Penalties for tokens that a sequence holds already, applied to single logits in place.

    x' = x / r  if x > 0 else  x * r                        repetition penalty r (Keskar et al., arXiv 1909.05858)
    x" = x' - f * count - p * [count > 0]                   frequency and presence penalty, of the output alone

The tokens concerned are a list of E entries (row, token, count), rows in any order and each pair at most once: a step's
cost depends on what sequences hold, not on the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.triton_compat import tl, triton

_BLOCK = 256


@triton.jit(do_not_specialize=["num_entries"])
def _penalties_kernel(
    logits,
    rows,
    tokens,
    counts,
    repetition,
    frequency,
    presence,
    num_entries,
    stride,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    row = tl.load(rows + entry, mask=inside, other=0)
    token = tl.load(tokens + entry, mask=inside, other=0).to(tl.int64)
    count = tl.load(counts + entry, mask=inside, other=0).to(tl.float32)
    r = tl.load(repetition + row, mask=inside, other=1.0).to(tl.float32)
    f = tl.load(frequency + row, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(presence + row, mask=inside, other=0.0).to(tl.float32)
    place = logits + row.to(tl.int64) * stride + token
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x > 0, x / r, x * r) - (f * count + tl.where(count > 0, p, 0.0))
    tl.store(place, x, mask=inside)


def penalize(
    logits: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Change logits `[R, vocab_size]`, float, in place.

    `rows`, `tokens`, `counts` are `[E]`; the penalties are `[R]`, float32.
    """
    if dispatch.use_triton(logits):
        penalties_launch(logits, rows, tokens, counts, repetition, frequency, presence).run()
    else:
        penalize_reference(logits, rows, tokens, counts, repetition, frequency, presence)


def penalties_launch(
    logits: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Launch:
    return Launch(
        _penalties_kernel,
        (ceil_div(len(rows), _BLOCK),),
        {
            "logits": logits,
            "rows": rows,
            "tokens": tokens,
            "counts": counts,
            "repetition": repetition,
            "frequency": frequency,
            "presence": presence,
            "num_entries": len(rows),
            "stride": logits.stride(0),
        },
        {"BLOCK": _BLOCK},
    )


def penalize_reference(
    logits: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """As `penalize`, in plain torch: what runs where there is no kernel, and what the kernel is tested against."""
    x = logits[rows, tokens].float()
    x = torch.where(x > 0, x / repetition[rows], x * repetition[rows])
    x -= frequency[rows] * counts + presence[rows] * (counts > 0)
    logits[rows, tokens] = x.to(logits.dtype)
