"""Choose k, the number of decode steps to run before the host reads tokens back.

More steps divide the host's cost by k, but a sequence that ends leaves its slot empty until all k have run, and waiting
requests wait as long. So k is the largest power of two at which most of the batch has k tokens left, waiting requests
wait no longer than a small fraction of a mean output, the steps stay short, sequences that the host samples get a fair
share of the steps, and the blocks are free: no sequence is preempted for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Sequence_

from engine.scheduling.admission import LengthStatistics
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.step import ScheduledSequence

MOST_STEPS = 16
"""The most steps unless the configuration says otherwise."""

_LONGEST = 0.25
"""Longest multi-step batch, in seconds, estimated from the previous one."""

_FILLED = 0.9
"""Least fraction of a multi-step batch's sequence steps that must be able to produce a token."""

_WAITED = 1 / 8
"""Longest multi-step batch while requests wait, as a fraction of the mean output length."""


class DecodeStepPolicy:
    """Chooses k, and the sequences that run k steps."""

    def __init__(self, most: int | None, rope_length: Callable[[int, int], int]) -> None:
        """`most` is `EngineConfig.decode_steps`; what was asked for is not cut short for the time it takes.
        `rope_length` is `Runner.rope_length`.
        """
        self._most = MOST_STEPS if most is None else most
        self._longest = _LONGEST if most is None else math.inf
        self._rope_length = rope_length
        self._seconds_per_step = 0.0

    def record(self, seconds: float, num_steps: int, *, only_decodes: bool = True) -> None:
        """How long steps of the model took. One that reads prompts says too much, and counts until there is better."""
        if only_decodes or not self._seconds_per_step:
            self._seconds_per_step = seconds / num_steps

    def num_steps_for(
        self, items: Sequence_[ScheduledSequence], blocks: BlockManager, lengths: LengthStatistics, *, num_waiting: int
    ) -> tuple[int, list[ScheduledSequence]]:
        """k, and the items that may go so far: (1, []) when none may.

        `items` are a whole step. Only where all of them decode is there anything to gain.
        """
        if self._most < 2 or not all(item.decodes for item in items):
            return 1, []
        able = [item for item in items if item.sequence.decodes_on_device]
        limit = self._most
        if len(able) < len(items):
            limit = min(limit, len(able) // (len(items) - len(able)))
        if num_waiting:
            limit = min(limit, int(lengths.mean_output * _WAITED))
        if self._seconds_per_step * limit > self._longest:
            limit = int(self._longest / self._seconds_per_step)
        if limit < 2 or not able:
            return 1, []
        steps = 1 << (limit.bit_length() - 1)
        while steps > 1:
            able_so_far = [item for item in able if self._keeps_rope(item, steps)]
            if _brings_enough(able_so_far, steps) and _fits(able_so_far, steps, blocks):
                return steps, able_so_far
            steps //= 2
        return 1, []

    def _keeps_rope(self, item: ScheduledSequence, steps: int) -> bool:
        """Whether the sequence's positions are encoded the same way all along."""
        sequence = item.sequence
        longest = item.end + min(steps, item.tokens_left) - 1
        return self._rope_length(sequence.num_prompt, longest) == sequence.rope_length


def _brings_enough(items: Sequence_[ScheduledSequence], steps: int) -> bool:
    tokens = sum(min(steps, item.tokens_left) for item in items)
    return tokens > 0 and tokens >= _FILLED * steps * len(items)


def _fits(items: Sequence_[ScheduledSequence], steps: int, blocks: BlockManager) -> bool:
    missing = sum(
        blocks.blocks_for(item.start + min(steps, item.tokens_left)) - len(item.sequence.table.blocks) for item in items
    )
    return missing <= blocks.num_free
