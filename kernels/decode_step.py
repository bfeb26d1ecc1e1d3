"""The running sequences' rows before and after a decode step: one launch each.

    prepare   rows ─► token, position, slot, lengths; where rows sample, their parameters
    advance   rows, chosen tokens ─► rows moved on by one token; the tokens that count

A row is `[columns]` int64 (`Column`); real numbers in it are the bits of a float64. A row whose `TOKENS_LEFT` is 0 has
ended: it stands at position 0, attends to nothing and writes to the padding slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto

import torch
from torch import Tensor

from kernels import dispatch
from kernels.integers import ceil_div
from kernels.launch import Launch, aligned
from kernels.triton_compat import tl, triton

NO_TOKEN = -1
"""Of a row that has ended."""

# Rows of a program: a thread each.
_BLOCK = 128


class Column(IntEnum):
    """Where a row keeps what."""

    TOKEN = 0
    POSITION = auto()
    TOKENS_LEFT = auto()
    """0: the sequence has ended."""
    MIN_TOKENS_LEFT = auto()
    """For so many more tokens it may not stop (`min_tokens`)."""
    ROPE_LENGTH = auto()
    SEED = auto()
    INDEX = auto()
    TOP_K = auto()
    TEMPERATURE = auto()
    """A real number; 0: greedy."""
    TOP_P = auto()
    MIN_P = auto()
    STOP = auto()
    """The first stop token; all columns from here on are. Those that are not needed repeat the first, or are -1 where
    there is none."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a model and its attention take of S rows; int64 `[S]` but where it says otherwise."""

    token_ids: Tensor
    positions: Tensor
    rope_lengths: Tensor
    slots: Tensor
    seq_lens: Tensor
    """int32: tokens that each attends to, 0 for rows that have ended."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How each of S rows samples, in the order in which `sample` takes it."""

    temperature: Tensor
    """float32, as `top_p` and `min_p`."""

    top_k: Tensor
    """int64, as the rest."""

    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    """Of the tokens to be drawn."""

    indices: Tensor


@triton.jit(do_not_specialize=["num_rows", "table_stride", "padding_slot"])
def _prepare_kernel(
    state,
    rows,
    tables,
    step,
    token_ids,
    positions,
    rope_lengths,
    slots,
    seq_lens,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    draw_positions,
    indices,
    num_rows,
    table_stride,
    padding_slot,
    COLUMNS: tl.constexpr,
    TOKEN: tl.constexpr,
    POSITION: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    ROPE_LENGTH: tl.constexpr,
    SEED: tl.constexpr,
    INDEX: tl.constexpr,
    TOP_K: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_INPUTS: tl.constexpr,
    HAS_SAMPLING: tl.constexpr,
    HAS_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    base = state + tl.load(rows + row, mask=inside, other=0) * COLUMNS
    position = tl.load(base + POSITION, mask=inside, other=0)
    if HAS_INPUTS:
        alive = tl.load(base + TOKENS_LEFT, mask=inside, other=0) > 0
        stands = tl.where(alive, position, 0)
        block = tl.load(tables + row.to(tl.int64) * table_stride + stands // BLOCK_SIZE, mask=inside, other=0)
        slot = tl.where(alive, block.to(tl.int64) * BLOCK_SIZE + stands % BLOCK_SIZE, padding_slot)
        rope_length = tl.maximum(tl.load(base + ROPE_LENGTH, mask=inside, other=0), stands + 1)
        tl.store(token_ids + row, tl.load(base + TOKEN, mask=inside, other=0), mask=inside)
        tl.store(positions + row, stands, mask=inside)
        tl.store(rope_lengths + row, rope_length, mask=inside)
        tl.store(slots + row, slot, mask=inside)
        tl.store(seq_lens + row, tl.where(alive, stands + 1, 0).to(tl.int32), mask=inside)
    if HAS_STEP:  # noqa: SIM102 - Triton compiles one only where the constant says so
        # No other program reads it before the next launch.
        if tl.program_id(0) == 0:
            tl.store(step, tl.load(step) + 1)
    if HAS_SAMPLING:
        temperature = tl.load(base + TEMPERATURE, mask=inside, other=0).to(tl.float64, bitcast=True)
        top_p = tl.load(base + TOP_P, mask=inside, other=0).to(tl.float64, bitcast=True)
        min_p = tl.load(base + MIN_P, mask=inside, other=0).to(tl.float64, bitcast=True)
        tl.store(temperatures + row, temperature.to(tl.float32), mask=inside)
        tl.store(top_ps + row, top_p.to(tl.float32), mask=inside)
        tl.store(min_ps + row, min_p.to(tl.float32), mask=inside)
        tl.store(top_ks + row, tl.load(base + TOP_K, mask=inside, other=0), mask=inside)
        tl.store(seeds + row, tl.load(base + SEED, mask=inside, other=0), mask=inside)
        tl.store(draw_positions + row, position + 1, mask=inside)
        tl.store(indices + row, tl.load(base + INDEX, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "tokens_stride"])
def _advance_kernel(
    state,
    rows,
    chosen,
    tokens,
    goes_on,
    step,
    num_rows,
    tokens_stride,
    COLUMNS: tl.constexpr,
    TOKEN: tl.constexpr,
    POSITION: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    MIN_TOKENS_LEFT: tl.constexpr,
    STOP: tl.constexpr,
    NONE: tl.constexpr,
    HAS_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    base = state + tl.load(rows + row, mask=inside, other=0) * COLUMNS
    left = tl.load(base + TOKENS_LEFT, mask=inside, other=0)
    position = tl.load(base + POSITION, mask=inside, other=0)
    held = tl.maximum(tl.load(base + MIN_TOKENS_LEFT, mask=inside, other=0) - 1, 0)
    token = tl.load(chosen + row, mask=inside, other=NONE)
    stops = row < 0
    for column in tl.static_range(STOP, COLUMNS):
        stops = stops | (tl.load(base + column, mask=inside, other=-1) == token)
    alive = left > 0
    lives = alive & (token >= 0) & ~(stops & (held == 0)) & (left > 1)
    # Rows of padding are all the same row, and write the same.
    tl.store(base + TOKEN, tl.where(lives, token, 0), mask=inside)
    tl.store(base + POSITION, position + alive.to(tl.int64), mask=inside)
    tl.store(base + TOKENS_LEFT, tl.where(lives, left - 1, 0), mask=inside)
    tl.store(base + MIN_TOKENS_LEFT, held, mask=inside)
    place = row
    if HAS_STEP:
        place = tl.load(step) * tokens_stride + row
    tl.store(tokens + place, tl.where(alive, token, NONE), mask=inside)
    tl.store(goes_on + row, lives, mask=inside)


def prepare_decode(
    state: Tensor,
    rows: Tensor,
    tables: Tensor,
    *,
    block_size: int,
    padding_slot: int,
    samples: bool,
    step: Tensor | None = None,
) -> tuple[DecodeInputs, RowSampling | None]:
    """What the next token of each row takes, and with `samples` how it is drawn.

    `state` is `[N, columns]`, `rows` int64 `[S]`, `tables` `[S, blocks]` in the order of `rows`; a position's slot is
    its block's number times `block_size` and the rest. `step` `[1]` is raised by one.
    """
    if not dispatch.use_triton(state):
        if step is not None:
            step += 1
        own = state.index_select(0, rows)
        return _inputs_fallback(own, tables, block_size, padding_slot), _sampling_fallback(own) if samples else None
    inputs = _empty_inputs(len(rows), state)
    sampling = _empty_sampling(len(rows), state) if samples else None
    prepare_launch(state, rows, tables, step, inputs, sampling, block_size, padding_slot).run()
    return inputs, sampling


def sampling_of(state: Tensor, rows: Tensor) -> RowSampling:
    """How the next token of each row is drawn; arguments as for `prepare_decode`."""
    if not dispatch.use_triton(state):
        return _sampling_fallback(state.index_select(0, rows))
    sampling = _empty_sampling(len(rows), state)
    prepare_launch(state, rows, None, None, None, sampling, 1, 0).run()
    return sampling


def advance_decode(
    state: Tensor, rows: Tensor, chosen: Tensor, *, into: Tensor | None = None, step: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Move each row on by the token that was chosen for it; a code below 0 and a stop token end the row.

    Returns tokens, with `NO_TOKEN` for rows that had ended before, and which rows go on, `[S]` each. `into`
    `[steps, most rows]` takes the tokens instead, at row `step` `[1]`.
    """
    if not dispatch.use_triton(state):
        tokens, goes_on = _advance_fallback(state, rows, chosen)
        if into is not None:
            assert step is not None
            into[:, : len(rows)].index_copy_(0, step, tokens[None])
        return tokens, goes_on
    tokens = torch.empty_like(chosen) if into is None else into
    goes_on = torch.empty(len(rows), dtype=torch.bool, device=state.device)
    advance_launch(state, rows, chosen, tokens, goes_on, step).run()
    return tokens, goes_on


def prepare_launch(
    state: Tensor,
    rows: Tensor,
    tables: Tensor | None,
    step: Tensor | None,
    inputs: DecodeInputs | None,
    sampling: RowSampling | None,
    block_size: int,
    padding_slot: int,
) -> Launch:
    return Launch(
        _prepare_kernel,
        (ceil_div(len(rows), _BLOCK),),
        {
            "state": state,
            "rows": rows,
            "tables": tables,
            "step": step,
            "token_ids": inputs and inputs.token_ids,
            "positions": inputs and inputs.positions,
            "rope_lengths": inputs and inputs.rope_lengths,
            "slots": inputs and inputs.slots,
            "seq_lens": inputs and inputs.seq_lens,
            "temperatures": sampling and sampling.temperature,
            "top_ks": sampling and sampling.top_k,
            "top_ps": sampling and sampling.top_p,
            "min_ps": sampling and sampling.min_p,
            "seeds": sampling and sampling.seeds,
            "draw_positions": sampling and sampling.positions,
            "indices": sampling and sampling.indices,
            "num_rows": len(rows),
            "table_stride": 0 if tables is None else tables.stride(0),
            "padding_slot": padding_slot,
        },
        {
            "COLUMNS": state.shape[1],
            "TOKEN": int(Column.TOKEN),
            "POSITION": int(Column.POSITION),
            "TOKENS_LEFT": int(Column.TOKENS_LEFT),
            "ROPE_LENGTH": int(Column.ROPE_LENGTH),
            "SEED": int(Column.SEED),
            "INDEX": int(Column.INDEX),
            "TOP_K": int(Column.TOP_K),
            "TEMPERATURE": int(Column.TEMPERATURE),
            "TOP_P": int(Column.TOP_P),
            "MIN_P": int(Column.MIN_P),
            "BLOCK_SIZE": block_size,
            "HAS_INPUTS": inputs is not None,
            "HAS_SAMPLING": sampling is not None,
            "HAS_STEP": step is not None,
            "BLOCK": _BLOCK,
        },
    )


def advance_launch(
    state: Tensor, rows: Tensor, chosen: Tensor, tokens: Tensor, goes_on: Tensor, step: Tensor | None
) -> Launch:
    return Launch(
        _advance_kernel,
        (ceil_div(len(rows), _BLOCK),),
        {
            "state": state,
            "rows": rows,
            "chosen": chosen,
            "tokens": tokens,
            "goes_on": goes_on,
            "step": step,
            "num_rows": len(rows),
            "tokens_stride": 0 if step is None else tokens.stride(0),
        },
        {
            "COLUMNS": state.shape[1],
            "TOKEN": int(Column.TOKEN),
            "POSITION": int(Column.POSITION),
            "TOKENS_LEFT": int(Column.TOKENS_LEFT),
            "MIN_TOKENS_LEFT": int(Column.MIN_TOKENS_LEFT),
            "STOP": int(Column.STOP),
            "NONE": NO_TOKEN,
            "HAS_STEP": step is not None,
            "BLOCK": _BLOCK,
        },
    )


def _empty_inputs(count: int, state: Tensor) -> DecodeInputs:
    """Vectors that all start aligned, in one piece of memory for each type."""
    whole = state.new_empty(4, aligned(count, 8))[:, :count]
    return DecodeInputs(*whole, seq_lens=torch.empty(count, dtype=torch.int32, device=state.device))


def _empty_sampling(count: int, state: Tensor) -> RowSampling:
    top_k, seeds, positions, indices = state.new_empty(4, aligned(count, 8))[:, :count]
    temperature, top_p, min_p = state.new_empty(3, aligned(count, 4), dtype=torch.float32)[:, :count]
    return RowSampling(temperature, top_k, top_p, min_p, seeds, positions, indices)


def _inputs_fallback(own: Tensor, tables: Tensor, block_size: int, padding_slot: int) -> DecodeInputs:
    """`own` are the rows themselves, `[S, columns]`."""
    alive = own[:, Column.TOKENS_LEFT] > 0
    positions = torch.where(alive, own[:, Column.POSITION], 0)
    blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
    return DecodeInputs(
        token_ids=own[:, Column.TOKEN],
        positions=positions,
        rope_lengths=torch.maximum(own[:, Column.ROPE_LENGTH], positions + 1),
        slots=torch.where(alive, blocks * block_size + positions % block_size, padding_slot),
        seq_lens=torch.where(alive, positions + 1, 0).to(torch.int32),
    )


def _sampling_fallback(own: Tensor) -> RowSampling:
    def real(column: Column) -> Tensor:
        column_bits = own[:, column]
        return column_bits.view(torch.float64).to(torch.float32)

    return RowSampling(
        temperature=real(Column.TEMPERATURE),
        top_k=own[:, Column.TOP_K],
        top_p=real(Column.TOP_P),
        min_p=real(Column.MIN_P),
        seeds=own[:, Column.SEED],
        positions=own[:, Column.POSITION] + 1,
        indices=own[:, Column.INDEX],
    )


def _advance_fallback(state: Tensor, rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    own = state.index_select(0, rows)
    alive = own[:, Column.TOKENS_LEFT] > 0
    held = (own[:, Column.MIN_TOKENS_LEFT] - 1).clamp(min=0)
    stops = (chosen[:, None] == own[:, Column.STOP :]).any(dim=1) & (held == 0)
    goes_on = alive & (chosen >= 0) & ~stops & (own[:, Column.TOKENS_LEFT] > 1)
    own[:, Column.TOKEN] = torch.where(goes_on, chosen, 0)
    own[:, Column.POSITION] += alive
    own[:, Column.TOKENS_LEFT] = torch.where(goes_on, own[:, Column.TOKENS_LEFT] - 1, 0)
    own[:, Column.MIN_TOKENS_LEFT] = held
    # Rows of padding are all the same row, and write the same.
    state.index_copy_(0, rows, own)
    return torch.where(alive, chosen, NO_TOKEN), goes_on
