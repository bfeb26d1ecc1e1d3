"""The running sequences' state on the device, from which it decodes several steps without the host.

    batch slot  0     1     2     …     padding      one row a sequence, its own for its whole stay in the batch
    rows        token, position, tokens left, …      [batch slots + 1, columns] int64
    table       7 3 9 0 0 …                          [batch slots + 1, blocks] int32

The host sends what changed as one vector: rows of sequences that are new or ran elsewhere since, and appended blocks.
"""

# A decode step updates its rows on the device. The host tracks the state each row will have after all started steps
# have run. A sequence that ends in one of those steps never reuses its row: the next owner's row is sent in full.
# Real numbers are kept as the bits of a float64 among the integers, so that a row is one vector too.

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch import DecodeEntry
from engine.device.transfer import to_device
from engine.sampling.settings import sampling_row
from engine.sampling.state import MAX_STOP_TOKENS
from kernels.decode_step import Column

NUM_COLUMNS = Column.STOP + MAX_STOP_TOKENS


def padding_rows(count: int, vocab_size: int, device: torch.device) -> Tensor:
    """Rows that have ended: greedy, with filters that leave all tokens in; int64 `[count, columns]`."""
    rows = torch.zeros(count, NUM_COLUMNS, dtype=torch.int64, device=device)
    rows[:, Column.TOP_K] = vocab_size
    rows[:, Column.TOP_P] = _bits(1.0)
    return rows


class DecodeState:
    """The rows, and the host's knowledge of what stands in them."""

    def __init__(self, batch_slots: int, max_blocks: int, vocab_size: int, device: torch.device) -> None:
        """For `batch_slots` sequences of at most `max_blocks` blocks."""
        self.device = device
        self.batch_slots = batch_slots
        self.padding_row = batch_slots
        """A row that has ended for good: what a batch is filled up with."""
        self.rows = padding_rows(batch_slots + 1, vocab_size, device)
        self.table = torch.zeros(batch_slots + 1, max_blocks, dtype=torch.int32, device=device)
        self.vocab_size = vocab_size
        self._admission_id = [-1] * batch_slots
        self._position = [-1] * batch_slots
        self._num_blocks = [0] * batch_slots

    def update(self, entries: Sequence[DecodeEntry], padded: int, num_steps: int) -> Tensor:
        """Bring the rows up to date for so many steps; returns the entries' rows on the device, `[padded]`, filled up
        with `pad`.

        Of entries without a token only blocks are new: their rows are right once the device comes to them.
        """
        rows = np.full(padded, self.padding_row, np.int64)
        rows[: len(entries)] = [entry.batch_slot for entry in entries]
        stale = [entry for entry in entries if entry.token_id is not None and not self._is_current(entry)]
        values = np.array([self._row(entry) for entry in stale], np.int64).reshape(-1)
        places: list[npt.NDArray[np.int64]] = []
        blocks: list[int] = []
        for entry in entries:
            batch_slot, table = entry.batch_slot, entry.block_table
            known = self._num_blocks[batch_slot] if self._admission_id[batch_slot] == entry.admission_id else 0
            if known < len(table):
                first = batch_slot * self.table.shape[1]
                places.append(np.arange(first + known, first + len(table)))
                blocks += table[known:]
        stale_slots = np.array([entry.batch_slot for entry in stale], np.int64)
        packed = np.concatenate([rows, stale_slots, values, *places, np.array(blocks, np.int64)])
        sizes = [padded, len(stale), len(values), len(blocks), len(blocks)]
        on_device, stale_rows, row_values, block_places, block_values = torch.split(
            to_device(packed, self.device), sizes
        )
        if stale:
            self.rows.index_copy_(0, stale_rows, row_values.view(len(stale), NUM_COLUMNS))
        if blocks:
            self.table.view(-1).index_copy_(0, block_places, block_values.to(torch.int32))
        for entry in entries:
            self._admission_id[entry.batch_slot] = entry.admission_id
            self._position[entry.batch_slot] = entry.position + num_steps
            self._num_blocks[entry.batch_slot] = len(entry.block_table)
        return on_device

    def tokens(self, token_ids: Tensor) -> Tensor:
        """`[T]` tokens, with those of rows in place of `in_flight_token` them."""
        rows = (-1 - token_ids).clamp(min=0)
        return torch.where(token_ids < 0, self.rows[:, Column.TOKEN].index_select(0, rows), token_ids)

    def invalidate(self, batch_slots: Sequence[int]) -> None:
        """Note that nothing is known of these rows: they are sent anew."""
        for batch_slot in batch_slots:
            self._admission_id[batch_slot] = -1

    def _is_current(self, entry: DecodeEntry) -> bool:
        slot = entry.batch_slot
        return self._admission_id[slot] == entry.admission_id and self._position[slot] == entry.position

    def _row(self, entry: DecodeEntry) -> list[int]:
        assert entry.token_id is not None
        sampling = entry.sampling
        row = sampling_row(sampling, self.vocab_size)
        stop = list(sampling.stop_tokens_banned_until_min)
        stop += (stop[:1] or [-1]) * (MAX_STOP_TOKENS - len(stop))
        return [
            entry.token_id,
            entry.position,
            entry.max_tokens,
            max(0, sampling.params.min_tokens - sampling.num_output),
            entry.rope_length,
            row.seed,
            row.index,
            row.top_k,
            _bits(row.temperature),
            _bits(row.top_p),
            _bits(row.min_p),
            *stop,
        ]


def _bits(value: float) -> int:
    """The float64's bits as a signed integer."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
