"""The last part of a step: its results go into the sequences, which go on, stop, or fail with their requests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from functools import partial

import numpy as np
import numpy.typing as npt

from engine.batch import NONE_ALLOWED, NOT_FINITE, TOO_LARGE, Runner
from engine.errors import RequestFailed
from engine.loop.fault_isolation import IsolatedStep, filled_blocks
from engine.loop.in_flight import InFlightStep
from engine.loop.request_tracker import RequestTracker
from engine.loop.step_result import StepResult
from engine.sampling.sampler import LOGITS_TOO_LARGE, NO_NUMBERS, NO_TOKEN_ALLOWED
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step import ScheduledSequence
from engine.scheduling.stop_conditions import Stop, token_stop

# The codes of `PendingTokens.wait` that fail a request, as messages for its owner.
_FAILURES = {NOT_FINITE: NO_NUMBERS, NONE_ALLOWED: NO_TOKEN_ALLOWED, TOO_LARGE: LOGITS_TOO_LARGE}


class Settler:
    """Moves sequences on by what a step brought. An error in one ends its request, and no other."""

    def __init__(self, runner: Runner, scheduler: Scheduler, tracker: RequestTracker) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._tracker = tracker

    def settle(self, step: IsolatedStep[StepResult]) -> int:
        """Settle a step that was sampled on the host; returns how many tokens were generated."""
        blocks = self._scheduler.blocks
        for item in [*step.depends_on_failed, *step.retry_smaller]:
            blocks.evict(filled_blocks(item, blocks.block_size))
            self._scheduler.preempt(item.sequence)
        for item, error in step.failed:
            self._tracker.fail(item.sequence.request, RequestFailed(f"the model failed on this request: {error}"))
        return sum(
            self._guarded_advance(result.item.sequence, partial(self._advance, result=result))
            for result in step.results
        )

    def settle_in_flight(self, step: InFlightStep, sampled: npt.NDArray[np.int64]) -> int:
        """Settle a step that was sampled on the device; returns how many tokens were generated."""
        return sum(
            self._guarded_advance(item.sequence, partial(self._advance_from_in_flight, item=item, sampled=row))
            for item, row in step.results(sampled)
        )

    def _guarded_advance(self, sequence: Sequence, advance: Callable[[Sequence], int]) -> int:
        if sequence.finished:  # with its request, for another completion's error
            return 0
        try:
            return advance(sequence)
        except RequestFailed as error:
            self._tracker.fail(sequence.request, error)
        except Exception as error:  # noqa: BLE001 - one request's error must not end the loop
            self._tracker.fail(sequence.request, RequestFailed(f"the completion could not be read: {error}"))
        return 0

    def _advance(self, sequence: Sequence, result: StepResult) -> int:
        """Move a sequence on by a step's result; raises `RequestFailed` where it cannot go on."""
        request, sampled = sequence.request, result.sampled
        sequence.num_computed_tokens = result.item.end
        request.prompt_logprobs.extend(result.prompt_logprobs)
        if not all(math.isfinite(scored.logprob) for scored in result.prompt_logprobs):
            raise RequestFailed(NO_NUMBERS)
        if sampled is None:
            if sequence.num_computed_tokens == sequence.num_tokens:
                self._tracker.finish(sequence, Stop("length", None))
            return 0
        if sampled.error is not None:
            raise sampled.error
        if sampled.ends:
            self._tracker.finish(sequence, Stop("stop", None))
            return 0

        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        self._append(sequence, sampled.token_id)
        num_forced = 0 if sequence.finished else self._append_forced(sequence)
        self._follow_rope(sequence)
        return 1 + num_forced

    def _append(self, sequence: Sequence, token_id: int) -> None:
        """Take a token into the output, which may end with it."""
        if not sequence.request.clock.has_token:
            sequence.request.clock.sampled()
        sequence.token_ids.append(token_id)
        sequence.sampling.advance(token_id)
        self._check_stop(sequence)

    def _append_forced(self, sequence: Sequence) -> int:
        """Take in the tokens that the grammar demands next: they run with the last one, as a chunk of a prompt does.

        Returns how many. Where log-probabilities are wanted they are sampled one by one instead, since each needs the
        logits before it.
        """
        matcher = sequence.sampling.matcher
        if matcher is None or sequence.request.params.logprobs is not None:
            return 0
        before = sequence.num_output
        for token_id in matcher.forced_tokens():
            self._append(sequence, token_id)
            if sequence.finished:
                break
        return sequence.num_output - before

    def _advance_from_in_flight(self, sequence: Sequence, item: ScheduledSequence, sampled: Sequence_[int]) -> int:
        """Move a sequence on by tokens that the device sampled, and a code where it ended without one.

        Raises `RequestFailed` for the code.
        """
        sequence.num_in_flight_tokens -= len(sampled)
        if item.end == sequence.num_tokens and not item.samples:
            self._tracker.finish(sequence, Stop("length", None))
            return 0
        tokens = list(itertools.takewhile(lambda token: token >= 0, sampled))
        # Only a stop string can end it before the last token: the device checked the other conditions.
        if tokens and not sequence.request.clock.has_token:
            sequence.request.clock.sampled()
        size = len(tokens) if sequence.stop_scanner is None else 1
        num_taken = 0
        while num_taken < len(tokens) and not sequence.finished:
            part = tokens[num_taken : num_taken + size]
            num_taken += len(part)
            sequence.token_ids += part
            sequence.sampling.skip(len(part))
            self._scheduler.blocks.cache_full_blocks(sequence.table, sequence.token_ids, sequence.num_tokens - 1)
            self._check_stop(sequence)
        self._follow_rope(sequence)
        if num_taken < len(sampled) and sampled[num_taken] in _FAILURES and not sequence.finished:
            raise RequestFailed(_FAILURES[sampled[num_taken]])
        return num_taken

    def _check_stop(self, sequence: Sequence) -> None:
        """Finish the sequence if its newest token ends it."""
        stop = token_stop(sequence, self._runner.eos_token_ids)
        maybe = sequence.stop_scanner is not None and sequence.stop_scanner.feed(sequence.token_ids[-1])
        if stop is not None or maybe:
            self._tracker.finish(sequence, stop)

    def _follow_rope(self, sequence: Sequence) -> None:
        """Preempt the sequence where its new length turns its keys by another rope length."""
        if sequence.finished:
            return
        rope_length = self._runner.rope_length(sequence.num_prompt, sequence.num_tokens)
        if rope_length != sequence.rope_length:
            self._scheduler.preempt(sequence)
            sequence.set_rope_length(rope_length)
