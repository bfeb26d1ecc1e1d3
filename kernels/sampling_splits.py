"""Choosing a token by several programs a row, for few rows of a large vocabulary: the tokens of `sampling_rows.py`.

    maxima     each program: the largest logit of its part of the row                       all that greedy rows need
    masses     each program: the mass of each of its tiles, and its candidates, where filters ask for them
    draw       one program a row: finds the tile, or the threshold among all candidates, and the token

Masses are those that one program would find, added up in its order: a token depends on no number of programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.device import Device, device_of
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.sampling_fallback import NONE_ALLOWED, NOT_FINITE, TOO_LARGE
from kernels.sampling_rows import (
    BLOCK,
    FEWEST_CANDIDATES,
    MAX_CANDIDATES,
    MOST_K,
    PARAMETERS,
    candidate_bound,
    collect_candidates,
    draw_from_candidates,
    draw_in_tile,
    lane_maxima,
    scaled_tile,
    uniform,
)
from kernels.triton_compat import tl, triton

MOST_PARTS = 16
# Tiles that a part has at least: with fewer, two launches more cost what they save.
_LEAST_TILES = 2
# Programs that a multiprocessor is given, as long as a row is split.
_PROGRAMS_PER_SM = 2


@triton.jit
def _part_of_row(vocab_size, BLOCK: tl.constexpr):
    """Where the program's part of a row begins and ends, in whole tiles; the last parts may have none."""
    tiles = tl.cdiv(tl.cdiv(vocab_size, BLOCK), tl.num_programs(1))
    first = tl.program_id(1) * tiles * BLOCK
    return first, tl.minimum(first + tiles * BLOCK, vocab_size)


@triton.jit
def _maxima_of_parts_kernel(
    logits,
    part_highest,
    part_tokens,
    part_maxima,
    vocab_size,
    logits_stride,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    first, end = _part_of_row(vocab_size, BLOCK)
    best, best_id, is_nan = lane_maxima(logits + number * logits_stride, first, end, BLOCK)
    highest = tl.max(best)
    token = tl.min(tl.where(best == highest, best_id, vocab_size))
    place = number * MOST_PARTS + tl.program_id(1)
    tl.store(part_highest + place, highest)
    # A NaN makes the row unsound, wherever it stands.
    tl.store(part_tokens + place, tl.where(tl.max(is_nan) > 0, -1, token))
    if FILTERED:
        tl.store(part_maxima + place * BLOCK + tl.arange(0, BLOCK), best)


@triton.jit
def _join_maxima(
    part_highest,
    part_tokens,
    number,
    parts,
    vocab_size,
    MOST_PARTS: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    NONE_ALLOWED: tl.constexpr,
):
    """The row's largest logit, and the first token that has it, or the code that says why there is none."""
    part = tl.arange(0, MOST_PARTS)
    place = number * MOST_PARTS + part
    highest_of_part = tl.load(part_highest + place, mask=part < parts, other=float("-inf"))
    token_of_part = tl.load(part_tokens + place, mask=part < parts, other=vocab_size)
    highest = tl.max(highest_of_part)
    token = tl.min(tl.where(highest_of_part == highest, token_of_part, vocab_size))
    if (tl.min(token_of_part) < 0) | (highest == float("inf")):
        token = token * 0 + NOT_FINITE
    elif highest == float("-inf"):
        token = token * 0 + NONE_ALLOWED
    return highest, token


@triton.jit
def _masses_of_tiles_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    part_highest,
    part_tokens,
    part_maxima,
    tile_masses,
    bounds,
    counts,
    candidate_ids,
    candidate_values,
    vocab_size,
    logits_stride,
    FILTERED: tl.constexpr,
    FEWEST: tl.constexpr,
    MOST_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    NONE_ALLOWED: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    highest, token = _join_maxima(
        part_highest, part_tokens, number, parts, vocab_size, MOST_PARTS, NOT_FINITE, NONE_ALLOWED
    )
    temperature = tl.load(temperatures + number).to(tl.float32)
    if (temperature == 0.0) | (token < 0):
        return
    highest = highest / temperature
    if tl.abs(highest) == float("inf"):
        return
    row = logits + number * logits_stride
    masses = tile_masses + number * tl.cdiv(vocab_size, BLOCK)
    first, end = _part_of_row(vocab_size, BLOCK)
    filters = token < 0
    if FILTERED:
        top_k = tl.minimum(tl.load(top_ks + number), vocab_size).to(tl.int32)
        filters = top_k < vocab_size
        filters |= (tl.load(top_ps + number).to(tl.float32) < 1.0) | (tl.load(min_ps + number).to(tl.float32) > 0.0)
        if filters:
            lane = tl.arange(0, BLOCK)
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            for other in range(0, parts):
                best = tl.maximum(best, tl.load(part_maxima + (number * MOST_PARTS + other) * BLOCK + lane))
            bound = candidate_bound(best / temperature, vocab_size, top_k, FEWEST, MOST_K, BLOCK)
            if part == 0:
                tl.store(bounds + number, bound.to(tl.int64))
            place = number * MOST_PARTS + part
            ids = candidate_ids + place * CAPACITY
            values = candidate_values + place * CAPACITY
            count = vocab_size * 0
            for start in range(first, end, BLOCK):
                x = scaled_tile(row, start, vocab_size, temperature, BLOCK)
                tl.store(masses + start // BLOCK, tl.sum(tl.exp(x - highest)))
                count = collect_candidates(x, start, bound, count, ids, values, BLOCK, CAPACITY)
            tl.store(counts + place, count)
    if not filters:
        for start in range(first, end, BLOCK):
            x = scaled_tile(row, start, vocab_size, temperature, BLOCK)
            tl.store(masses + start // BLOCK, tl.sum(tl.exp(x - highest)))


@triton.jit
def _draw_from_masses(row, masses, vocab_size, temperature, highest, draw, BLOCK: tl.constexpr):
    """The token at which the sum over the row passes `draw` of the whole: only its tile is read again."""
    num_tiles = tl.cdiv(vocab_size, BLOCK)
    # Added up in double precision and in order, as where one program has the row.
    total = (highest * 0.0).to(tl.float64)
    for tile in range(0, num_tiles):
        total += tl.load(masses + tile).to(tl.float64)
    target = draw.to(tl.float64) * total
    passed_before = target * 0.0
    tile = num_tiles * 0
    mass = tl.load(masses).to(tl.float64)
    while (tile < num_tiles - 1) & (passed_before + mass <= target):
        passed_before += mass
        tile += 1
        mass = tl.load(masses + tile).to(tl.float64)
    start = tile * BLOCK
    kept = tl.exp(scaled_tile(row, start, vocab_size, temperature, BLOCK) - highest)
    return draw_in_tile(kept, start, passed_before, target, vocab_size, BLOCK)


@triton.jit
def _draw_from_parts(
    row,
    masses,
    counts,
    ids,
    values,
    parts,
    vocab_size,
    temperature,
    highest,
    bound,
    draw,
    top_k,
    top_p,
    min_p,
    MOST_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The token drawn from what the filters keep, of candidates that lie part by part."""
    total = highest * 0.0
    for tile in range(0, tl.cdiv(vocab_size, BLOCK)):
        total += tl.load(masses + tile)
    slot = tl.arange(0, CAPACITY)
    count = vocab_size * 0
    place = slot
    for part in range(0, parts):
        count += tl.load(counts + part)
        # From the next part's first slot on, its own places count.
        place = tl.where(slot >= count, (part + 1) * CAPACITY + slot - count, place)
    candidate = tl.load(ids + place, mask=slot < count, other=0)
    value = tl.load(values + place, mask=slot < count, other=float("-inf"))
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


@triton.jit(do_not_specialize=["parts"])
def _choose_from_parts_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    indices,
    part_highest,
    part_tokens,
    tile_masses,
    bounds,
    counts,
    candidate_ids,
    candidate_values,
    tokens,
    vocab_size,
    logits_stride,
    parts,
    RANDOM: tl.constexpr,
    FILTERED: tl.constexpr,
    MOST_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    NONE_ALLOWED: tl.constexpr,
    TOO_LARGE: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * logits_stride
    highest, token = _join_maxima(
        part_highest, part_tokens, number, parts, vocab_size, MOST_PARTS, NOT_FINITE, NONE_ALLOWED
    )
    if RANDOM:
        temperature = tl.load(temperatures + number).to(tl.float32)
        if (token >= 0) & (temperature != 0.0):
            highest = highest / temperature
            if tl.abs(highest) == float("inf"):
                token = token * 0 + TOO_LARGE
            else:
                draw = uniform(tl.load(seeds + number), tl.load(positions + number), tl.load(indices + number))
                masses = tile_masses + number * tl.cdiv(vocab_size, BLOCK)
                filters = token < 0
                if FILTERED:
                    top_k = tl.minimum(tl.load(top_ks + number), vocab_size).to(tl.int32)
                    top_p = tl.load(top_ps + number).to(tl.float32)
                    min_p = tl.load(min_ps + number).to(tl.float32)
                    filters = (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0)
                    if filters:
                        token = _draw_from_parts(
                            row,
                            masses,
                            counts + number * MOST_PARTS,
                            candidate_ids + number * MOST_PARTS * CAPACITY,
                            candidate_values + number * MOST_PARTS * CAPACITY,
                            parts,
                            vocab_size,
                            temperature,
                            highest,
                            tl.load(bounds + number).to(tl.uint32),
                            draw,
                            top_k,
                            top_p,
                            min_p,
                            MOST_K,
                            BLOCK,
                            CAPACITY,
                        )
                if not filters:
                    token = _draw_from_masses(row, masses, vocab_size, temperature, highest, draw, BLOCK)
    tl.store(tokens + number, token)


def parts_of_row(rows: int, vocab_size: int, target: Device) -> int:
    """How many programs share a row, a power of two; 1 where rows alone keep the device busy, or a row is short.

    Not yet tuned on a GPU: from shapes alone, so that a graph and a step without one choose alike.
    """
    places = _PROGRAMS_PER_SM * target.num_sms // max(1, rows)
    most = min(MOST_PARTS, places, ceil_div(vocab_size, BLOCK) // _LEAST_TILES)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


def split_launches(
    logits: Tensor,
    parameters: tuple[Tensor, ...] | None,
    tokens: Tensor,
    *,
    filtered: bool,
    parts: int,
    target: Device | None = None,
) -> list[Launch]:
    """What chooses tokens by `parts` programs a row; without parameters every row is greedy."""
    target = target or device_of(logits.device)
    rows, vocab_size = logits.shape

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    tensors: dict[str, Tensor | None] = {
        "logits": logits,
        "part_highest": room(MOST_PARTS),
        "part_tokens": room(MOST_PARTS, dtype=torch.int32),
        "part_maxima": room(MOST_PARTS, BLOCK) if filtered else None,
        "tile_masses": room(ceil_div(vocab_size, BLOCK)) if parameters is not None else None,
        "bounds": room(dtype=torch.int64) if filtered else None,
        "counts": room(MOST_PARTS, dtype=torch.int32) if filtered else None,
        "candidate_ids": room(MOST_PARTS, MAX_CANDIDATES, dtype=torch.int32) if filtered else None,
        "candidate_values": room(MOST_PARTS, MAX_CANDIDATES) if filtered else None,
        "tokens": tokens,
        **dict(zip(PARAMETERS, parameters or (None,) * len(PARAMETERS), strict=True)),
    }
    constants = {
        "RANDOM": parameters is not None,
        "FILTERED": filtered,
        "FEWEST": FEWEST_CANDIDATES,
        "MOST_K": MOST_K,
        "BLOCK": BLOCK,
        "CAPACITY": MAX_CANDIDATES,
        "MOST_PARTS": MOST_PARTS,
        "NOT_FINITE": NOT_FINITE,
        "NONE_ALLOWED": NONE_ALLOWED,
        "TOO_LARGE": TOO_LARGE,
    }
    numbers = {"vocab_size": vocab_size, "logits_stride": logits.stride(0), "parts": parts}
    kernels = [(_maxima_of_parts_kernel, (rows, parts)), (_choose_from_parts_kernel, (rows,))]
    if parameters is not None:
        kernels.insert(1, (_masses_of_tiles_kernel, (rows, parts)))
    return [
        Launch(
            kernel,
            grid,
            {name: value for name, value in (tensors | numbers).items() if name in kernel.arg_names},
            {name: value for name, value in constants.items() if name in kernel.arg_names},
            num_warps=4 if target.backend == "hip" else 8,
            num_stages=1,
        )
        for kernel, grid in kernels
    ]
