"""The one thread that steps the engine.

    submit ──▶ inbox ──▶ engine.add ──▶ engine.step ──▶ outcomes ──▶ on_outcome (the writer)
    abort  ──▶ inbox ──▶ engine.abort

Only this thread touches the engine; the claim loop fills the inbox. Prompts become tokens on the claim loop's thread,
so that tokenization runs beside a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from engine import Completion, Engine, RequestOutput
from engine.errors import EngineError, InvalidParams, RequestFailed, RequestRejected
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import ClaimToken, Outcome
from jobs.requests import ModelLimits
from worker.generation import responses
from worker.generation.answer_parts import AnswerParts, reasoning_tokens
from worker.generation.line_timing import line_timing
from worker.generation.live import LiveAnswers
from worker.generation.logprobs import openai_logprobs
from worker.generation.prompts import PreparedRequest, PromptPreparer
from worker.generation.turnover import Turnover

if TYPE_CHECKING:
    from engine.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 10.0  # seconds for the step that is under way
IDLE_CHECK = 1.0  # seconds after which an engine without work is asked whether it could do any
MOST_LIVE = 256  # live requests that are queued beyond what the engine has room for
LIVE_PRIORITY = 1

LoadEngine = Callable[[], Engine]


class OnFatal(Protocol):
    """The model did not load, or the engine cannot go on; `is_understood` where the error's message says it all."""

    def __call__(self, error: BaseException, *, is_understood: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineCallbacks:
    """What the engine thread calls, on its own thread unless said otherwise."""

    on_outcome: Callable[[Outcome], None]
    """A request ended; on the submitting thread where it was refused."""
    on_preparing: Callable[[], None]
    """On the submitting thread: a piece of rendering or tokenization begins."""
    on_capacity: Callable[[], None]
    """Requests finished and the engine wants more."""
    on_idle: Callable[[], None]
    """Requests finished, and none is left."""
    on_fatal: OnFatal
    """The last call."""
    on_loaded: Callable[[ModelLimits], None] = lambda limits: None
    """The model is loaded."""
    on_step: Callable[[float], None] = lambda seconds: None
    """A step ended, and took so many seconds."""


class EngineThread:
    """Loads an engine and steps it until it is closed or breaks."""

    def __init__(
        self,
        load: LoadEngine,
        callbacks: EngineCallbacks,
        *,
        model: str,
        share_prefixes: bool,
        times_lines: bool = True,
        live: LiveAnswers | None = None,
    ) -> None:
        """`live` is told of the progress of requests whose callers wait. `times_lines`: see `line_timing.py`."""
        self._load = load
        self._live = live
        self._callbacks = callbacks
        self._model = model
        self._share_prefixes = share_prefixes
        self._times_lines = times_lines
        self._engine: Engine | None = None
        self.limits: ModelLimits | None = None
        """The model's, once it is loaded."""
        self._preparer: PromptPreparer | None = None
        self._turnover = Turnover()
        self._changed = threading.Condition()
        # Guarded by _changed: what other threads put in and read off.
        self._inbox: list[PreparedRequest] = []
        self._aborts: list[str] = []
        self._held: dict[str, PreparedRequest] = {}
        self._capacity = 0
        self._closing = False
        self._is_broken = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load the model. Returns at once."""
        self._thread.start()

    # What other threads call

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The loaded model's, which threads may share."""
        return None if self._engine is None else self._engine.tokenizer

    def free_capacity(self) -> int:
        """How many more requests the engine wants queued now."""
        with self._changed:
            return max(0, self._capacity - len(self._inbox))

    def live_capacity(self) -> int:
        """How many more live requests may be queued, even into a full engine: other requests yield to them."""
        with self._changed:
            return MOST_LIVE - sum(prepared.request.is_live for prepared in self._held.values())

    def abort_job(self, job_id: UUID) -> None:
        """Drop the requests of a job: its caller hung up."""
        self.abort([request for request in self.held() if request.job_id == job_id])

    def held(self) -> list[ClaimedRequest]:
        """The requests that are in the engine or on their way to it."""
        with self._changed:
            return [prepared.request for prepared in self._held.values()]

    def submit(self, requests: Sequence[ClaimedRequest]) -> Sequence[ClaimedRequest]:
        """Turn requests into tokens, on the caller's thread, and queue them. Those that cannot be are refused.

        Returns those that were not taken and may be claimed again later.
        """
        assert self._preparer is not None
        if self._live is not None:
            self._live.open(requests)
        preparation = self._preparer.prepare(requests)
        if self._live is not None and preparation.postponed:
            self._live.forget(preparation.postponed)
        for outcome in preparation.refused:
            self._callbacks.on_outcome(outcome)
        with self._changed:
            self._held.update({item.request.name: item for item in preparation.prepared})
            self._inbox.extend(preparation.prepared)
            self._changed.notify_all()
        return preparation.postponed

    def abort(self, requests: Sequence[ClaimedRequest]) -> None:
        """Drop requests without an outcome: this worker's claims of them are over."""
        names = {request.name for request in requests}
        if self._live is not None:
            self._live.forget(requests)
        with self._changed:
            self._inbox = [prepared for prepared in self._inbox if prepared.request.name not in names]
            self._aborts.extend(name for name in names if self._held.pop(name, None) is not None)
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is held. False where the engine broke, or that took longer than `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._is_broken, timeout)
            return not self._held

    def close(self) -> None:
        """Step no more. What is held stays unfinished."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=CLOSE_TIMEOUT)
        if self._engine is not None:
            self._engine.close()

    def stalled_for(self) -> float:
        """Seconds since the step that is under way began; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def in_preparation(self) -> list[ClaimToken]:
        """The requests that are being rendered or tokenized now: if that hangs, one of these is to blame."""
        return [] if self._preparer is None else [request.token for request in self._preparer.in_work]

    def suspects(self) -> list[ClaimToken]:
        """The requests that the engine computes now: if it breaks, one of these is to blame."""
        engine = self._engine
        started = set() if engine is None else engine.running_request_ids()
        with self._changed:
            return [item.request.token for name, item in self._held.items() if name in started]

    def stats(self) -> dict[str, object]:
        """The engine's counters, for the worker's row."""
        return {} if self._engine is None else asdict(self._engine.stats())

    # The engine thread

    def _run(self) -> None:
        try:
            engine = self._engine = self._load()
            engine.on_compiled = self._wake
            model = self.limits = ModelLimits(self._model, engine.max_model_len, engine.vocab_size)
            self._preparer = PromptPreparer(model, engine.tokenizer, on_progress=self._callbacks.on_preparing)
            self._publish_capacity(engine)
            self._callbacks.on_loaded(model)
            while self._wait_for_work(engine):
                self._take_in(engine)
                self._step(engine)
                self._publish_capacity(engine)
        except BaseException as error:  # noqa: BLE001 - fatal, of any kind: the engine thread ends here
            with self._changed:
                self._is_broken = True
                self._changed.notify_all()
            self._callbacks.on_fatal(error, is_understood=isinstance(error, EngineError))

    def _wait_for_work(self, engine: Engine) -> bool:
        with self._changed:
            while not self._changed.wait_for(
                lambda: self._closing or self._inbox or self._aborts or engine.can_step, timeout=IDLE_CHECK
            ):
                engine.raise_if_broken()
            return not self._closing

    def _wake(self) -> None:
        """From any thread: a request's grammar is compiled."""
        with self._changed:
            self._changed.notify_all()

    def _take_in(self, engine: Engine) -> None:
        with self._changed:
            inbox, self._inbox = self._inbox, []
            self._capacity -= len(inbox)  # an estimate until the engine is asked again, after the step
            aborts, self._aborts = self._aborts, []
        if inbox and not engine.has_unfinished:
            self._turnover.begin()
        for prepared in inbox:
            request = prepared.request
            try:
                engine.add(
                    request.name,
                    prepared.token_ids,
                    prepared.params,
                    priority=LIVE_PRIORITY if request.is_live else 0,
                    cache_salt="" if self._share_prefixes else request.tenant_id.hex,
                )
            except (RequestRejected, InvalidParams) as error:
                self._settle(request.name, responses.refused(request, error.message, code="invalid_request"))
            except RequestFailed as error:
                self._settle(request.name, responses.broken(request, error.message))
        for name in aborts:
            engine.abort(name)

    def _step(self, engine: Engine) -> None:
        if not engine.has_unfinished:
            return
        began = self._step_began = time.monotonic()
        try:
            outputs = engine.step()
        finally:
            self._step_began = None
        self._callbacks.on_step(time.monotonic() - began)
        self._turnover.count(sum(len(output.completions) for output in outputs))
        self._stream(engine)
        for output in outputs:
            with self._changed:
                prepared = self._held.get(output.request_id)
            if prepared is not None and output.finish_reason != "abort":
                self._settle(output.request_id, self._timed(prepared, output, self._outcome(prepared, output)))
        if outputs and not self._held:
            self._callbacks.on_idle()

    def _stream(self, engine: Engine) -> None:
        """Hand on what streaming requests have generated."""
        if self._live is None or engine.tokenizer is None:
            return
        with self._changed:
            live = [prepared for prepared in self._held.values() if prepared.request.is_live]
        for prepared in live:
            params = prepared.params
            # An echoed prompt is decoded as one with its answer, so both come when it is whole.
            if params.echo or not self._live.is_streaming(prepared.request.token):
                continue
            progress = engine.progress(prepared.request.name)
            if progress:
                self._live.progress(
                    prepared.request.token,
                    progress,
                    decode=partial(engine.tokenizer.decode, skip_special_tokens=params.skip_special_tokens),
                    tokens=engine.tokenizer,
                    stop=params.stop,
                    form=prepared.form if prepared.is_chat else None,
                    wants_logprobs=params.logprobs is not None,
                )

    def _settle(self, name: str, outcome: Outcome) -> None:
        # To the writer first: a worker that looks idle has nothing left to hand over.
        self._callbacks.on_outcome(outcome)
        with self._changed:
            self._held.pop(name, None)
            self._changed.notify_all()

    def _timed(self, prepared: PreparedRequest, output: RequestOutput, outcome: Outcome) -> Outcome:
        if output.timing is None or not self._times_lines:
            return outcome
        return replace(outcome, timing=line_timing(output.timing, taken_at=prepared.taken_at, ended=time.monotonic()))

    def _outcome(self, prepared: PreparedRequest, output: RequestOutput) -> Outcome:
        if output.error is not None and output.error_code == "invalid_grammar":
            return responses.refused(prepared.request, output.error, code="invalid_grammar")
        if output.error is not None:
            return responses.broken(prepared.request, output.error)
        answer = responses.Answer(
            choices=[self._choice(prepared, output, completion) for completion in output.completions],
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.cached_tokens,
            completion_tokens=sum(len(completion.token_ids) for completion in output.completions),
            reasoning_tokens=self._reasoning_tokens(prepared, output),
        )
        return responses.completed(prepared.request, self._model, answer, is_chat=prepared.is_chat)

    def _choice(self, prepared: PreparedRequest, output: RequestOutput, completion: Completion) -> responses.Choice:
        assert self._engine is not None
        logprobs = None
        if completion.logprobs is not None:
            logprobs = openai_logprobs(
                completion.logprobs,
                completion.text,
                self._engine.tokenizer,
                is_chat=prepared.is_chat,
                prompt=() if output.prompt_logprobs is None else output.prompt_logprobs,
                first_token=output.prompt_token_ids[0],
            )
        if not prepared.is_chat:
            return responses.Choice(completion.text, completion.finish_reason, logprobs)
        parts = AnswerParts(prepared.form, f"{prepared.request.name} {completion.index}")
        parts.feed(completion.text)
        parts.end()
        return responses.Choice(parts.message(), parts.finish_reason(completion.finish_reason), logprobs)

    def _reasoning_tokens(self, prepared: PreparedRequest, output: RequestOutput) -> int:
        assert self._engine is not None
        tokenizer = self._engine.tokenizer
        if tokenizer is None or not prepared.form.thinks:
            return 0
        return sum(
            reasoning_tokens(completion.token_ids, tokenizer.token_bytes, prepared.form)
            for completion in output.completions
        )

    def _publish_capacity(self, engine: Engine) -> None:
        capacity = engine.num_requests_wanted(ahead=self._turnover.ahead)
        with self._changed:
            self._capacity = capacity
        if capacity > 0:
            self._callbacks.on_capacity()
