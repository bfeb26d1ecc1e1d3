"""How many tokens the batch decodes before anybody looks: the k of a burst.

More steps at once divide what the host costs by their number. They also cost something: a sequence that ends in the
middle leaves its seat empty until the burst is over, whoever waits waits so long, and blocks are taken ahead of time.
So k is the largest power of two at which

- most of the batch has that many tokens left;
- no request that waits would be kept out of a seat for more than a small share of a typical output;
- a burst stays short: on a slow device the host's part is small anyway;
- sequences that must be decoded one by one get a fair share of the steps;
- the blocks are free: nothing is preempted for the sake of looking ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Sequence_

from engine.scheduling.admission import LengthStatistics
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.step import ScheduledSequence

_MOST = 16
"""The most steps unless the configuration says otherwise."""

_LONGEST = 0.25
"""Seconds that a burst may take, by the last one's pace."""

_FILLED = 0.9
"""Share of a burst's steps that must be able to bring a token."""

_WAITED = 1 / 8
"""Share of a typical output that a burst may take while requests wait."""


class DecodeStepPolicy:
    """Chooses k, and for whom."""

    def __init__(self, most: int | None, rope_length: Callable[[int, int], int]) -> None:
        """`most` is `EngineConfig.decode_steps`; what was asked for is not cut short for the time it takes.
        `rope_length` is `Runner.rope_length`.
        """
        self._most = _MOST if most is None else most
        self._longest = _LONGEST if most is None else math.inf
        self._rope_length = rope_length
        self._seconds_per_step = 0.0

    def record(self, seconds: float, num_steps: int, *, only_decodes: bool = True) -> None:
        """How long steps of the model took. One that reads prompts says too much, and counts until there is better."""
        if only_decodes or not self._seconds_per_step:
            self._seconds_per_step = seconds / num_steps

    def choose(
        self, shares: Sequence_[ScheduledSequence], blocks: BlockManager, sizes: LengthStatistics, *, num_waiting: int
    ) -> tuple[int, list[ScheduledSequence]]:
        """k, and the shares that may go so far: (1, []) when none may.

        `shares` are a whole step. Only where all of them decode is there anything to gain.
        """
        if self._most < 2 or not all(share.decodes for share in shares):
            return 1, []
        able = [share for share in shares if share.sequence.decodes_on_device]
        limit = self._most
        if len(able) < len(shares):
            limit = min(limit, len(able) // (len(shares) - len(able)))
        if num_waiting:
            limit = min(limit, int(sizes.typical_output * _WAITED))
        if self._seconds_per_step * limit > self._longest:
            limit = int(self._longest / self._seconds_per_step)
        if limit < 2 or not able:
            return 1, []
        steps = 1 << (limit.bit_length() - 1)
        while steps > 1:
            bound = [share for share in able if self._keeps_rope(share, steps)]
            if _brings_enough(bound, steps) and _fits(bound, steps, blocks):
                return steps, bound
            steps //= 2
        return 1, []

    def _keeps_rope(self, share: ScheduledSequence, steps: int) -> bool:
        """Whether the sequence's positions are encoded the same way all along."""
        sequence = share.sequence
        longest = share.end + min(steps, share.tokens_left) - 1
        return self._rope_length(sequence.num_prompt, longest) == sequence.rope_length


def _brings_enough(shares: Sequence_[ScheduledSequence], steps: int) -> bool:
    tokens = sum(min(steps, share.tokens_left) for share in shares)
    return tokens > 0 and tokens >= _FILLED * steps * len(shares)


def _fits(shares: Sequence_[ScheduledSequence], steps: int, blocks: BlockManager) -> bool:
    missing = sum(
        blocks.blocks_for(share.start + min(steps, share.tokens_left)) - len(share.sequence.table.blocks)
        for share in shares
    )
    return missing <= blocks.num_free
