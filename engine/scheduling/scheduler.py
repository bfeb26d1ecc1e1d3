"""Which tokens run in the next step.

    add ──► waiting ──admit──► running ──finish──► gone
               ▲                  │
               └─────preempt──────┘

A step costs O(running), however many wait.
"""

# Each step first continues what runs, in order of service: one token where a sequence decodes, a chunk where its
# prompt is still being read. When blocks run out, the last in order gives its blocks up and is computed again later,
# mostly from the prefix cache. What is left of the token budget goes to waiting sequences, as far as the forecast
# lets them in.

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

from engine.scheduling.admission import AdmissionForecast, LengthStatistics
from engine.scheduling.block_manager import BlockManager, CachedBlock
from engine.scheduling.decode_steps import DecodeStepPolicy
from engine.scheduling.memory_backoff import MemoryBackoff
from engine.scheduling.prefill_budget import PrefillBudgetTuner
from engine.scheduling.sequence import Sequence, Status
from engine.scheduling.step import ScheduledSequence, ScheduledStep
from engine.scheduling.step_budget import StepBudget
from engine.scheduling.waiting_queue import WaitingQueue
from kernels.integers import ceil_div


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much one step may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prompt_logits: int
    """Rows of logits for prompt log-probabilities, which cost `vocab_size` floats each."""


class Scheduler:
    """Owns the queue and the batch, and moves sequences between them."""

    def __init__(
        self,
        blocks: BlockManager,
        limits: SchedulerLimits,
        lengths: LengthStatistics,
        decode_steps: DecodeStepPolicy,
        prefill_budget: PrefillBudgetTuner,
    ) -> None:
        self.blocks = blocks
        self.limits = limits
        self.lengths = lengths
        self.decode_steps = decode_steps
        self.prefill_budget = prefill_budget
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """In order of service, so that the last is the one to preempt."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.memory_backoff = MemoryBackoff(limits.max_num_batched_tokens)
        self._free_batch_slots = list(reversed(range(self.max_batch_slots)))
        self._admission_ids = itertools.count()

    @property
    def max_batch_slots(self) -> int:
        """How many sequences may run: each takes a token of every step, and more of them would only starve."""
        return min(self.limits.max_num_seqs, self.memory_backoff.tokens)

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)

    def schedule(self) -> ScheduledStep:
        """Decide the next step, give its tokens blocks, and index those that it fills with tokens that are known."""
        step = ScheduledStep()
        while len(self.running) > self.max_batch_slots:  # there were more, until memory was short
            self.preempt(self.running[-1], step)
        while self._must_yield():
            self.preempt(self.running[-1])
        decodes = sum(sequence.num_tokens_to_run == 1 for sequence in self.running)
        budget = StepBudget(
            min(self.memory_backoff.tokens, self.prefill_budget.tokens + decodes),
            self.limits.max_prompt_logits,
            decodes=decodes,
        )
        self._continue(step, budget)
        if not step.preempted:
            self._admit(step, budget)
        self._choose_decode_steps(step)
        return step

    def _must_yield(self) -> bool:
        """Whether the last running sequence stands in the way of a waiting one of higher priority."""
        if not len(self.waiting) or not self.running:
            return False
        first, last = self.waiting.peek(), self.running[-1]
        if first.priority <= last.priority:
            return False
        if len(self.running) >= self.max_batch_slots:
            return True
        return not AdmissionForecast(self.running, self.blocks, self.lengths).admit(first, self._cached_prefix(first))

    def _continue(self, step: ScheduledStep, budget: StepBudget) -> None:
        place = 0
        while place < len(self.running):  # the list's end moves nearer when a sequence is preempted
            sequence = self.running[place]
            place += 1
            wanted = budget.grant(sequence, sequence.num_computed_tokens)
            granted = self._make_room(sequence, wanted, step)
            if granted:
                self._schedule(sequence, granted, step, budget)

    def _make_room(self, sequence: Sequence, wanted: int, step: ScheduledStep) -> int:
        """Preempt from the end until `wanted` more tokens have blocks; returns how many tokens have."""
        while wanted and not self.blocks.can_grow(sequence.table, sequence.num_computed_tokens + wanted):
            if self.running[-1] is not sequence:
                self.preempt(self.running[-1], step)
                continue
            wanted = min(wanted, self.blocks.growable(sequence.table) - sequence.num_computed_tokens)
            if wanted == 0:
                self.preempt(sequence, step)
        return wanted

    def _admit(self, step: ScheduledStep, budget: StepBudget) -> None:
        forecast: AdmissionForecast | None = None
        while len(self.waiting) and len(self.running) < self.max_batch_slots and budget.tokens and self.blocks.num_free:
            sequence = self.waiting.peek()
            cached = self._cached_prefix(sequence)
            start = len(cached) * self.blocks.block_size
            wanted = budget.grant(sequence, start)
            if wanted == 0 or not self.blocks.can_attach_prefix(cached, start + wanted):
                break
            # With nothing else running, every request that `Engine.add` accepted fits.
            if self.running:
                forecast = forecast or AdmissionForecast(self.running, self.blocks, self.lengths)
                if not forecast.admit(sequence, cached):
                    break
            self._start(sequence, cached)
            self._schedule(sequence, wanted, step, budget)

    def _cached_prefix(self, sequence: Sequence) -> list[CachedBlock]:
        # The last token always runs, for its logits; and so does every token whose logits were asked for.
        limit = sequence.num_tokens - 1
        if sequence.scores_prompt:
            limit = min(limit, len(sequence.request.prompt_logprobs))
        return self.blocks.lookup(sequence.token_ids, sequence.table.salt, limit)

    def _start(self, sequence: Sequence, cached: list[CachedBlock]) -> None:
        self.waiting.pop()
        self.blocks.attach_prefix(sequence.table, cached)
        sequence.num_computed_tokens = len(cached) * self.blocks.block_size
        sequence.num_shared = len(cached)
        sequence.num_started += 1
        if sequence.num_started == 1:
            self.num_prompt_tokens += sequence.num_prompt
            self.num_cached_prompt_tokens += sequence.num_computed_tokens
            if sequence.sampling.index == 0:
                sequence.request.cached_tokens = sequence.num_computed_tokens
        sequence.batch_slot, sequence.admission_id = self._free_batch_slots.pop(), next(self._admission_ids)
        sequence.status = Status.RUNNING
        sequence.request.clock.admitted()
        bisect.insort(self.running, sequence, key=lambda s: s.key)

    def _schedule(self, sequence: Sequence, num_tokens: int, step: ScheduledStep, budget: StepBudget) -> None:
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        self.blocks.grow(sequence.table, end)
        self.blocks.cache_full_blocks(sequence.table, sequence.token_ids, min(end, sequence.num_tokens))
        expected = sequence.num_tokens_with_in_flight
        samples = end == expected and expected - sequence.num_prompt < sequence.max_output
        prompt_logits = sequence.prompt_logits(start, end)
        num_logits = max(int(samples), prompt_logits)
        budget.spend(num_tokens, prompt_logits, decode=sequence.num_tokens_to_run == 1)
        step.scheduled.append(
            ScheduledSequence(sequence, sequence.admission_id, start, end, num_logits, samples, prompt_logits > 0)
        )

    def _choose_decode_steps(self, step: ScheduledStep) -> None:
        """Move the sequences that can decode several tokens at once into the multi-step batch, with blocks for it."""
        step.num_steps, step.multi_step = self.decode_steps.num_steps_for(
            step.scheduled, self.blocks, self.lengths, num_waiting=len(self.waiting)
        )
        if step.multi_step:
            ahead = {id(item) for item in step.multi_step}
            step.scheduled = [item for item in step.scheduled if id(item) not in ahead]
        for item in step.multi_step:
            self.blocks.grow(item.sequence.table, item.start + min(step.num_steps, item.tokens_left))

    def needs_no_preemption(self) -> bool:
        """True if the next step needs no preemption: a preempted sequence would lose its in-flight tokens."""
        most = self.memory_backoff.tokens
        missing = sum(
            max(0, self.blocks.blocks_for(s.num_computed_tokens + min(s.num_tokens_to_run, most)) - len(s.table.blocks))
            for s in self.running
        )
        return len(self.running) <= self.max_batch_slots and missing <= self.blocks.num_free and not self._must_yield()

    def preempt(self, sequence: Sequence, step: ScheduledStep | None = None) -> None:
        """Take a running sequence's blocks and queue it again where it was; its tokens stay."""
        self._leave(sequence)
        sequence.request.clock.preempted()
        sequence.status = Status.WAITING
        self.waiting.push(sequence)
        self.num_preemptions += 1
        if step is not None:
            step.preempted.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Let go of a sequence, wherever it is; one that is finished stays so."""
        status = sequence.status
        if status is Status.RUNNING:
            self._leave(sequence)
            sequence.request.clock.left()
        sequence.status = Status.FINISHED
        if status is Status.WAITING:
            self.waiting.discard(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.table)
        self._free_batch_slots.append(sequence.batch_slot)
        sequence.num_computed_tokens = sequence.num_in_flight_tokens = 0
        place = bisect.bisect_left(self.running, sequence.key, key=lambda s: s.key)
        del self.running[place]

    def free_capacity(self, ahead: int = 0) -> int:
        """How many more typical sequences the queue could take in.

        What would fit into the batch now, by the forecast, and a quarter more, so that slots which come free
        before the next call are filled at once; less what waits already. Where `ahead` is more than the quarter it
        takes its place.
        """
        free_slots = max(0, self.max_batch_slots - len(self.running))
        if len(self.waiting) >= self._target(free_slots, ahead):
            return 0
        typical = self.blocks.blocks_for(int(self.lengths.mean_prompt + self.lengths.mean_output) + 1)
        peak = AdmissionForecast(self.running, self.blocks, self.lengths).peak
        fitting = max(0 if self.running else 1, int(self.blocks.num_blocks - peak) // typical)
        return max(0, self._target(min(free_slots, fitting), ahead) - len(self.waiting))

    def _target(self, joining: int, ahead: int) -> int:
        """How many sequences should be queued when so many could join the batch, and `ahead` more may follow them."""
        return joining + max(ceil_div(len(self.running) + joining, 4), ahead)

    def check(self) -> None:
        """Audit queue, batch and blocks between steps; raises AssertionError."""
        self.waiting.check()
        self.blocks.check(sequence.table for sequence in self.running)
        slots = [sequence.batch_slot for sequence in self.running]
        if sorted(slots + self._free_batch_slots) != list(range(len(slots) + len(self._free_batch_slots))):
            raise AssertionError("a batch slot is held twice, or by no sequence")
        keys = [sequence.key for sequence in self.running]
        if keys != sorted(set(keys)):
            raise AssertionError("the running sequences are out of order")
        for sequence in self.running:
            if sequence.status is not Status.RUNNING:
                raise AssertionError(f"a {sequence.status.value} sequence is in the batch")
            if not 0 <= sequence.num_computed_tokens <= sequence.num_tokens_with_in_flight:
                raise AssertionError("a sequence has computed more tokens than it has")
            if len(sequence.table.blocks) < self.blocks.blocks_for(sequence.num_computed_tokens):
                raise AssertionError("computed tokens lie outside the sequence's blocks")
