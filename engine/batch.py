"""What the scheduler hands to a runner for one step, and what a runner is.

This is the seam between *which tokens run* (scheduler, block manager: plain Python, no torch) and *how they run*
(models, attention, KV cache: torch). Tests put a fake runner on the far side of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from engine.sampling.state import SamplingState


def in_flight_token(batch_slot: int) -> int:
    """Stands for the token in a row of the runner's state, which only the device knows."""
    return -1 - batch_slot


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """One sequence's part of a step.

    The tokens in `token_ids` stand at positions `start .. start + len(token_ids)`; everything before `start` is already
    in the KV cache. A token that only the device knows is named by its row there (`in_flight_token`).
    `block_table[i]` is the physical block of positions `i * block_size .. (i + 1) * block_size`; the table covers every
    position up to the last new token.
    """

    token_ids: Sequence_[int]
    start: int
    block_table: Sequence_[int]
    num_logits: int
    """Logits are wanted for this many of the last tokens: 0 inside a chunked prefill, 1 where a token is sampled,
    more where prompt log-probabilities were asked for."""

    rope_length: int = 0
    """What `Runner.rope_length` said of the sequence."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that runs in one step: prefill chunks and decodes mixed, in no particular order."""

    entries: Sequence_[BatchEntry]

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)


@dataclass(frozen=True, slots=True)
class DecodeEntry:
    """One sequence in a multi-step batch: its last token is still to run, and it goes on from there on the device."""

    batch_slot: int
    """The sequence's row in the runner's state, its own for as long as it stays in the batch."""

    admission_id: int
    """Unique to this stay in the batch: another number means that the slot went to another sequence."""

    token_id: int | None
    """Its last token, which stands at `position` and is not in the KV cache yet. None: it is the
    token that an earlier, unread multi-step batch leaves in the row, or the sequence ended in that batch."""

    position: int
    max_tokens: int
    """How many it may still generate, in this multi-step batch and after it."""

    block_table: Sequence_[int]
    """Covers every position that the steps write to. While the sequence keeps its slot, blocks are only appended."""

    rope_length: int
    sampling: SamplingState


@dataclass(frozen=True, slots=True)
class MultiStepBatch:
    """A multi-step decode batch: `num_steps` steps run on the device without host reads."""

    entries: Sequence_[DecodeEntry]
    num_steps: int


NO_TOKEN, NOT_FINITE, NONE_ALLOWED, TOO_LARGE = -1, -2, -3, -4
"""In place of a token: the sequence had ended; its logits were no finite numbers; its parameters allow no token; its
temperature makes the logits overflow."""


class PendingTokens(Protocol):
    """Tokens of started steps, on their way to the host."""

    def wait(self) -> npt.NDArray[np.int64]:
        """Wait for it; `[entries, num_steps]` tokens, or one of the codes above. Nothing but `NO_TOKEN` follows an end.

        A sequence ends by a code, by a token in its `stop_tokens_banned_until_min` once it has `min_tokens`, or by its
        `max_tokens`.
        """


class Runner(Protocol):
    """Runs a batch through a model over the paged KV cache that it owns."""

    @property
    def num_blocks(self) -> int:
        """Physical blocks in the KV cache."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int:
        """Positions a sequence may have, prompt and output together."""

    @property
    def supports_overlap(self) -> bool:
        """Whether `decode` and `run_and_sample` return before their steps have run, so that the host has time for
        something else."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        """The length by which a sequence's positions are encoded; 0 where length does not matter, as in most models.

        Where it does (dynamic and longrope scaling), keys of different rope lengths are different keys: they share no
        cached prefix, and a sequence whose rope length changes as it grows is computed anew.
        """

    def run(self, batch: Batch) -> torch.Tensor:
        """Write the new tokens' keys and values, and return the wanted logits.

        In each layer the whole batch's keys and values are written before any of its tokens attends: an entry's block
        table may name blocks that another entry fills in the same step, when both share a prefix.

        Returns float32 `[sum of num_logits, vocab_size]` on the runner's device, entries in order. The caller may
        overwrite it, and neither side keeps the other's arguments beyond the step.
        """

    def decode(self, batch: MultiStepBatch) -> PendingTokens:
        """Run several decode steps, sampling on the device: the tokens that `run` and `Sampler` would give one by one.

        It may return before the steps have run; all work that is started later runs after them. When it raises, nothing
        but the keys and values at the entries' own new positions may have changed.
        """

    def run_and_sample(self, batch: Batch, multi_step: MultiStepBatch) -> PendingTokens:
        """Run a batch, and sample a token on the device for each of its entries with logits, of which each has one row.

        `multi_step` holds those entries in order, with one step; their last tokens are the batch's. Their rows are left
        as `decode` leaves them, so that another multi-step batch can continue from there. Otherwise as `decode`. Only
        here may a batch have in-flight tokens, which only the device knows.
        """

    def raise_if_broken(self) -> None:
        """Raise `EngineFailed` where a step would, and that is known without one."""

    def close(self) -> None:
        """End what it has outside of this process; it runs nothing after that. Safe to call twice, from any thread."""
