"""Choosing tokens from logits: greedy, or a draw from a filtered distribution, for every row.

    x = logits / temperature ─ top-k ─ top-p ─ min-p ─ softmax ─ first token at which the cumulative sum passes u

u is one number in [0, 1) a row: Philox 4x32-10 of (seed, position, completion), see `philox.py`. Ties with the last
token kept are kept. Temperature 0 is greedy: the largest, of equals the first.
"""

#     top-k   keeps what is at least the k-th largest x
#     top-p   keeps, from the largest down, tokens as long as those before hold less than p of what top-k kept
#     min-p   keeps what has at least min_p times the largest probability                        (arXiv 2407.01082)
#
# Nothing is sorted. One pass finds each row's maximum and, as a by-product, the maxima of 2,048 interleaved lanes of
# it. The 256th largest of those is exceeded by at least 256 and rarely more than 300 tokens of the whole row. A second
# pass collects these candidates and adds up the probabilities. If the filters keep candidates alone, as nearly always,
# their thresholds are found among them in registers, by deciding the bits of a float's ordered key from the top.
# Otherwise the same search passes over the row itself, 32 times for a threshold: slow, exact, and rare.
#
# The draw inverts the cumulative distribution with one random number, rather than adding noise to each logit (Gumbel):
# it costs one Philox a row instead of one for four tokens, and gives the token that the sampler in plain torch gives.
#
# One program has a row (`sampling_rows.py`), which takes as long for one row as for as many as run at a time. Few rows
# of a large vocabulary are therefore split between programs (`sampling_splits.py`), in two or three launches.

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.device import device_of
from kernels.sampling_fallback import Filters, argmax_fallback, sample_fallback
from kernels.sampling_rows import MAX_CANDIDATES, sample_launch
from kernels.sampling_splits import parts_of_row, split_launches


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    indices: Tensor,
    *,
    filters: Filters,
    is_static: bool = False,
) -> Tensor:
    """A token for each row of `logits` `[rows, vocab_size]`, float, the last dimension contiguous; int64 `[rows]`.

    All else is `[rows]` on the same device: temperature (0: greedy), top_p and min_p floats; top_k, seeds (64 bits),
    positions and indices integers. k = vocab_size, p = 1 and min_p = 0 filter nothing; `filters` says which of them
    any row uses. Where no token can be chosen stands `NOT_FINITE`, `NONE_ALLOWED` or `TOO_LARGE`. Logits may
    be overwritten. `is_static` reads no result on the host, and does more work for it where there is no kernel.
    """
    if not dispatch.use_triton(logits):
        return sample_fallback(
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            positions,
            indices,
            filters=filters,
            is_static=is_static,
        )
    parameters = (temperature, top_k, top_p, min_p, seeds, positions, indices)
    return _choose(logits, tuple(values.contiguous() for values in parameters), filtered=filters.any)


def argmax(logits: Tensor, *, is_static: bool = False) -> Tensor:
    """The largest logit's token of each row, of equals the first; codes and `is_static` as in `sample`."""
    if not dispatch.use_triton(logits):
        return argmax_fallback(logits, is_static=is_static)
    return _choose(logits, None, filtered=False)


def _choose(logits: Tensor, parameters: tuple[Tensor, ...] | None, *, filtered: bool) -> Tensor:
    """By kernels: one program a row, or several where rows are few."""
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    parts = parts_of_row(rows, vocab_size, device_of(logits.device))
    if parts > 1:
        for launch in split_launches(logits, parameters, tokens, filtered=filtered, parts=parts):
            launch.run()
        return tokens
    workspace = (
        torch.empty(rows, MAX_CANDIDATES, dtype=torch.int32, device=logits.device),
        torch.empty(rows, MAX_CANDIDATES, dtype=torch.float32, device=logits.device),
    )
    sample_launch(logits, parameters, workspace if filtered else None, tokens, filtered=filtered).run()
    return tokens
