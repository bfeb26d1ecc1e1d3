"""A step that has been started and not been looked at.

Where the runner works by itself, the next step is scheduled and started before the last one's tokens are looked at,
whether it decodes, reads prompts, or both:

    device   | step 1        | step 2        | step 3        |
    host     start 1, start 2, settle 1 ......, start 3, settle 2 ....

                     scheduled with             runs with
    known before     lengths, blocks            prompts, positions, block tables
    only on device   whether it goes on         the last token, as step 1 leaves it in the sequence's row

Tokens decide nothing in between: a step for which the host needs them (penalties, log-probabilities, grammars ...) is
never started ahead of its time. What the host finds in the first step's tokens comes too late for the second: a
sequence that ended there goes on for nothing, and one that left the batch does too. Neither can harm anybody. No block
is put into the prefix index for a token that nobody has seen. They write beyond what was accepted, into blocks that
were theirs when the step started; whoever gets such a block later starts later, and so runs, and writes, after them.
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
