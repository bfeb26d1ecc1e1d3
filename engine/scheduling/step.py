"""What runs together in one step, and which tokens of which sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.batch import BatchEntry, DecodeEntry, in_flight_token
from engine.scheduling.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's part of a step: its tokens `start .. end`."""

    sequence: Sequence
    admission_id: int
    """The sequence's stay in the batch that this is a part of."""

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
    def needs_host(self) -> bool:
        """Whether more comes of it than a token that the device can sample."""
        return self.scores_prompt or (self.samples and not self.sequence.decodes_on_device)

    @property
    def is_current(self) -> bool:
        """Whether the sequence has been in the batch ever since."""
        return self.sequence.status is Status.RUNNING and self.sequence.admission_id == self.admission_id

    @property
    def tokens_left(self) -> int:
        """How many the sequence may generate from here on."""
        return self.sequence.max_output - (self.end - self.sequence.num_prompt)

    @property
    def is_in_flight(self) -> bool:
        """Whether its token, then the only one, is on the device alone."""
        return self.end > self.sequence.num_tokens

    def mark_started(self, num_steps: int) -> None:
        """Note that it was started, for so many steps: what they bring is expected from now on."""
        steps = min(num_steps, self.tokens_left) if self.samples else 0
        self.sequence.num_computed_tokens = self.end + max(0, steps - 1)
        self.sequence.num_in_flight_tokens += steps

    def entry(self) -> BatchEntry:
        sequence = self.sequence
        return BatchEntry(
            [in_flight_token(sequence.batch_slot)] if self.is_in_flight else sequence.token_ids[self.start : self.end],
            self.start,
            sequence.table.blocks,
            self.num_logits,
            sequence.rope_length,
        )

    def decode_entry(self) -> DecodeEntry:
        """The entry for a multi-step batch, or for sampling after the last token. Only of an item that samples."""
        sequence = self.sequence
        return DecodeEntry(
            batch_slot=sequence.batch_slot,
            admission_id=sequence.admission_id,
            token_id=None if self.is_in_flight else sequence.token_ids[self.end - 1],
            position=self.end - 1,
            max_tokens=self.tokens_left,
            block_table=sequence.table.blocks,
            rope_length=sequence.rope_length,
            sampling=sequence.sampling,
        )


@dataclass(slots=True)
class ScheduledStep:
    """What runs together. An entry may share blocks that an earlier one fills in the same step, never a later one."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    multi_step: list[ScheduledSequence] = field(default_factory=list)
    """Those that decode `num_steps` tokens at once, beside `scheduled`; their blocks are there already."""
    num_steps: int = 1
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def items(self) -> list[ScheduledSequence]:
        """All of it."""
        return [*self.scheduled, *self.multi_step]

    def only_multi_step(self) -> ScheduledStep:
        """A step of its multi-step batch alone."""
        return ScheduledStep(multi_step=self.multi_step, num_steps=self.num_steps)

    @property
    def is_empty(self) -> bool:
        return not (self.scheduled or self.multi_step)

    @property
    def needs_host(self) -> bool:
        """Whether the device cannot do all of it at one go."""
        return any(item.needs_host for item in self.scheduled) or bool(self.scheduled and self.multi_step)
