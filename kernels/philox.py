"""Stateless random numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of (request's seed, position, completion's index), so neither batching nor preemption nor a
resume on another worker changes it. The layout is that of `triton.language.philox(seed, c0, c1, c2, c3)`: the key is
the seed's two halves, low first, and `triton.language.randint(seed, position)` is word 0 of completion 0. A kernel that
draws for itself therefore gets the same bits.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product; `b` holds words as int64.

    `b` is split so that no partial product leaves int64's positive range.
    """
    low_product = a * (b & 0xFFFF)
    high_product = a * (b >> 16) + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox(
    key: tuple[torch.Tensor, torch.Tensor],
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox 4x32 over words held in int64 tensors of one shape, each in `[0, 2**32)`."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seeds: torch.Tensor, positions: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """One draw in `[0, 1)` for each (seed, position, completion index).

    Arguments are int64 `[N]`; a seed's 64 bits are read as unsigned. Returns float64 `[N]`, multiples of 2**-24, which
    float32 holds exactly too.
    """
    key = (seeds & _WORD, (seeds >> 32) & _WORD)
    zero = torch.zeros_like(positions)
    word, _, _, _ = philox(key, (positions & _WORD, zero, indices, zero))
    return (word >> 8).to(torch.float64) * 2.0**-24
