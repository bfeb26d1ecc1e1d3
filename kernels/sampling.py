"""Choosing tokens from logits: greedy, or a draw from a filtered distribution, for every row in one launch.

    x = logits / temperature ─ top-k ─ top-p ─ min-p ─ softmax ─ first token at which the cumulative sum passes u

u is one number in [0, 1) a row: Philox 4x32-10 of (seed, position, completion), see `philox.py`. Ties with the last
token kept are kept. Temperature 0 is greedy: the largest, of equals the first.
"""

#     top-k   keeps what is at least the k-th largest x
#     top-p   keeps, from the largest down, tokens as long as those before hold less than p of what top-k kept
#     min-p   keeps what has at least min_p times the largest probability                        (arXiv 2407.01082)
#
# Nothing is sorted. One pass finds each row's maximum and, as a by-product, the maxima of 2,048 interleaved parts of
# it. The 256th largest of those is exceeded by at least 256 and rarely more than 300 tokens of the whole row. A second
# pass collects these candidates and adds up the probabilities. If the filters keep candidates alone, as nearly always,
# their thresholds are found among them in registers, by deciding the bits of a float's ordered key from the top.
# Otherwise the same search passes over the row itself, 32 times for a threshold: slow, exact, and rare.
#
# The draw inverts the cumulative distribution with one random number, rather than adding noise to each logit (Gumbel):
# it costs one Philox a row instead of one for four tokens, and gives the token that the sampler in plain torch gives.

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.device import Device, device_of
from kernels.launch import Launch
from kernels.sampling_fallback import (
    NONE_ALLOWED,
    NOT_FINITE,
    TOO_LARGE,
    Filters,
    argmax_fallback,
    sample_fallback,
)
from kernels.triton_compat import tl, triton

MAX_CANDIDATES = 1024
"""Candidates of a row that workspaces have room for."""

_FEWEST_CANDIDATES = 256
_MOST_K = 512
_BLOCK = 2048


@triton.jit
def uniform(seed, position, index):
    """A number in [0, 1), the bits of `kernels.philox.uniform`."""
    zero = index.to(tl.uint32) * 0
    word, _, _, _ = tl.philox(seed, position.to(tl.uint32), zero, index.to(tl.uint32), zero)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _key(x):
    """uint32 in the order of the floats."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _threshold(keys, weights, wanted):
    """The largest key such that those of at least it weigh `wanted`; 0 if there is none."""
    found = (wanted * 0).to(tl.uint32)
    bit = found | 0x80000000
    for _ in range(32):
        tried = found | bit
        bit = bit >> 1
        weight = tl.sum(tl.where(keys >= tried, weights, 0.0))
        found = tl.where(weight >= wanted, tried, found)
    return found


@triton.jit
def _threshold_in_row(row, vocab_size, temperature, highest, least, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The same over a whole row, of keys from `least` on; weights are probabilities or, without MASS, ones."""
    lane = tl.arange(0, BLOCK)
    found = (wanted * 0).to(tl.uint32)
    bit = found | 0x80000000
    for _ in range(32):
        tried = found | bit
        bit = bit >> 1
        bound = tl.maximum(tried, least)
        weight = tl.sum(tl.full([BLOCK], 0.0, tl.float32))
        for start in range(0, vocab_size, BLOCK):
            x = tl.load(row + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(tl.float32)
            x = x / temperature
            counts = (start + lane < vocab_size) & (_key(x) >= bound)
            weight += tl.sum(tl.where(counts, tl.exp(x - highest) if MASS else 1.0, 0.0))
        found = tl.where(weight >= wanted, tried, found)
    return found


@triton.jit
def _mass_in_row(row, vocab_size, temperature, highest, least, BLOCK: tl.constexpr):
    """Sum of the unnormalized probabilities of all keys from `least` on."""
    lane = tl.arange(0, BLOCK)
    # Sums over many tiles are kept in double precision: a single one would lose the tail's tokens.
    total = (highest * 0.0).to(tl.float64)
    for start in range(0, vocab_size, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(tl.float32)
        x = x / temperature
        total += tl.sum(tl.where(_key(x) >= least, tl.exp(x - highest), 0.0)).to(tl.float64)
    return total


@triton.jit
def _draw_from_row(row, vocab_size, temperature, highest, least, draw, BLOCK: tl.constexpr):
    """The token at which the sum over the row's keys from `least` on passes `draw` of the whole."""
    lane = tl.arange(0, BLOCK)
    target = draw.to(tl.float64) * _mass_in_row(row, vocab_size, temperature, highest, least, BLOCK)
    passed_before = target * 0.0
    start = vocab_size * 0
    drawn = start - 1
    last = start
    while (drawn < 0) & (start < vocab_size):
        x = tl.load(row + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(tl.float32)
        x = x / temperature
        kept = tl.where(_key(x) >= least, tl.exp(x - highest), 0.0)
        last = tl.maximum(last, tl.max(tl.where(kept > 0.0, start + lane, 0)))
        mass = tl.sum(kept).to(tl.float64)
        if passed_before + mass > target:
            passed = passed_before + tl.cumsum(kept, 0).to(tl.float64)
            first = tl.min(tl.where((passed > target) & (kept > 0.0), start + lane, vocab_size))
            drawn = tl.where(first < vocab_size, first, last)
        passed_before += mass
        start += BLOCK
    # Rounding may leave the last step of the sum below the target.
    return tl.where(drawn >= 0, drawn, last)


@triton.jit
def _draw_filtered(
    row,
    vocab_size,
    temperature,
    highest,
    part_maxima,
    draw,
    top_k,
    top_p,
    min_p,
    ids,
    values,
    FEWEST: tl.constexpr,
    MOST_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The token drawn from what the filters keep, of which at least one filters."""
    lane = tl.arange(0, BLOCK)
    by_k = top_k < vocab_size
    by_p = top_p < 1.0
    by_min = min_p > 0.0
    min_bound = tl.where(by_min, highest + tl.log(tl.where(by_min, min_p, 1.0)), float("-inf"))
    fewest = tl.where(by_k, tl.maximum(tl.minimum(top_k, MOST_K), FEWEST), FEWEST).to(tl.float32)
    bound = _threshold(_key(part_maxima), tl.full([BLOCK], 1.0, tl.float32), fewest)
    bound = tl.maximum(bound, 0x00800000)  # the key of -inf is 0x007FFFFF: such a token is no candidate

    count = vocab_size * 0
    total = highest * 0.0
    for start in range(0, vocab_size, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(tl.float32)
        x = x / temperature
        total += tl.sum(tl.exp(x - highest))
        belongs = _key(x) >= bound
        found = tl.sum(belongs.to(tl.int32))
        if found > 0:
            place = count + tl.cumsum(belongs.to(tl.int32), 0) - 1
            fits = belongs & (place < CAPACITY)
            tl.store(ids + place, start + lane, mask=fits)
            tl.store(values + place, x, mask=fits)
        count += found
    # What some threads stored, others read.
    tl.debug_barrier()

    slot = tl.arange(0, CAPACITY)
    is_candidate = slot < count
    candidate = tl.load(ids + slot, mask=is_candidate, other=0)
    value = tl.load(values + slot, mask=is_candidate, other=float("-inf"))
    probability = tl.where(is_candidate, tl.exp(value - highest), 0.0)
    keys = tl.where(is_candidate, _key(value), 0)
    suffices = (by_k & (top_k <= MOST_K)) | (
        (top_k >= vocab_size)
        & ((by_p & (tl.sum(probability) >= top_p * total)) | (by_min & (_key(min_bound) >= bound)))
    )
    # What the filters keep, as a bound on keys; 0 keeps all.
    least = (count * 0).to(tl.uint32)
    token = count * 0
    if (count <= CAPACITY) & suffices:
        if by_k:
            least = _threshold(keys, tl.full([CAPACITY], 1.0, tl.float32), top_k.to(tl.float32))
            total = tl.sum(tl.where(keys >= least, probability, 0.0))
        if by_p:
            mass = tl.where(keys >= least, probability, 0.0)
            least = tl.maximum(least, _threshold(keys, mass, top_p * total))
        if by_min:
            least = tl.maximum(least, _key(min_bound))
        kept = tl.where(keys >= least, probability, 0.0)
        # Candidates lie in the order of their ids.
        passed = tl.cumsum(kept, 0)
        token = tl.min(tl.where((passed > draw * tl.sum(kept)) & (kept > 0.0), candidate, vocab_size))
        # Rounding may leave the last step of the sum below the target.
        token = tl.where(token < vocab_size, token, tl.max(tl.where(kept > 0.0, candidate, 0)))
    else:
        if by_k:
            wanted = top_k.to(tl.float32)
            least = _threshold_in_row(row, vocab_size, temperature, highest, least, wanted, False, BLOCK)
            total = _mass_in_row(row, vocab_size, temperature, highest, least, BLOCK).to(tl.float32)
        if by_p:
            wanted = top_p * total
            nucleus = _threshold_in_row(row, vocab_size, temperature, highest, least, wanted, True, BLOCK)
            least = tl.maximum(least, nucleus)
        if by_min:
            least = tl.maximum(least, _key(min_bound))
        token = _draw_from_row(row, vocab_size, temperature, highest, least, draw, BLOCK)
    return token


@triton.jit
def _sample_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    indices,
    candidate_ids,
    candidate_values,
    tokens,
    vocab_size,
    logits_stride,
    RANDOM: tl.constexpr,
    FILTERED: tl.constexpr,
    FEWEST: tl.constexpr,
    MOST_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    NONE_ALLOWED: tl.constexpr,
    TOO_LARGE: tl.constexpr,
):
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * logits_stride
    lane = tl.arange(0, BLOCK)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], 0, tl.int32)
    is_nan = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < vocab_size, other=float("-inf")).to(tl.float32)
        is_nan |= (x != x).to(tl.int32)
        # Of equals the first stays.
        best_id = tl.where(x > best, start + lane, best_id)
        best = tl.where(x > best, x, best)
    highest = tl.max(best)
    token = tl.min(tl.where(best == highest, best_id, vocab_size))
    if (tl.max(is_nan) > 0) | (highest == float("inf")):
        token = token * 0 + NOT_FINITE
    elif highest == float("-inf"):
        token = token * 0 + NONE_ALLOWED
    elif RANDOM:
        temperature = tl.load(temperatures + number).to(tl.float32)
        if temperature != 0.0:
            highest = highest / temperature
            if tl.abs(highest) == float("inf"):
                token = token * 0 + TOO_LARGE
            else:
                draw = uniform(tl.load(seeds + number), tl.load(positions + number), tl.load(indices + number))
                filters = token < 0
                if FILTERED:
                    top_k = tl.minimum(tl.load(top_ks + number), vocab_size).to(tl.int32)
                    top_p = tl.load(top_ps + number).to(tl.float32)
                    min_p = tl.load(min_ps + number).to(tl.float32)
                    filters = (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0)
                    if filters:
                        token = _draw_filtered(
                            row,
                            vocab_size,
                            temperature,
                            highest,
                            best / temperature,
                            draw,
                            top_k,
                            top_p,
                            min_p,
                            candidate_ids + number.to(tl.int64) * CAPACITY,
                            candidate_values + number.to(tl.int64) * CAPACITY,
                            FEWEST,
                            MOST_K,
                            BLOCK,
                            CAPACITY,
                        )
                if not filters:
                    least = (token * 0).to(tl.uint32)
                    token = _draw_from_row(row, vocab_size, temperature, highest, least, draw, BLOCK)
    tl.store(tokens + number, token)


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
    rows = len(logits)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    capacity = MAX_CANDIDATES if filters.any else 0
    sample_launch(
        logits,
        tuple(p.contiguous() for p in (temperature, top_k, top_p, min_p, seeds, positions, indices)),
        (
            torch.empty(rows, capacity, dtype=torch.int32, device=logits.device),
            torch.empty(rows, capacity, dtype=torch.float32, device=logits.device),
        ),
        tokens,
        filtered=filters.any,
    ).run()
    return tokens


def argmax(logits: Tensor, *, is_static: bool = False) -> Tensor:
    """The largest logit's token of each row, of equals the first; codes and `is_static` as in `sample`."""
    if not dispatch.use_triton(logits):
        return argmax_fallback(logits, is_static=is_static)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    sample_launch(logits, None, None, tokens, filtered=False).run()
    return tokens


def sample_launch(
    logits: Tensor,
    parameters: tuple[Tensor, ...] | None,
    workspace: tuple[Tensor, Tensor] | None,
    tokens: Tensor,
    *,
    filtered: bool,
    target: Device | None = None,
) -> Launch:
    """What the wrappers above run; without parameters every row is greedy."""
    target = target or device_of(logits.device)
    names = ("temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions", "indices")
    return Launch(
        _sample_kernel,
        (len(logits),),
        {
            "logits": logits,
            **dict(zip(names, parameters or (None,) * len(names), strict=True)),
            "candidate_ids": workspace[0] if workspace else None,
            "candidate_values": workspace[1] if workspace else None,
            "tokens": tokens,
            "vocab_size": logits.shape[1],
            "logits_stride": logits.stride(0),
        },
        {
            "RANDOM": parameters is not None,
            "FILTERED": filtered,
            "FEWEST": _FEWEST_CANDIDATES,
            "MOST_K": _MOST_K,
            "BLOCK": _BLOCK,
            "CAPACITY": MAX_CANDIDATES,
            "NOT_FINITE": NOT_FINITE,
            "NONE_ALLOWED": NONE_ALLOWED,
            "TOO_LARGE": TOO_LARGE,
        },
        num_warps=4 if target.backend == "hip" else 8,
        num_stages=1,
    )
