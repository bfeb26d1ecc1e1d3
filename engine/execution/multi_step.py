"""Several decode steps in one launch: each token is sampled on the device and is the next step's input there.

    rows ── gather ── token, position, slot ── model ── logits ── sample ─ stop? ── scatter ─┐
      ▲                                                                                     │
      └───────────────────────────── k times, no host read ────────────────────────────────┘

An ended row goes on as padding and writes into the padding block. A step's shapes follow from the batch size alone, as
CUDA graphs need it: a graph holds one step, and k steps are k replays, enqueued at once. On the CPU rows leave the
batch as they end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import DecodeMetadata
from engine.batch import NO_TOKEN, NONE_ALLOWED, NOT_FINITE, DecodeEntry, MultiStepBatch
from engine.device.collectives import ALONE, Group
from engine.device.cuda_graphs import GraphRunner, batch_size, batch_sizes
from engine.execution.decode_state import DecodeState
from engine.models.decoder import TokenInputs
from engine.sampling.settings import filters_of
from kernels.decode_step import Column, RowSampling, advance_decode, prepare_decode, sampling_of
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

    filters: Filters = field(compare=False)
    """Which filters any row uses, for implementations that pay for each."""

    is_filtered: bool = field(init=False)
    """Whether any row uses one: all that the kernel has to know."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_filtered", self.filters.any)

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


# What nearly all batches are, in the order in which graphs for them are captured.
_COMMON_MODES = (
    SamplingMode(random=False, bans_stop_tokens=False, filters=Filters(0, False, False)),
    SamplingMode(random=True, bans_stop_tokens=False, filters=Filters(0, True, False)),
    SamplingMode(random=True, bans_stop_tokens=False, filters=Filters(0, False, False)),
)


def most_demanding_mode(vocab_size: int) -> SamplingMode:
    """The mode that takes the most memory."""
    filters = Filters(top_k=vocab_size, top_p=True, min_p=True)
    return SamplingMode(random=True, bans_stop_tokens=True, filters=filters)


class StaticBuffers:
    """Where graphs find their rows and leave their tokens: those of all sizes use the first rows."""

    def __init__(self, state: DecodeState, max_steps: int) -> None:
        size, max_blocks = batch_size(state.batch_slots), state.table.shape[1]
        self.rows = torch.empty(size, dtype=torch.int64, device=state.device)
        self.tables = torch.empty(size, max_blocks, dtype=torch.int32, device=state.device)
        self.tokens = torch.empty(max_steps, size, dtype=torch.int64, device=state.device)
        self.step = torch.zeros(1, dtype=torch.int64, device=state.device)
        """The newest step of the batch; -1 before its first."""

    def begin(self, state: DecodeState, rows: Tensor) -> None:
        """Take in the rows `[size]` of a batch: its first step is next."""
        self.rows[: len(rows)].copy_(rows)
        torch.index_select(state.table, 0, rows, out=self.tables[: len(rows)])
        self.step.fill_(-1)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.rows, self.tables, self.tokens, self.step))


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
        max_steps: int,
        is_static: bool,
        group: Group = ALONE,
        prefix_blocks: int | None = None,
    ) -> None:
        """`padding_block` belongs to no sequence: padding is written there. No batch has more than `max_steps`.
        `is_static` keeps shapes and places, as graphs need it; without it, rows leave as they end, which the host has
        to look for. Of the ranks in `group`, the first chooses the tokens. Sequences whose first `prefix_blocks` are
        the same become neighbours.
        """
        self._forward = forward
        self._group = group
        self._state = state
        self._graphs = graphs
        self._block_size = block_size
        self._padding_slot = padding_block * block_size
        self._is_static = is_static
        self._prefix_blocks = prefix_blocks
        self._buffers = StaticBuffers(state, max_steps) if is_static else None

    @torch.inference_mode()
    def capture(self) -> None:
        """Make graphs ready for all sizes of batches and the common ways to sample, as far as memory allows.

        The largest comes first, because all graphs share the memory that it needs.
        """
        if self._buffers is None:
            return
        for mode in _COMMON_MODES:
            for size in batch_sizes(self._state.batch_slots):
                self._buffers.begin(self._state, self._state.update([], size, 0))
                if not self._graphs.prepare((size, mode), partial(self._static_step, self._buffers, size, mode)):
                    return

    @torch.inference_mode()
    def decode(self, batch: MultiStepBatch) -> AsyncTokens:
        """See `Runner.decode`."""
        order = self._by_prefix(batch.entries)
        if order is not None:
            batch = replace(batch, entries=[batch.entries[place] for place in order])
        entries = batch.entries
        mode = SamplingMode.of(entries, self._state.vocab_size)
        try:
            buffers = self._buffers
            tokens = self._run_leaving(batch, mode) if buffers is None else self._run_static(batch, mode, buffers)
        except Exception:
            self._state.invalidate([entry.batch_slot for entry in entries])
            raise
        return AsyncTokens(tokens, self._state.device, order)

    def _by_prefix(self, entries: Sequence[DecodeEntry]) -> list[int] | None:
        """Places of the entries in an order in which those that begin with the same blocks are neighbours."""
        if self._prefix_blocks is None:
            return None
        return sorted(range(len(entries)), key=lambda place: list(entries[place].block_table[: self._prefix_blocks]))

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
                chosen = self._choose(logits, rows, mode)
                sampled, _ = advance_decode(self._state.rows, rows, chosen)
                tokens = self._to_host(sampled[:, None])
        except Exception:
            self._state.invalidate([entry.batch_slot for entry in entries])
            raise
        return AsyncTokens(tokens, self._state.device)

    def _to_host(self, tokens: Tensor) -> Tensor:
        """A copy that is on its way."""
        host = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=self._state.device.type == "cuda")
        return host.copy_(tokens, non_blocking=True)

    def _run_leaving(self, batch: MultiStepBatch, mode: SamplingMode) -> Tensor:
        """`[S, num_steps]`; rows leave as they end."""
        num_steps = batch.num_steps
        width = max(len(entry.block_table) for entry in batch.entries)
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

    def _run_static(self, batch: MultiStepBatch, mode: SamplingMode, buffers: StaticBuffers) -> Tensor:
        """`[S, num_steps]`, on its way to the host; ended rows stay as padding."""
        size = batch_size(len(batch.entries))
        buffers.begin(self._state, self._state.update(batch.entries, size, batch.num_steps))
        step = partial(self._static_step, buffers, size, mode)
        for _ in range(batch.num_steps):
            self._graphs.run((size, mode), step)
        return self._to_host(buffers.tokens[: batch.num_steps, : len(batch.entries)].t().contiguous())

    def _static_step(self, buffers: StaticBuffers, size: int, mode: SamplingMode) -> None:
        """One step for the first `size` rows of the buffers: what a graph holds."""
        self._step(buffers.rows[:size], buffers.tables[:size], mode, buffers)

    def _step(
        self, rows: Tensor, tables: Tensor, mode: SamplingMode, buffers: StaticBuffers | None = None
    ) -> tuple[Tensor, Tensor]:
        """One token for each row: what was sampled, and which rows go on; `[S]` each. `buffers` count the step, and
        their tokens are returned."""
        inputs, sampling = prepare_decode(
            self._state.rows,
            rows,
            tables,
            block_size=self._block_size,
            padding_slot=self._padding_slot,
            samples=mode.random,
            step=None if buffers is None else buffers.step,
        )
        tokens = TokenInputs(token_ids=inputs.token_ids, positions=inputs.positions, lengths=inputs.rope_lengths)
        logits = self._forward(tokens, DecodeMetadata(inputs.positions, inputs.seq_lens, tables, inputs.slots))
        chosen = self._choose(logits, rows, mode, sampling)
        if buffers is None:
            return advance_decode(self._state.rows, rows, chosen)
        return advance_decode(self._state.rows, rows, chosen, into=buffers.tokens, step=buffers.step)

    def _choose(self, logits: Tensor, rows: Tensor, mode: SamplingMode, sampling: RowSampling | None = None) -> Tensor:
        """Tokens or codes as `sample_tokens` gives them, the same on all ranks: where one bit differed, their sequences
        would part."""
        if self._group.rank != 0:
            return self._group.broadcast(torch.empty_like(rows))
        return self._group.broadcast(
            sample_tokens(logits, self._state.rows, rows, mode, sampling, is_static=self._is_static)
        )


def sample_tokens(
    logits: Tensor,
    state: Tensor,
    rows: Tensor,
    mode: SamplingMode,
    sampling: RowSampling | None = None,
    *,
    is_static: bool,
) -> Tensor:
    """A token for each row of logits `[S, vocab_size]`, as `Sampler` would choose it, or the code that says why not.

    `rows` `[S]` says where each stands in the state `[N, columns]`, and `sampling` what stands there, where it is known
    already. Logits are overwritten. `is_static` waits for no result on the way.
    """
    # The logits of banned stop tokens are saved before they are masked: a NaN or +inf there is an error of the row too.
    held = _ban_stop_tokens(logits, state.index_select(0, rows)) if mode.bans_stop_tokens else None
    if mode.random:
        own = sampling or sampling_of(state, rows)
        tokens = sample(
            logits,
            own.temperature,
            own.top_k,
            own.top_p,
            own.min_p,
            own.seeds,
            own.positions,
            own.indices,
            filters=mode.filters,
            is_static=is_static,
        )
    else:
        tokens = argmax(logits, is_static=is_static)
    # After masking, an all -inf row is NONE_ALLOWED only if a banned token's logit was finite; else it is NOT_FINITE.
    if held is None:
        return tokens.masked_fill_(tokens == NONE_ALLOWED, NOT_FINITE)
    is_sound = (held < torch.inf).all(dim=1) & ((tokens != NONE_ALLOWED) | (held > _NEG_INF).any(dim=1))
    return tokens.masked_fill_(~is_sound, NOT_FINITE)


def _ban_stop_tokens(logits: Tensor, state: Tensor) -> Tensor:
    """Ban the stop tokens of rows that may not stop yet, in place; returns what they had, `[S, stop tokens]`, and -inf
    in place of others."""
    stop = state[:, Column.STOP :]
    places = stop.clamp(min=0)
    is_held = (stop >= 0) & (state[:, Column.MIN_TOKENS_LEFT] > 0)[:, None]
    before = logits.gather(1, places)
    logits.scatter_(1, places, before.masked_fill(is_held, _NEG_INF))
    return before.masked_fill(~is_held, _NEG_INF)


class AsyncTokens:
    """Tokens of a multi-step batch on their way to the host; implements `PendingTokens`."""

    def __init__(self, tokens: Tensor, device: torch.device, order: Sequence[int] | None = None) -> None:
        """`order`: the place in the batch of each row of `tokens`; None: the same."""
        self._tokens, self._order = tokens, order
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> npt.NDArray[np.int64]:
        if self._copied is not None:
            self._copied.synchronize()
        tokens: npt.NDArray[np.int64] = self._tokens.numpy()
        if self._order is None:
            return tokens
        in_place = np.empty_like(tokens)
        in_place[self._order] = tokens
        return in_place
