"""Several decode steps in one launch: each token is sampled on the device and is the next step's input there.

    rows ── gather ── token, position, slot ── model ── logits ── sample ─ stop? ── scatter ─┐
      ▲                                                                                     │
      └───────────────────────────── k times, no host read ────────────────────────────────┘

An ended row goes on as padding and writes into the padding block. All shapes follow from the batch size, the number of
steps and the widest block table, as CUDA graphs need it. On the CPU rows leave the batch as they end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import DecodeMetadata
from engine.batch import NO_TOKEN, NONE_ALLOWED, NOT_FINITE, DecodeEntry, MultiStepBatch
from engine.device.cuda_graphs import GraphRunner, batch_size
from engine.execution.decode_state import Column, DecodeState, float_column
from engine.models.decoder import TokenInputs
from engine.sampling.settings import filters_of
from kernels.launch import aligned
from kernels.sampling import argmax, sample
from kernels.sampling_fallback import Filters

Forward = Callable[[TokenInputs, DecodeMetadata], Tensor]
"""One step of the model over its cache: logits `[S, vocab_size]`."""

_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class SamplingMode:
    """How a batch's rows choose their tokens, known on the host: part of the key of a graph."""

    random: bool
    """Whether any row samples at random."""

    bans_stop_tokens: bool
    """Whether any row has not reached its `min_tokens`."""

    filters: Filters

    @classmethod
    def of(cls, entries: Sequence[DecodeEntry], vocab_size: int) -> SamplingMode:
        params = [entry.sampling.params for entry in entries if not entry.sampling.params.greedy]
        filters = filters_of(params, vocab_size)
        # The next power of two: any number of candidates from the largest k on gives the same.
        top_k = min(1 << (filters.top_k - 1).bit_length(), vocab_size) if filters.top_k else 0
        return cls(
            random=bool(params),
            bans_stop_tokens=any(entry.sampling.num_output < entry.sampling.params.min_tokens for entry in entries),
            filters=replace(filters, top_k=top_k),
        )


class MultiStepDecoder:
    """Runs multi-step batches over one model, one cache and one state."""

    def __init__(
        self,
        forward: Forward,
        state: DecodeState,
        graphs: GraphRunner,
        *,
        block_size: int,
        padding_block: int,
        is_static: bool,
    ) -> None:
        """`padding_block` belongs to no sequence: padding is written there. `is_static` keeps shapes and places, as
        graphs need it; without it, rows leave as they end, which the host has to look for.
        """
        self._forward = forward
        self._state = state
        self._graphs = graphs
        self._block_size = block_size
        self._padding_slot = padding_block * block_size
        self._is_static = is_static
        self._buffers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def decode(self, batch: MultiStepBatch) -> AsyncTokens:
        """See `Runner.decode`."""
        entries = batch.entries
        width = max(len(entry.block_table) for entry in entries)
        mode = SamplingMode.of(entries, self._state.vocab_size)
        try:
            run = self._run_static if self._is_static else self._run_leaving
            tokens = run(batch, width, mode)
        except Exception:
            self._state.invalidate([entry.batch_slot for entry in entries])
            raise
        return AsyncTokens(tokens, self._state.device)

    @torch.inference_mode()
    def sample(self, batch: MultiStepBatch, forward: Callable[[], Tensor]) -> AsyncTokens:
        """Sample a token for each entry from its row of the logits of `forward`; see `Runner.run_and_sample`."""
        entries = batch.entries
        try:
            rows = self._state.update(entries, len(entries), 1)
            logits = forward()
            tokens = torch.empty(0, 1, dtype=torch.int64)
            if entries:
                mode = SamplingMode.of(entries, self._state.vocab_size)
                sampled, _ = self._move_on(rows, self._state.rows.index_select(0, rows), logits, mode)
                tokens = self._to_host(sampled[:, None])
        except Exception:
            self._state.invalidate([entry.batch_slot for entry in entries])
            raise
        return AsyncTokens(tokens, self._state.device)

    def _to_host(self, tokens: Tensor) -> Tensor:
        """A copy that is on its way."""
        host = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=self._state.device.type == "cuda")
        return host.copy_(tokens, non_blocking=True)

    def _run_leaving(self, batch: MultiStepBatch, width: int, mode: SamplingMode) -> Tensor:
        """`[S, num_steps]`; rows leave as they end."""
        num_steps = batch.num_steps
        rows = self._state.update(batch.entries, len(batch.entries), num_steps)
        tokens = torch.full((len(rows), num_steps), NO_TOKEN, dtype=torch.int64)
        places = torch.arange(len(rows))
        tables = self._state.table.index_select(0, rows)[:, :width]
        for step in range(num_steps):
            sampled, alive = self._step(rows, tables, mode)
            tokens[places, step] = sampled
            if not bool(alive.all()):
                rows, tables, places = rows[alive], tables[alive], places[alive]
                if len(rows) == 0:
                    break
        return tokens

    def _run_static(self, batch: MultiStepBatch, width: int, mode: SamplingMode) -> Tensor:
        """`[S, num_steps]`, on its way to the host; ended rows stay as padding."""
        entries, num_steps = batch.entries, batch.num_steps
        padded = batch_size(len(entries))
        # The next power of two, so that a graph serves until the tables have doubled.
        width = min(1 << (width - 1).bit_length(), self._state.table.shape[1])
        rows, tokens = self._buffers_for(padded, num_steps)
        rows.copy_(self._state.update(entries, padded, num_steps))

        def steps() -> None:
            tables = self._state.table.index_select(0, rows)[:, :width]
            for step in range(num_steps):
                sampled, _ = self._step(rows, tables, mode)
                tokens[:, step] = sampled

        self._graphs.run((padded, num_steps, width, mode), steps)
        return self._to_host(tokens[: len(entries)])

    def _buffers_for(self, padded: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """Where the graphs of one size find their rows, and leave their tokens."""
        key = (padded, num_steps)
        if key not in self._buffers:
            device = self._state.device
            self._buffers[key] = (
                torch.empty(padded, dtype=torch.int64, device=device),
                torch.empty(padded, num_steps, dtype=torch.int64, device=device),
            )
        return self._buffers[key]

    def _step(self, rows: Tensor, tables: Tensor, mode: SamplingMode) -> tuple[Tensor, Tensor]:
        """One token for each row: what was sampled, and which rows go on; `[S]` each."""
        state = self._state.rows.index_select(0, rows)
        alive = state[:, Column.TOKENS_LEFT] > 0
        positions = torch.where(alive, state[:, Column.POSITION], 0)
        blocks = tables.gather(1, (positions // self._block_size)[:, None])[:, 0].long()
        slots = torch.where(alive, blocks * self._block_size + positions % self._block_size, self._padding_slot)
        inputs = TokenInputs(
            token_ids=state[:, Column.TOKEN],
            positions=positions,
            lengths=torch.maximum(state[:, Column.ROPE_LENGTH], positions + 1),
        )
        lengths = torch.where(alive, positions + 1, 0).to(torch.int32)
        logits = self._forward(inputs, DecodeMetadata(positions, lengths, tables, slots))
        return self._move_on(rows, state, logits, mode)

    def _move_on(self, rows: Tensor, state: Tensor, logits: Tensor, mode: SamplingMode) -> tuple[Tensor, Tensor]:
        """Choose a token for each row from its logits, and move the row on by it; returns what `_step` does."""
        alive = state[:, Column.TOKENS_LEFT] > 0
        chosen = sample_tokens(logits, state, mode, is_static=self._is_static)
        held = (state[:, Column.MIN_TOKENS_LEFT] - 1).clamp(min=0)
        stops = (chosen[:, None] == state[:, Column.STOP :]).any(dim=1) & (held == 0)
        goes_on = alive & (chosen >= 0) & ~stops & (state[:, Column.TOKENS_LEFT] > 1)
        state[:, Column.TOKEN] = torch.where(goes_on, chosen, 0)
        state[:, Column.POSITION] += alive
        state[:, Column.TOKENS_LEFT] = torch.where(goes_on, state[:, Column.TOKENS_LEFT] - 1, 0)
        state[:, Column.MIN_TOKENS_LEFT] = held
        # Rows of padding are all the same row, and write the same.
        self._state.rows.index_copy_(0, rows, state)
        return torch.where(alive, chosen, NO_TOKEN), goes_on


def sample_tokens(logits: Tensor, state: Tensor, mode: SamplingMode, *, is_static: bool) -> Tensor:
    """A token for each row of logits `[S, vocab_size]`, as `Sampler` would choose it, or the code that says why not.

    `state` are the rows `[S, columns]` of the state. Logits are overwritten. `is_static` waits for no result on the
    way.
    """
    # The logits of banned stop tokens are saved before they are masked: a NaN or +inf there is an error of the row too.
    held = _ban_stop_tokens(logits, state) if mode.bans_stop_tokens else None
    if mode.random:
        # Columns as rows that all start aligned.
        columns = state.new_empty(state.shape[1], aligned(len(state), 8))[:, : len(state)].copy_(state.t())
        tokens = sample(
            logits,
            float_column(state, Column.TEMPERATURE),
            columns[Column.TOP_K],
            float_column(state, Column.TOP_P),
            float_column(state, Column.MIN_P),
            columns[Column.SEED],
            columns[Column.POSITION] + 1,
            columns[Column.INDEX],
            filters=mode.filters,
            is_static=is_static,
        )
    else:
        tokens = argmax(logits, is_static=is_static)
    # After masking, an all -inf row is NONE_ALLOWED only if a banned token's logit was finite; else it is NOT_FINITE.
    if held is None:
        return torch.where(tokens == NONE_ALLOWED, NOT_FINITE, tokens)
    is_sound = (held < torch.inf).all(dim=1) & ((tokens != NONE_ALLOWED) | (held > _NEG_INF).any(dim=1))
    return torch.where(is_sound, tokens, NOT_FINITE)


def _ban_stop_tokens(logits: Tensor, state: Tensor) -> Tensor:
    """Ban the stop tokens of rows that may not stop yet, in place; returns what they had, `[S, stop tokens]`, and -inf
    in place of others."""
    stop = state[:, Column.STOP :]
    places = stop.clamp(min=0)
    is_held = (stop >= 0) & (state[:, Column.MIN_TOKENS_LEFT] > 0)[:, None]
    before = logits.gather(1, places)
    logits.scatter_(1, places, torch.where(is_held, _NEG_INF, before))
    return torch.where(is_held, before, _NEG_INF)


class AsyncTokens:
    """Tokens of a multi-step batch on their way to the host; implements `PendingTokens`."""

    def __init__(self, tokens: Tensor, device: torch.device) -> None:
        self._tokens = tokens
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> npt.NDArray[np.int64]:
        if self._copied is not None:
            self._copied.synchronize()
        tokens: npt.NDArray[np.int64] = self._tokens.numpy()
        return tokens
