"""Choosing a token by one program a row, and the parts of it that programs which share a row use too."""

from __future__ import annotations

from torch import Tensor

from kernels.device import Device, device_of
from kernels.launch import Launch
from kernels.sampling_fallback import NONE_ALLOWED, NOT_FINITE, TOO_LARGE
from kernels.triton_compat import tl, triton

MAX_CANDIDATES = 1024
"""Candidates of a row that workspaces have room for."""

FEWEST_CANDIDATES = 256
MOST_K = 512
BLOCK = 2048
"""Logits that a program looks at at a time: a tile."""

PARAMETERS = ("temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions", "indices")


@triton.jit
def uniform(seed, position, index):
    """A number in [0, 1), the bits of `kernels.philox.uniform`."""
    zero = index.to(tl.uint32) * 0
    word, _, _, _ = tl.philox(seed, position.to(tl.uint32), zero, index.to(tl.uint32), zero)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def key_of(x):
    """uint32 in the order of the floats."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def scaled_tile(row, start, end, temperature, BLOCK: tl.constexpr):
    """A tile of the row's logits divided by the temperature; -inf from `end` on."""
    place = start + tl.arange(0, BLOCK)
    return tl.load(row + place, mask=place < end, other=float("-inf")).to(tl.float32) / temperature


@triton.jit
def lane_maxima(row, first, end, BLOCK: tl.constexpr):
    """Of each lane of the tiles of `row[first:end]`: the largest logit, where it stands first, whether any is NaN."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], 0, tl.int32)
    is_nan = tl.full([BLOCK], 0, tl.int32)
    for start in range(first, end, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < end, other=float("-inf")).to(tl.float32)
        is_nan |= (x != x).to(tl.int32)
        # Of equals the first stays.
        best_id = tl.where(x > best, start + lane, best_id)
        best = tl.where(x > best, x, best)
    return best, best_id, is_nan


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
            x = scaled_tile(row, start, vocab_size, temperature, BLOCK)
            counts = (start + lane < vocab_size) & (key_of(x) >= bound)
            weight += tl.sum(tl.where(counts, tl.exp(x - highest) if MASS else 1.0, 0.0))
        found = tl.where(weight >= wanted, tried, found)
    return found


@triton.jit
def _mass_in_row(row, vocab_size, temperature, highest, least, BLOCK: tl.constexpr):
    """Sum of the unnormalized probabilities of all keys from `least` on."""
    # Sums over many tiles are kept in double precision: a single one would lose the tail's tokens.
    total = (highest * 0.0).to(tl.float64)
    for start in range(0, vocab_size, BLOCK):
        x = scaled_tile(row, start, vocab_size, temperature, BLOCK)
        total += tl.sum(tl.where(key_of(x) >= least, tl.exp(x - highest), 0.0)).to(tl.float64)
    return total


@triton.jit
def draw_in_tile(kept, start, passed_before, target, vocab_size, BLOCK: tl.constexpr):
    """The token of a tile at which the sum passes the target, after `passed_before` in the tiles before it; the last
    that weighs anything, where rounding leaves the sum below the target."""
    token = start + tl.arange(0, BLOCK)
    passed = passed_before + tl.cumsum(kept, 0).to(tl.float64)
    first = tl.min(tl.where((passed > target) & (kept > 0.0), token, vocab_size))
    return tl.where(first < vocab_size, first, tl.max(tl.where(kept > 0.0, token, 0)))


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
        x = scaled_tile(row, start, vocab_size, temperature, BLOCK)
        kept = tl.where(key_of(x) >= least, tl.exp(x - highest), 0.0)
        last = tl.maximum(last, tl.max(tl.where(kept > 0.0, start + lane, 0)))
        mass = tl.sum(kept).to(tl.float64)
        if passed_before + mass > target:
            drawn = draw_in_tile(kept, start, passed_before, target, vocab_size, BLOCK)
        passed_before += mass
        start += BLOCK
    # Rounding may leave the last step of the sum below the target.
    return tl.where(drawn >= 0, drawn, last)


@triton.jit
def candidate_bound(maxima, vocab_size, top_k, FEWEST: tl.constexpr, MOST_K: tl.constexpr, BLOCK: tl.constexpr):
    """The key from which on logits are candidates, by the lanes' maxima, divided by the temperature."""
    fewest = tl.where(top_k < vocab_size, tl.maximum(tl.minimum(top_k, MOST_K), FEWEST), FEWEST).to(tl.float32)
    bound = _threshold(key_of(maxima), tl.full([BLOCK], 1.0, tl.float32), fewest)
    return tl.maximum(bound, 0x00800000)  # the key of -inf is 0x007FFFFF: such a token is no candidate


@triton.jit
def collect_candidates(x, start, bound, count, ids, values, BLOCK: tl.constexpr, CAPACITY: tl.constexpr):
    """Append a tile's candidates to the `count` before them; returns how many there are, those without room too."""
    belongs = key_of(x) >= bound
    found = tl.sum(belongs.to(tl.int32))
    if found > 0:
        place = count + tl.cumsum(belongs.to(tl.int32), 0) - 1
        fits = belongs & (place < CAPACITY)
        tl.store(ids + place, start + tl.arange(0, BLOCK), mask=fits)
        tl.store(values + place, x, mask=fits)
    return count + found


@triton.jit
def draw_from_candidates(
    row,
    vocab_size,
    temperature,
    highest,
    bound,
    total,
    count,
    candidate,
    value,
    draw,
    top_k,
    top_p,
    min_p,
    MOST_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The token drawn from what the filters keep, of which at least one filters.

    `total` is the mass of the row; `candidate` and `value` `[CAPACITY]` are the first of its `count` candidates, all
    whose keys reach `bound`, in the order of their ids.
    """
    by_k = top_k < vocab_size
    by_p = top_p < 1.0
    by_min = min_p > 0.0
    min_bound = tl.where(by_min, highest + tl.log(tl.where(by_min, min_p, 1.0)), float("-inf"))
    is_candidate = tl.arange(0, CAPACITY) < count
    probability = tl.where(is_candidate, tl.exp(value - highest), 0.0)
    keys = tl.where(is_candidate, key_of(value), 0)
    suffices = (by_k & (top_k <= MOST_K)) | (
        (top_k >= vocab_size)
        & ((by_p & (tl.sum(probability) >= top_p * total)) | (by_min & (key_of(min_bound) >= bound)))
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
            least = tl.maximum(least, key_of(min_bound))
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
            least = tl.maximum(least, key_of(min_bound))
        token = _draw_from_row(row, vocab_size, temperature, highest, least, draw, BLOCK)
    return token


@triton.jit
def _draw_filtered(
    row,
    vocab_size,
    temperature,
    highest,
    maxima,
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
    bound = candidate_bound(maxima, vocab_size, top_k, FEWEST, MOST_K, BLOCK)
    count = vocab_size * 0
    total = highest * 0.0
    for start in range(0, vocab_size, BLOCK):
        x = scaled_tile(row, start, vocab_size, temperature, BLOCK)
        total += tl.sum(tl.exp(x - highest))
        count = collect_candidates(x, start, bound, count, ids, values, BLOCK, CAPACITY)
    # What some threads stored, others read.
    tl.debug_barrier()
    slot = tl.arange(0, CAPACITY)
    candidate = tl.load(ids + slot, mask=slot < count, other=0)
    value = tl.load(values + slot, mask=slot < count, other=float("-inf"))
    return draw_from_candidates(
        row,
        vocab_size,
        temperature,
        highest,
        bound,
        total,
        count,
        candidate,
        value,
        draw,
        top_k,
        top_p,
        min_p,
        MOST_K,
        BLOCK,
        CAPACITY,
    )


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
    best, best_id, is_nan = lane_maxima(row, 0, vocab_size, BLOCK)
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


def sample_launch(
    logits: Tensor,
    parameters: tuple[Tensor, ...] | None,
    workspace: tuple[Tensor, Tensor] | None,
    tokens: Tensor,
    *,
    filtered: bool,
    target: Device | None = None,
) -> Launch:
    """One program a row; without parameters every row is greedy."""
    target = target or device_of(logits.device)
    return Launch(
        _sample_kernel,
        (len(logits),),
        {
            "logits": logits,
            **dict(zip(PARAMETERS, parameters or (None,) * len(PARAMETERS), strict=True)),
            "candidate_ids": workspace[0] if workspace else None,
            "candidate_values": workspace[1] if workspace else None,
            "tokens": tokens,
            "vocab_size": logits.shape[1],
            "logits_stride": logits.stride(0),
        },
        {
            "RANDOM": parameters is not None,
            "FILTERED": filtered,
            "FEWEST": FEWEST_CANDIDATES,
            "MOST_K": MOST_K,
            "BLOCK": BLOCK,
            "CAPACITY": MAX_CANDIDATES,
            "NOT_FINITE": NOT_FINITE,
            "NONE_ALLOWED": NONE_ALLOWED,
            "TOO_LARGE": TOO_LARGE,
        },
        num_warps=4 if target.backend == "hip" else 8,
        num_stages=1,
    )
