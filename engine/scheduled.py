"""A sequence's share of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.batch import BatchEntry, DecodeEntry
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of a step: its tokens `start .. end`."""

    sequence: Sequence
    start: int
    end: int
    num_logits: int
    samples: bool
    """Whether a token is sampled after the last of them."""

    scores_prompt: bool
    """Whether prompt log-probabilities are read from the logits."""

    @property
    def decodes(self) -> bool:
        """Whether all it does is to run the last token for the next one."""
        return self.samples and self.end - self.start == 1 and self.start > 0 and not self.scores_prompt

    @property
    def tokens_left(self) -> int:
        """How many the sequence may generate from here on."""
        return self.sequence.max_output - (self.end - self.sequence.num_prompt)

    def after(self, num_steps: int) -> Scheduled:
        """Where a share that decodes stands so many steps later, whatever the tokens are."""
        return replace(self, start=self.start + num_steps, end=self.end + num_steps)

    def entry(self) -> BatchEntry:
        sequence = self.sequence
        return BatchEntry(
            sequence.token_ids[self.start : self.end],
            self.start,
            sequence.table.blocks,
            self.num_logits,
            sequence.rope_length,
        )

    def decode_entry(self) -> DecodeEntry:
        """The same for a burst; only of a share that decodes."""
        sequence = self.sequence
        return DecodeEntry(
            seat=sequence.seat,
            admission=sequence.admission,
            token_id=sequence.token_ids[-1],
            position=self.start,
            max_tokens=self.tokens_left,
            block_table=sequence.table.blocks,
            rope_length=sequence.rope_length,
            sampling=sequence.sampling,
        )
