"""A step's entries as the tensors that a model and its attention take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from engine.attention import AttentionMetadata
from engine.batch import BatchEntry
from engine.device.transfer import to_device
from engine.models.decoder import TokenInputs


def prepare_inputs(
    entries: Sequence[BatchEntry], block_size: int, device: torch.device
) -> tuple[TokenInputs, AttentionMetadata]:
    """A step's entries as flat tensors."""
    query_lens = np.fromiter((len(entry.token_ids) for entry in entries), np.int64, len(entries))
    starts = np.fromiter((entry.start for entry in entries), np.int64, len(entries))
    block_tables = np.zeros((len(entries), max(len(entry.block_table) for entry in entries)), np.int64)
    for row, entry in zip(block_tables, entries, strict=True):
        row[: len(entry.block_table)] = entry.block_table

    num_tokens = int(query_lens.sum())
    sequence = np.repeat(np.arange(len(entries)), query_lens)
    first_rows = np.cumsum(query_lens) - query_lens
    positions = np.arange(num_tokens) - first_rows[sequence] + starts[sequence]
    slots = block_tables[sequence, positions // block_size] * block_size + positions % block_size
    token_ids = np.fromiter(chain.from_iterable(entry.token_ids for entry in entries), np.int64, num_tokens)

    rope_lengths = np.fromiter((entry.rope_length for entry in entries), np.int64, len(entries))
    lengths = np.maximum(rope_lengths[sequence], positions + 1)
    # One transfer for all.
    on_device = to_device(np.stack((token_ids, positions, slots, lengths)), device)
    logit_rows = _logit_rows(entries)
    return (
        TokenInputs(
            token_ids=on_device[0],
            positions=on_device[1],
            lengths=on_device[3],
            logit_rows=None if len(logit_rows) == num_tokens else to_device(logit_rows, device),
        ),
        AttentionMetadata(starts=starts, query_lens=query_lens, block_tables=block_tables, slots=on_device[2]),
    )


def _logit_rows(entries: Sequence[BatchEntry]) -> npt.NDArray[np.int64]:
    """Rows of the last `num_logits` tokens of each entry."""
    ends = np.cumsum([len(entry.token_ids) for entry in entries])
    wanted = np.array([entry.num_logits for entry in entries])
    offsets = np.arange(wanted.sum()) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    rows: npt.NDArray[np.int64] = np.repeat(ends - wanted, wanted) + offsets
    return rows
