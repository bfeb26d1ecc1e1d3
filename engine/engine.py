"""The engine: ids in, ids out (and text, where there is a tokenizer)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from pathlib import Path
from typing import TYPE_CHECKING

from engine.batch import Runner
from engine.config import EngineConfig
from engine.errors import EngineError, RequestFailed, RequestRejected
from engine.loop.detokenizer import Detokenizer
from engine.loop.generate import Prompt, generate
from engine.loop.request_tracker import RequestTracker
from engine.loop.settling import Settler
from engine.loop.step_loop import StepLoop
from engine.outputs import CompletionProgress, EngineStats, RequestOutput
from engine.sampling.sampler import Sampler
from engine.sampling.state import SamplingState
from engine.sampling.token_counts import TokenCounts
from engine.sampling_params import SamplingParams
from engine.scheduling.admission import LengthStatistics
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.decode_steps import DecodeStepPolicy
from engine.scheduling.grammar_queue import GrammarQueue
from engine.scheduling.prefill_budget import PrefillBudgetTuner, candidate_budgets
from engine.scheduling.request_limits import RequestLimits
from engine.scheduling.scheduler import Scheduler, SchedulerLimits
from engine.scheduling.sequence import Request, Sequence

if TYPE_CHECKING:
    from engine.grammar.limits import GrammarLimits
    from engine.parallel.runner import TensorParallelRunner
    from engine.tokenization.tokenizer import Tokenizer

# Floats that the prompt log-probabilities of one step may take (256 MiB).
_MAX_PROMPT_LOGITS = 2**26


class Engine:
    """Generates completions, batching continuously over one runner.

        add ──▶ queued, after its grammar if it has one ──▶ step, step ...: schedule, run, sample, settle ──▶ outputs

    `generate` takes prompts and returns when all are finished. A service uses `add`, `step` and `abort` instead, and
    `num_requests_wanted` to know when to add more. One thread owns an engine: no two methods may run at once.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        *,
        grammar_limits: GrammarLimits | None = None,
        prefill_budget: PrefillBudgetTuner | None = None,
    ) -> None:
        """Without a `prefill_budget`, prompts fill each step up to `max_num_batched_tokens`."""
        self.runner = runner
        self.tokenizer = tokenizer
        """The model's tokenizer; None where it has none, and then prompts must be token ids."""
        self.config = config
        blocks = BlockManager(runner.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            blocks,
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_prompt_logits=max(1, _MAX_PROMPT_LOGITS // runner.vocab_size),
            ),
            LengthStatistics(runner.max_model_len),
            DecodeStepPolicy(1 if config.deterministic else config.decode_steps, runner.rope_length),
            prefill_budget or PrefillBudgetTuner([config.max_num_batched_tokens]),
        )
        self.sampler = Sampler(runner.vocab_size, row_by_row=config.deterministic)
        self._limits = RequestLimits(
            vocab_size=runner.vocab_size,
            context=runner.max_model_len,
            cache=blocks.num_blocks * config.block_size,
            has_tokenizer=tokenizer is not None,
        )
        self._detokenizer = Detokenizer(tokenizer)
        self._grammars = GrammarQueue(tokenizer, runner, grammar_limits)
        self._tracker = RequestTracker(self.scheduler, self._grammars, self._detokenizer)
        self._loop = StepLoop(
            runner,
            self.scheduler,
            self.sampler,
            Settler(runner, self.scheduler, self._tracker),
            supports_overlap=runner.supports_overlap and not config.deterministic,
        )
        self._arrivals = itertools.count()
        self._generate_calls = itertools.count()
        self._num_rejected = 0

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, config: EngineConfig | None = None) -> Engine:
        """Load a model and its tokenizer from a directory, a GGUF file or a hub id; raises `ModelError`."""
        from engine.execution.model_runner import ModelRunner
        from engine.loading.hub import resolve_model
        from engine.loading.tokenizer import load_tokenizer

        config = config or EngineConfig()
        path = resolve_model(path_or_id)
        tokenizer = load_tokenizer(path)
        runner: ModelRunner | TensorParallelRunner
        if config.tensor_parallel_size == 1:
            runner = ModelRunner.from_pretrained(path, config)
        else:
            from engine.parallel.runner import TensorParallelRunner

            runner = TensorParallelRunner.from_pretrained(path, config)
        # A GPU's largest step was tried before its memory was given away; with `deterministic` a step is a number of
        # equal passes, and its result must not depend on a clock.
        is_tuned = runner.device.type == "cpu" and not config.deterministic
        return cls(
            runner,
            tokenizer,
            config,
            prefill_budget=PrefillBudgetTuner(candidate_budgets(config.max_num_batched_tokens)) if is_tuned else None,
        )

    @property
    def max_model_len(self) -> int:
        """Positions a sequence may have, prompt and output together."""
        return self.runner.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.runner.vocab_size

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
            if request_id in self._tracker:
                raise RequestRejected(f"a request with the id {request_id!r} is already here")
            max_tokens = self._limits.check(prompt_token_ids, params)
            salt = cache_salt.encode("utf-8", "surrogatepass") if isinstance(cache_salt, str) else cache_salt
            request = Request(request_id, list(prompt_token_ids), params, max_tokens=max_tokens, salt=salt)
            arrival = next(self._arrivals)
            for index in range(params.n):
                request.sequences.append(self._sequence(request, index, (-priority, arrival, index)))
            self._tracker.add(request)
        except RequestRejected:
            self._num_rejected += 1
            raise
        except EngineError:
            raise
        except Exception as error:
            # Nothing is queued yet: the error is this request's alone.
            self._num_rejected += 1
            raise RequestFailed(f"the request could not be queued: {error}") from error

    def _sequence(self, request: Request, index: int, key: tuple[int, int, int]) -> Sequence:
        scanner = self._detokenizer.stop_scanner(request.params)
        sequence = Sequence(request, self._sampling_state(request, index), key, scanner)
        sequence.set_rope_length(self.runner.rope_length(sequence.num_prompt, sequence.num_tokens))
        return sequence

    def _sampling_state(self, request: Request, index: int) -> SamplingState:
        params = request.params
        stop_tokens = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_tokens |= self.runner.eos_token_ids
        return SamplingState(
            params=params,
            seed=_seed(self.config.seed, request.request_id) if params.seed is None else params.seed % 2**64,
            index=index,
            position=len(request.prompt_token_ids),
            stop_tokens_banned_until_min=sorted(stop_tokens),
            counts=TokenCounts(request.prompt_token_ids) if params.penalized else None,
        )

    def progress(self, request_id: str) -> list[CompletionProgress]:
        """What each completion of an unfinished request has generated; empty where it is finished or unknown."""
        return self._tracker.progress(request_id)

    def abort(self, request_id: str) -> None:
        """End a request now, wherever it is; the next `step` returns what it had. Unknown ids are ignored."""
        self._tracker.abort(request_id)

    def close(self) -> None:
        """End the threads and processes that compile grammars, and other ranks; what is unfinished never runs."""
        self._grammars.close()
        self.runner.close()

    # Steps

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` still has something to do or to return."""
        return bool(len(self._tracker) or self._tracker.has_outputs)

    @property
    def can_step(self) -> bool:
        """Whether `step` has something to do now, and would not only wait for a grammar."""
        scheduler = self.scheduler
        return bool(
            self._tracker.has_outputs or scheduler.running or len(scheduler.waiting) or self._grammars.has_ready
        )

    @property
    def on_compiled(self) -> Callable[[], None] | None:
        """Called, from any thread, when `can_step` may have become true without a call of the owner's."""
        return self._grammars.on_ready

    @on_compiled.setter
    def on_compiled(self, call: Callable[[], None] | None) -> None:
        self._grammars.on_ready = call

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that ended since the last one, by a stop, an abort or an error.

        Where all requests wait for their grammars, it waits a moment with them. Raises `EngineFailed` when the runner
        is broken for all, never for one request's sake.
        """
        self._tracker.take_compiled(wait=not self.can_step)
        self._loop.step()
        return self._tracker.take_outputs()

    def raise_if_broken(self) -> None:
        """Raise `EngineFailed` where a step would, and that is known without one: a rank has ended."""
        self.runner.raise_if_broken()

    def generate(
        self, prompts: Sequence_[Prompt], params: SamplingParams | Sequence_[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete all prompts; the outputs are in their order.

        Prompts are texts or token ids; params are one for all, or one each. A prompt that cannot run comes back with
        the finish reason "error", and the others go on. What `add` had queued runs along; the next `step` returns it.
        """
        return generate(self, self._tracker, prompts, params, id_prefix=f"generate-{next(self._generate_calls)}")

    # What it is doing

    def num_requests_wanted(self, *, ahead: int = 0) -> int:
        """How many more typical requests the engine would like to have queued; 0 when it has enough.

        From the KV blocks that a forecast of the running requests leaves, by the lengths that requests turned out to
        have, plus some to fill the places of those about to finish, minus what waits already. `ahead`: sequences that
        may finish before the caller can add more.
        """
        return max(0, self.scheduler.free_capacity(ahead) - self._grammars.num_sequences)

    def running_request_ids(self) -> set[str]:
        """Requests with a sequence in the batch. May be called from any thread."""
        return {sequence.request.request_id for sequence in self.scheduler.running}

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment."""
        scheduler, throughput = self.scheduler, self._loop.throughput
        return EngineStats(
            seats=self.config.max_num_seqs,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            compiling=self._grammars.num_sequences,
            kv_blocks=scheduler.blocks.num_blocks,
            kv_blocks_used=scheduler.blocks.num_used,
            steps=throughput.num_steps,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            output_tokens=throughput.num_output_tokens,
            computed_tokens=throughput.num_computed_tokens,
            output_tokens_per_second=throughput.output_per_second,
            computed_tokens_per_second=throughput.computed_per_second,
            busy_seconds=throughput.busy_seconds,
            finished=dict(self._tracker.num_finished),
            rejected=self._num_rejected,
        )

    def check(self) -> None:
        """Audit everything between steps; raises AssertionError that says what does not add up."""
        self.scheduler.check()
        self._tracker.check()


def _seed(engine_seed: int, request_id: str) -> int:
    """64 bits for a request that brought no seed: the same for the same id, wherever and whenever it runs."""
    digest = hashlib.blake2b(
        request_id.encode("utf-8", "surrogatepass"), digest_size=8, key=str(engine_seed).encode()[:64]
    )
    return int.from_bytes(digest.digest(), "little")
