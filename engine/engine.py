"""The engine: ids in, ids out (and text, where there is a tokenizer)."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Sequence_
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import NONE_ALLOWED, NOT_FINITE, Batch, BatchEntry, PendingTokens, Runner
from engine.config import EngineConfig
from engine.errors import EngineError, EngineFailed, GrammarError, InvalidPrompt, RequestFailed, RequestRejected
from engine.loop.detokenizer import Detokenizer
from engine.loop.fault_isolation import IsolatedStep, filled_blocks, run_isolating_faults
from engine.loop.in_flight import InFlightStep
from engine.loop.step_result import StepResult, sample_step
from engine.loop.throughput import Throughput
from engine.outputs import EngineStats, FinishReason, RequestOutput
from engine.sampling.sampler import NO_NUMBERS, NO_TOKEN_ALLOWED, Sampler, SamplingState
from engine.sampling.token_counts import TokenCounts
from engine.sampling_params import SamplingParams
from engine.scheduling.admission import LengthStatistics
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.decode_steps import DecodeStepPolicy
from engine.scheduling.grammar_queue import GrammarQueue
from engine.scheduling.prefill_budget import PrefillBudgetTuner, candidate_budgets
from engine.scheduling.request_limits import RequestLimits
from engine.scheduling.scheduler import Limits, ScheduledStep, Scheduler
from engine.scheduling.sequence import Request, Sequence
from engine.scheduling.step import ScheduledSequence
from engine.scheduling.stop_conditions import Stop, token_stop

if TYPE_CHECKING:
    from engine.grammar.limits import GrammarLimits
    from engine.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence_[int]

# Floats that the prompt log-probabilities of one step may take (256 MiB).
_MAX_PROMPT_LOGITS = 2**26

# What `PendingTokens.wait` says instead of a token, for the request's owner.
_FAILURES = {NOT_FINITE: NO_NUMBERS, NONE_ALLOWED: NO_TOKEN_ALLOWED}

# Prompts that `generate` turns into tokens at a time: enough to use every core, too few to delay the first step.
_TOKENIZE_AT_ONCE = 256


class Engine:
    """Generates completions, batching continuously over one runner.

        add ──▶ queued, if need be after its grammar ──▶ step, step ...: schedule, run, sample, settle ──▶ outputs

    `generate` takes prompts and returns when all are finished. A service uses `add`, `step` and `abort` instead, and
    `num_requests_wanted` to know when to add more. One thread owns an engine: no method may run beside another.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        *,
        grammar_limits: GrammarLimits | None = None,
        step_size: PrefillBudgetTuner | None = None,
    ) -> None:
        """Without a `step_size`, prompts fill each step up to `max_num_batched_tokens`."""
        self.runner = runner
        self.tokenizer = tokenizer
        """The model's tokenizer; None where it has none, and then prompts must be token ids."""
        self.config = config
        blocks = BlockManager(runner.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            blocks,
            Limits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_prompt_logits=max(1, _MAX_PROMPT_LOGITS // runner.vocab_size),
            ),
            LengthStatistics(runner.max_model_len),
            DecodeStepPolicy(1 if config.deterministic else config.decode_steps, runner.rope_length),
            step_size or PrefillBudgetTuner([config.max_num_batched_tokens]),
        )
        self.sampler = Sampler(runner.vocab_size, row_by_row=config.deterministic)
        self._limits = RequestLimits(
            vocab_size=runner.vocab_size,
            context=runner.max_model_len,
            cache=blocks.num_blocks * config.block_size,
            has_tokenizer=tokenizer is not None,
        )
        self._grammars = GrammarQueue(tokenizer, runner, grammar_limits)
        self._detokenizer = Detokenizer(tokenizer)
        self._requests: dict[str, Request] = {}
        self._ended: list[RequestOutput] = []
        """Outputs that the next `step` returns."""
        self._arrivals = itertools.count()
        self._generated = itertools.count()
        self._throughput = Throughput()
        self._supports_overlap = runner.supports_overlap and not config.deterministic
        self._in_flight: InFlightStep | None = None
        self._last_step_end = 0.0
        """When the last flight was over, by `time.perf_counter`."""
        self._num_steps = 0
        self._num_output_tokens = 0
        self._num_computed_tokens = 0
        self._num_rejected = 0
        self._finished: Counter[FinishReason] = Counter()

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, config: EngineConfig | None = None) -> Engine:
        """Load a model and its tokenizer from a directory or a hub id; raises `ModelError`."""
        from engine.execution.model_runner import ModelRunner
        from engine.loading.hub import resolve_model
        from engine.tokenization.tokenizer import Tokenizer

        config = config or EngineConfig()
        directory = resolve_model(path_or_id)
        runner, tokenizer = ModelRunner.from_pretrained(directory, config), Tokenizer.from_pretrained(directory)
        # A GPU's largest step was tried before its memory was given away; with `deterministic` a step is a number of
        # equal passes, and what is computed should not hang on a clock.
        is_measured = runner.device.type == "cpu" and not config.deterministic
        return cls(
            runner,
            tokenizer,
            config,
            step_size=PrefillBudgetTuner(candidate_budgets(config.max_num_batched_tokens)) if is_measured else None,
        )

    # Requests in

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence_[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: bytes | str = b"",
    ) -> None:
        """Queue a request; it runs in later steps.

        A higher `priority` is served first, equal ones in order of arrival. Prefixes are shared in the KV cache only
        among requests of one `cache_salt`. One with structured outputs is queued when its grammar is compiled, which
        happens beside the steps. Raises `RequestRejected` for what can never run here and `RequestFailed` for what went
        wrong with it unexpectedly; then nothing is queued.
        """
        try:
            max_tokens = self._check(request_id, prompt_token_ids, params)
            salt = cache_salt.encode("utf-8", "surrogatepass") if isinstance(cache_salt, str) else cache_salt
            request = Request(request_id, list(prompt_token_ids), params, max_tokens=max_tokens, salt=salt)
            arrival = next(self._arrivals)
            for index in range(params.n):
                sampling = self._sampling_state(request, index)
                scanner = self._detokenizer.stop_scanner(params)
                sequence = Sequence(request, sampling, (-priority, arrival, index), scanner)
                sequence.set_rope_length(self.runner.rope_length(sequence.num_prompt, sequence.num_tokens))
                request.sequences.append(sequence)
            if params.structured_outputs is not None:
                self._grammars.put(request, params.structured_outputs)
        except RequestRejected:
            self._num_rejected += 1
            raise
        except EngineError:
            raise
        except Exception as error:
            # Nothing was queued yet: whatever is wrong with this request is nobody else's trouble.
            self._num_rejected += 1
            raise RequestFailed(f"the request could not be queued: {error}") from error
        self._requests[request_id] = request
        if params.structured_outputs is None:
            for sequence in request.sequences:
                self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request now, wherever it is; the next `step` returns what it had. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, "abort")

    def close(self) -> None:
        """End the threads and processes that compile grammars; what waits for one never runs."""
        self._grammars.close()

    def _check(self, request_id: str, prompt: Sequence_[int], params: SamplingParams) -> int:
        """Refuse what can never run; returns the most tokens that the request may generate."""
        if request_id in self._requests:
            raise RequestRejected(f"a request with the id {request_id!r} is already here")
        return self._limits.check(prompt, params)

    def _sampling_state(self, request: Request, index: int) -> SamplingState:
        params = request.params
        stop_tokens_banned_until_min = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_tokens_banned_until_min |= self.runner.eos_token_ids
        return SamplingState(
            params=params,
            seed=_seed(self.config.seed, request.request_id) if params.seed is None else params.seed % 2**64,
            index=index,
            position=len(request.prompt_token_ids),
            stop_tokens_banned_until_min=sorted(stop_tokens_banned_until_min),
            counts=TokenCounts(request.prompt_token_ids) if params.penalized else None,
        )

    # Steps

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` still has something to do or to return."""
        return bool(self._requests or self._ended)

    @property
    def can_step(self) -> bool:
        """Whether `step` has something to do now, and would not only wait for a grammar."""
        scheduler = self.scheduler
        return bool(self._ended or scheduler.running or len(scheduler.waiting) or self._grammars.has_ready)

    @property
    def on_compiled(self) -> Callable[[], None] | None:
        """Called, from any thread, when `can_step` may have become true without a call of the owner's."""
        return self._grammars.on_ready

    @on_compiled.setter
    def on_compiled(self, call: Callable[[], None] | None) -> None:
        self._grammars.on_ready = call

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that ended since the last one, in whatever way.

        Where all requests wait for their grammars, it waits a moment with them. Raises `EngineFailed` when the runner
        is broken for all, never for one request's sake.
        """
        self._take_compiled()
        started = time.perf_counter()
        before = self._num_output_tokens, self._num_computed_tokens
        self._step()
        num_output, num_computed_tokens = self._num_output_tokens - before[0], self._num_computed_tokens - before[1]
        if num_computed_tokens or self._in_flight is not None:
            self._throughput.record(time.perf_counter() - started, num_output, num_computed_tokens)
        ended, self._ended = self._ended, []
        return ended

    def _take_compiled(self) -> None:
        """Queue the requests whose grammar has come, end those whose grammar is refused."""
        for request, error in self._grammars.take(wait=not self.can_step):
            if error is not None:
                self._fail(request, error)
                continue
            for sequence in request.sequences:
                self.scheduler.add(sequence)

    def _step(self) -> None:
        """Start the next step, then take in the last one; where it cannot be started ahead, the other way round."""
        flight, self._in_flight = self._in_flight, None
        if flight is not None and not self.scheduler.needs_no_preemption():
            self._finish_in_flight(flight)
            flight = None
        step = self.scheduler.schedule()
        if flight is None and step.is_empty and not step.preempted and len(self.scheduler.waiting):
            raise EngineFailed("requests are queued, but none can be scheduled")
        if self._supports_overlap and not (step.is_empty or step.needs_host):
            self._in_flight = self._start(step)
        if self._in_flight is not None:
            if flight is not None:
                self._finish_in_flight(flight)
            return
        unfilled: set[int] = set()
        if flight is not None:
            unfilled = self._finish_in_flight_before(flight, step)
        self._run_sync(step, unfilled)

    def _finish_in_flight_before(self, flight: InFlightStep, step: ScheduledStep) -> set[int]:
        """Take in a flight before a step that was scheduled after it; returns the blocks that the step does not fill
        any more, since it loses the items of those sequences that end in the flight."""
        to_fill = [(item, filled_blocks(item, self.config.block_size)) for item in step.scheduled]
        self._finish_in_flight(flight)
        step.scheduled = [item for item in step.scheduled if item.is_current]
        step.multi_step = [item for item in step.multi_step if item.is_current]
        return {block for item, blocks in to_fill if not item.is_current for block in blocks}

    def _run_sync(self, step: ScheduledStep, unfilled: Iterable[int]) -> None:
        """Run a step to its end, all tokens of which are known."""
        started = time.perf_counter()
        flight = None
        if step.multi_step:
            flight = self._start(ScheduledStep(multi_step=step.multi_step, num_steps=step.num_steps))
        scheduled = step.scheduled if flight is not None else [*step.scheduled, *step.multi_step]
        if scheduled:
            outcome = run_isolating_faults(
                scheduled,
                self.config.block_size,
                lambda items: sample_step(self.sampler, items, self._run(items)),
                unfilled=unfilled,
            )
            self._num_output_tokens += self._settle(outcome)
            self._num_computed_tokens += sum(item.end - item.start for item in scheduled)
        if flight is not None:
            self._finish_in_flight(flight)
        elif scheduled:
            self._num_steps += 1
            seconds = time.perf_counter() - started
            num_tokens = sum(item.end - item.start for item in scheduled)
            num_decodes = sum(item.decodes for item in scheduled)
            self.scheduler.decode_steps.record(seconds, 1, only_decodes=num_decodes == num_tokens)
            self.scheduler.prefill_budget.record(num_tokens, num_decodes, seconds)

    def _start(self, step: ScheduledStep) -> InFlightStep | None:
        """Start a step that does not need the host. None where that fails: it is then run as if it did, without a
        burst, and shows who is at fault."""
        try:
            return InFlightStep.start(self.runner, step)
        except torch.AcceleratorError as error:
            raise EngineFailed(f"the device failed: {error}") from error
        except EngineFailed:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model or a kernel raises
            logger.warning("%d steps at once failed, and are tried one by one: %s", step.num_steps, error)
            if step.multi_step and isinstance(error, torch.OutOfMemoryError):
                self.scheduler.memory_backoff.shrink(len(step.multi_step))
        step.scheduled, step.multi_step = [*step.scheduled, *step.multi_step], []
        return None

    def _finish_in_flight(self, flight: InFlightStep) -> None:
        """Wait for what was started, and take in what it brought."""
        sampled = self._wait_for(flight.decoding)
        now = time.perf_counter()
        # It ran after the last one, whenever it was started.
        seconds = now - max(flight.started, self._last_step_end)
        self.scheduler.decode_steps.record(seconds, flight.num_steps, only_decodes=flight.only_decodes)
        self._last_step_end = now
        num_output = sum(
            self._guarded_advance(item.sequence, partial(self._advance_from_in_flight, item=item, sampled=row))
            for item, row in flight.results(sampled)
        )
        self.scheduler.memory_backoff.record_success()
        self._num_steps += flight.num_steps
        self._num_output_tokens += num_output
        self._num_computed_tokens += flight.num_prompt_tokens + num_output

    def _wait_for(self, decoding: PendingTokens) -> npt.NDArray[np.int64]:
        try:
            return decoding.wait()
        except torch.AcceleratorError as error:
            raise EngineFailed(f"the device failed: {error}") from error

    def _run(self, items: Sequence_[ScheduledSequence]) -> torch.Tensor:
        return self._run_batch(Batch([item.entry() for item in items]))

    def _run_batch(self, batch: Batch) -> torch.Tensor:
        try:
            return self.runner.run(batch)
        except torch.AcceleratorError as error:
            raise EngineFailed(f"the device failed: {error}") from error

    def _settle(self, step: IsolatedStep[StepResult]) -> int:
        """Take a step's results in; returns how many tokens were generated."""
        if step.failed and not step.results:
            self._check_runner_alive(*step.failed[0])
        if step.too_many is not None:
            logger.warning("the memory does not suffice for a step of %d tokens: steps become smaller", step.too_many)
            self.scheduler.memory_backoff.shrink(step.too_many)
        else:
            self.scheduler.memory_backoff.record_success()
        for item in [*step.depends_on_failed, *step.retry_smaller]:
            self.scheduler.blocks.evict(filled_blocks(item, self.config.block_size))
            self.scheduler.preempt(item.sequence)
        for item, error in step.failed:
            self._fail(item.sequence.request, RequestFailed(f"the model failed on this request: {error}"))
        return sum(
            self._guarded_advance(outcome.item.sequence, partial(self._advance, outcome=outcome))
            for outcome in step.results
        )

    def _guarded_advance(self, sequence: Sequence, advance: Callable[[Sequence], int]) -> int:
        """Move a sequence on; an error ends its request, and nothing else. Returns how many tokens were generated."""
        if sequence.finished:  # with its request, for another completion's error
            return 0
        try:
            return advance(sequence)
        except RequestFailed as error:
            self._fail(sequence.request, error)
        except Exception as error:  # noqa: BLE001 - one request's error must not end the loop
            self._fail(sequence.request, RequestFailed(f"the completion could not be read: {error}"))
        return 0

    def _check_runner_alive(self, item: ScheduledSequence, error: Exception) -> None:
        """When all of a step fails, find out whether the requests are at fault or the runner is broken.

        A single token runs in the last block that the failed request was to fill, which nobody else relies on.
        """
        block = item.sequence.table.blocks[-1]
        try:
            self._run_batch(Batch([BatchEntry([0], 0, [block], 1)]))
        except Exception as probe_error:
            raise EngineFailed(f"the model runs no request any more: {error}") from probe_error

    def _advance(self, sequence: Sequence, outcome: StepResult) -> int:
        """Move a sequence on by what its step brought; returns how many tokens were generated.

        Raises `RequestFailed` where it cannot go on.
        """
        request, sampled = sequence.request, outcome.sampled
        sequence.num_computed_tokens = outcome.item.end
        request.prompt_logprobs.extend(outcome.prompt_logprobs)
        if not all(math.isfinite(scored.logprob) for scored in outcome.prompt_logprobs):
            raise RequestFailed(NO_NUMBERS)
        if sampled is None:
            if sequence.num_computed_tokens == sequence.num_tokens:
                self._finish(sequence, Stop("length", None))
            return 0
        if sampled.error is not None:
            raise sampled.error
        if sampled.ends:
            self._finish(sequence, Stop("stop", None))
            return 0

        sequence.token_ids.append(sampled.token_id)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        sequence.sampling.advance(sampled.token_id)
        self._check_stop(sequence)
        return 1

    def _advance_from_in_flight(self, sequence: Sequence, item: ScheduledSequence, sampled: Sequence_[int]) -> int:
        """Move a sequence on by what a flight brought: tokens, and a code where it ended without one.

        Raises `RequestFailed`.
        """
        sequence.num_in_flight_tokens -= len(sampled)
        if item.end == sequence.num_tokens and not item.samples:
            self._finish(sequence, Stop("length", None))
            return 0
        tokens = list(itertools.takewhile(lambda token: token >= 0, sampled))
        # Only a stop string can be found before the last token: the device saw to the rest.
        size = len(tokens) if sequence.stop_scanner is None else 1
        num_taken = 0
        while num_taken < len(tokens) and not sequence.finished:
            part = tokens[num_taken : num_taken + size]
            num_taken += len(part)
            sequence.token_ids += part
            sequence.sampling.skip(len(part))
            self.scheduler.blocks.cache_full_blocks(sequence.table, sequence.token_ids, sequence.num_tokens - 1)
            self._check_stop(sequence)
        if num_taken < len(sampled) and sampled[num_taken] in _FAILURES and not sequence.finished:
            raise RequestFailed(_FAILURES[sampled[num_taken]])
        return num_taken

    def _check_stop(self, sequence: Sequence) -> None:
        """See whether the newest token ends the sequence, and whether it may stay where it is."""
        stop = token_stop(sequence, self.runner.eos_token_ids)
        maybe = sequence.stop_scanner is not None and sequence.stop_scanner.feed(sequence.token_ids[-1])
        if stop is not None or maybe:
            self._finish(sequence, stop)
        if not sequence.finished:
            rope_length = self.runner.rope_length(sequence.num_prompt, sequence.num_tokens)
            if rope_length != sequence.rope_length:
                self.scheduler.preempt(sequence)
                sequence.set_rope_length(rope_length)

    # Requests out

    def _finish(self, sequence: Sequence, stop: Stop | None) -> None:
        """End a sequence by a token or the length; without either, only if its text holds a stop string."""
        text, stop_string = self._detokenizer.read(sequence, stop)
        if stop_string is not None:
            stop = Stop("stop", stop_string)
        if stop is None:
            return
        sequence.text = text
        sequence.finish_reason, sequence.stop_reason = stop.finish_reason, stop.stop_reason
        self.scheduler.finish(sequence)
        self.scheduler.lengths.record(sequence.num_prompt, sequence.num_output)
        if sequence.request.finished:
            self._deliver(sequence.request)

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request, with all its completions, for the error of one."""
        if request.finished:
            return
        for sequence in request.sequences:
            # What it computed may be what is wrong.
            self.scheduler.blocks.evict(sequence.table.blocks)
        request.error = str(error)
        request.error_code = "invalid_grammar" if isinstance(error, GrammarError) else "generation_failed"
        self._end(request, "error")

    def _end(self, request: Request, reason: FinishReason) -> None:
        """End whatever of a request is unfinished."""
        self._grammars.discard(request)
        for sequence in request.sequences:
            if sequence.finished:
                continue
            self.scheduler.finish(sequence)
            sequence.finish_reason = reason
            try:
                sequence.text, _ = self._detokenizer.read(sequence, None)
            except Exception as error:  # noqa: BLE001 - the tokens are there, and the reason too
                request.error = request.error or f"the completion could not be read: {error}"
        self._deliver(request)

    def _deliver(self, request: Request) -> None:
        del self._requests[request.request_id]
        output = request.output()
        self._finished[output.finish_reason] += 1
        self._ended.append(output)

    # The whole thing

    def generate(
        self, prompts: Sequence_[Prompt], params: SamplingParams | Sequence_[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete all prompts; the outputs are in their order.

        Prompts are texts or token ids; params are one for all, or one each. A prompt that cannot run comes back with
        the finish reason "error", and the others go on. What `add` had queued runs along; the next `step` returns it.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, not a single text")
        if params is None:
            params = SamplingParams()
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(every)} sampling parameters")

        call = next(self._generated)
        ids = [f"generate-{call}-{place}" for place in range(len(prompts))]
        places = {request_id: place for place, request_id in enumerate(ids)}
        outputs: dict[str, RequestOutput] = {}
        others: list[RequestOutput] = []
        queue = zip(ids, self._tokens_of(prompts), every, strict=True)
        try:
            while len(outputs) < len(ids):
                wanted = max(self.num_requests_wanted(), not self._requests)
                for request_id, tokens, its_params in itertools.islice(queue, wanted):
                    try:
                        if isinstance(tokens, InvalidPrompt):
                            raise tokens
                        self.add(request_id, tokens, its_params)
                    except (InvalidPrompt, RequestRejected, RequestFailed) as error:
                        given = () if isinstance(tokens, InvalidPrompt) else tokens
                        outputs[request_id] = RequestOutput.failed(request_id, given, error.message)
                for output in self.step():
                    if output.request_id in places:
                        outputs[output.request_id] = output
                    else:
                        others.append(output)
        finally:
            for request_id in ids:
                self.abort(request_id)
            self._ended = others + [output for output in self._ended if output.request_id not in places]
        return [outputs[request_id] for request_id in ids]

    def _tokens_of(self, prompts: Sequence_[Prompt]) -> Iterator[Sequence_[int] | InvalidPrompt]:
        """Tokens of each prompt, made shortly before they are needed."""
        for start in range(0, len(prompts), _TOKENIZE_AT_ONCE):
            part = prompts[start : start + _TOKENIZE_AT_ONCE]
            texts = [prompt for prompt in part if isinstance(prompt, str)]
            if texts and self.tokenizer is None:
                encoded: Iterator[list[int] | InvalidPrompt] = itertools.repeat(
                    InvalidPrompt("this model has no tokenizer: prompts must be token ids"), len(texts)
                )
            else:
                encoded = iter(self.tokenizer.encode_batch(texts) if self.tokenizer is not None else [])
            for prompt in part:
                yield next(encoded) if isinstance(prompt, str) else prompt

    # What it is doing

    def num_requests_wanted(self) -> int:
        """How many more typical requests the engine would like to have queued; 0 when it has enough.

        From the KV blocks that a forecast of the running requests leaves, by the lengths that requests turned out to
        have, plus some to fill the places of those about to finish, minus what waits already.
        """
        return max(0, self.scheduler.free_capacity() - self._grammars.num_sequences)

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            compiling=self._grammars.num_sequences,
            kv_blocks=scheduler.blocks.num_blocks,
            kv_blocks_used=scheduler.blocks.num_used,
            steps=self._num_steps,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            output_tokens=self._num_output_tokens,
            computed_tokens=self._num_computed_tokens,
            output_tokens_per_second=self._throughput.output_per_second,
            computed_tokens_per_second=self._throughput.computed_per_second,
            finished=dict(self._finished),
            rejected=self._num_rejected,
        )

    def check(self) -> None:
        """Audit everything between steps; raises AssertionError that says what does not add up."""
        self.scheduler.check()
        running = sum(not s.finished for request in self._requests.values() for s in request.sequences)
        if running != len(self.scheduler.running) + len(self.scheduler.waiting) + self._grammars.num_sequences:
            raise AssertionError("a request's sequence is neither running nor waiting nor compiling")


def _seed(engine_seed: int, request_id: str) -> int:
    """64 bits for a request that brought no seed: the same for the same id, wherever and whenever it runs."""
    digest = hashlib.blake2b(
        request_id.encode("utf-8", "surrogatepass"), digest_size=8, key=str(engine_seed).encode()[:64]
    )
    return int.from_bytes(digest.digest(), "little")
