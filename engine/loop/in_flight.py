"""A step that was started and whose tokens were not read yet: step 2 is started before step 1 is settled.

    device   | step 1        | step 2        | step 3        |
    host     start 1, start 2, settle 1 ......, start 3, settle 2 ....

Only steps that the device samples are started so. A sequence that ends in step 1 still computes in step 2; its tokens
are discarded. That is safe: blocks enter the prefix index only for tokens that were read, and the stale step writes to
blocks that the sequence owned when it started, whose later owners' steps run after it on the same stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.batch import Batch, MultiStepBatch, PendingTokens, Runner
from engine.scheduling.step import ScheduledSequence, ScheduledStep


@dataclass(frozen=True, slots=True)
class InFlightStep:
    items: Sequence[ScheduledSequence]
    num_steps: int
    tokens: PendingTokens
    """With a row for each item that samples, in order."""

    started: float
    """By `time.perf_counter`."""

    @classmethod
    def start(cls, runner: Runner, step: ScheduledStep) -> InFlightStep:
        """Start a step that does not need the host; raises what the runner raises, and has changed nothing then."""
        items = step.multi_step or step.scheduled
        started = time.perf_counter()
        decodes = MultiStepBatch([item.decode_entry() for item in items if item.samples], step.num_steps)
        if all(item.decodes for item in items):
            tokens = runner.decode(decodes)
        else:
            tokens = runner.run_and_sample(Batch([item.entry() for item in items]), decodes)
        for item in items:
            item.mark_started(step.num_steps)
        return cls(items, step.num_steps, tokens, started)

    @property
    def only_decodes(self) -> bool:
        return all(item.decodes for item in self.items)

    @property
    def num_prompt_tokens(self) -> int:
        """That run in it, beside those that are counted with the tokens that come of them."""
        return sum(item.end - item.start - item.samples for item in self.items)

    def results(self, sampled: npt.NDArray[np.int64]) -> Iterator[tuple[ScheduledSequence, list[int]]]:
        """The items whose sequences are still in the batch, each with what was sampled for it: as many tokens as were
        expected, or fewer and a code; none where its prompt is still being read."""
        rows = iter(sampled.tolist())
        for item in self.items:
            row = next(rows) if item.samples else []
            if item.is_current:
                yield item, row[: item.tokens_left]
