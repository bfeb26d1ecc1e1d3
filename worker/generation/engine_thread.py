"""The engine's owner: the one thread that steps the engine, and the only module here that knows it.

    submit ──▶ inbox ──▶ engine.add ──▶ engine.step ──▶ outcomes ──▶ on_outcome (the writer)
    abort  ──▶ inbox ──▶ engine.abort

Everything that touches the engine happens on this thread; the claim loop only fills the inbox. Turning text into tokens
happens on the claim loop's side of it, so that it runs beside a step.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import orjson

from engine import Engine, RequestOutput, SamplingParams, StructuredOutputs
from engine.errors import EngineError, InvalidParams, InvalidPrompt, RequestFailed, RequestRejected
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import ClaimToken, Outcome
from jobs.requests import DEFAULT_MAX_TOKENS, ModelLimits
from worker.generation import responses

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 10.0  # seconds for the step that is under way


LoadEngine = Callable[[], Engine]


class Broken(Protocol):
    """The model did not load, or the engine cannot go on; `is_understood` where the error's message says it all."""

    def __call__(self, error: BaseException, *, is_understood: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as the engine takes it."""

    request: ClaimedRequest
    token_ids: list[int]
    params: SamplingParams
    is_chat: bool


@dataclass(frozen=True, slots=True)
class EngineCallbacks:
    """Whom the owner tells, each from the engine thread unless said otherwise."""

    loaded: Callable[[ModelLimits], None]
    """The model is there."""
    outcome: Callable[[Outcome], None]
    """A request came to its end; from the submitting thread too, where it was refused."""
    room: Callable[[], None]
    """Requests finished and the engine wants more."""
    idle: Callable[[], None]
    """Requests finished, and none is left."""
    broken: Broken
    """Nothing follows this."""


class EngineThread:
    """Loads an engine and steps it until it is closed or breaks."""

    def __init__(self, load: LoadEngine, listeners: EngineCallbacks, *, model: str, share_prefixes: bool) -> None:
        self._load = load
        self._listeners = listeners
        self._model = model
        self._share_prefixes = share_prefixes
        self._engine: Engine | None = None
        self._changed = threading.Condition()
        # Guarded by _changed: what other threads put in and read off.
        self._inbox: list[Prepared] = []
        self._aborts: list[str] = []
        self._held: dict[str, Prepared] = {}
        self._room = 0
        self._closing = False
        self._is_broken = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load the model. Returns at once."""
        self._thread.start()

    # What other threads call

    def room(self) -> int:
        """How many more requests the engine wants queued now."""
        with self._changed:
            return max(0, self._room - len(self._inbox))

    def held(self) -> list[ClaimedRequest]:
        """The requests that are in the engine or on their way to it."""
        with self._changed:
            return [prepared.request for prepared in self._held.values()]

    def submit(self, requests: Sequence[ClaimedRequest]) -> None:
        """Turn requests into tokens, on the caller's thread, and queue them. Those that cannot be are refused."""
        prepared = self._prepare(requests)
        with self._changed:
            self._held.update({item.request.name: item for item in prepared})
            self._inbox.extend(prepared)
            self._changed.notify_all()

    def abort(self, requests: Sequence[ClaimedRequest]) -> None:
        """Forget requests: their outcome is somebody else's now."""
        names = {request.name for request in requests}
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

    def suspects(self) -> list[ClaimToken]:
        """What the engine computes now: whatever breaks it, it was one of these."""
        engine = self._engine
        started = set() if engine is None else {sequence.request.request_id for sequence in engine.scheduler.running}
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
            self._publish_room(engine)
            self._listeners.loaded(ModelLimits(self._model, engine.runner.max_model_len, engine.runner.vocab_size))
            while self._wait_for_work(engine):
                self._take_in(engine)
                self._step(engine)
                self._publish_room(engine)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody steps the engine any more
            with self._changed:
                self._is_broken = True
                self._changed.notify_all()
            self._listeners.broken(error, is_understood=isinstance(error, EngineError))

    def _wait_for_work(self, engine: Engine) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._inbox or self._aborts or engine.can_step)
            return not self._closing

    def _wake(self) -> None:
        """From any thread: a request's grammar is compiled."""
        with self._changed:
            self._changed.notify_all()

    def _take_in(self, engine: Engine) -> None:
        with self._changed:
            inbox, self._inbox = self._inbox, []
            self._room -= len(inbox)  # until it is looked at again, after the step
            aborts, self._aborts = self._aborts, []
        for prepared in inbox:
            request = prepared.request
            try:
                engine.add(
                    request.name,
                    prepared.token_ids,
                    prepared.params,
                    priority=request.priority,
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
        self._step_began = time.monotonic()
        try:
            outputs = engine.step()
        finally:
            self._step_began = None
        for output in outputs:
            with self._changed:
                prepared = self._held.get(output.request_id)
            if prepared is not None and output.finish_reason != "abort":
                self._settle(output.request_id, self._outcome(prepared, output))
        if outputs and not self._held:
            self._listeners.idle()

    def _settle(self, name: str, outcome: Outcome) -> None:
        # To the writer first: a worker that looks idle has nothing left to hand over.
        self._listeners.outcome(outcome)
        with self._changed:
            self._held.pop(name, None)
            self._changed.notify_all()

    def _outcome(self, prepared: Prepared, output: RequestOutput) -> Outcome:
        if output.error is not None and output.error_code == "invalid_grammar":
            return responses.refused(prepared.request, output.error, code="invalid_grammar")
        if output.error is not None:
            return responses.broken(prepared.request, output.error)
        answer = responses.Answer(
            text=output.text,
            finish_reason=output.finish_reason,
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.cached_tokens,
            completion_tokens=len(output.token_ids),
            logprobs=output.logprobs,
        )
        return responses.completed(prepared.request, self._model, answer, is_chat=prepared.is_chat)

    def _publish_room(self, engine: Engine) -> None:
        room = engine.room()
        with self._changed:
            self._room = room
        if room > 0:
            self._listeners.room()

    # From stored lines to tokens, on the claim loop's thread

    def _prepare(self, requests: Sequence[ClaimedRequest]) -> list[Prepared]:
        bodies = [_parsed(request.body) for request in requests]
        prepared = []
        for request, body, token_ids in zip(requests, bodies, self._tokens(bodies), strict=True):
            try:
                if isinstance(token_ids, InvalidPrompt):
                    raise token_ids
                params = self._params(request, body, len(token_ids))
            except (InvalidPrompt, InvalidParams) as error:
                self._listeners.outcome(responses.refused(request, error.message, code="invalid_request"))
            except ContextExceeded as error:
                self._listeners.outcome(responses.refused(request, str(error), code="context_length_exceeded"))
            except Exception as error:  # noqa: BLE001 - one line must end neither this worker nor its neighbours
                kind = type(error).__name__  # what it says may quote the prompt
                logger.error("request %s cannot be prepared: %s", request.name, kind)
                self._listeners.outcome(responses.broken(request, f"this worker cannot prepare the request: {kind}"))
            else:
                prepared.append(Prepared(request, token_ids, params, is_chat="messages" in body))
        return prepared

    def _tokens(self, bodies: Sequence[dict[str, Any]]) -> list[list[int] | InvalidPrompt]:
        assert self._engine is not None
        tokenizer = self._engine.tokenizer
        tokens: dict[int, list[int] | InvalidPrompt] = {
            place: body["prompt"] for place, body in enumerate(bodies) if isinstance(body.get("prompt"), list)
        }
        prompts = {place: body["prompt"] for place, body in enumerate(bodies) if isinstance(body.get("prompt"), str)}
        chats = {place: body["messages"] for place, body in enumerate(bodies) if "messages" in body}
        if tokenizer is None:
            refusal = InvalidPrompt(f"{self._model} has no tokenizer: send token ids as the prompt")
            tokens |= dict.fromkeys([*prompts, *chats], refusal)
        else:
            tokens |= zip(prompts, tokenizer.encode_batch(list(prompts.values())), strict=True)
            tokens |= zip(chats, tokenizer.encode_chat_batch(list(chats.values())), strict=True)
        neither = InvalidPrompt("the stored line holds neither a prompt nor messages that this worker understands")
        return [tokens.get(place, neither) for place in range(len(bodies))]

    def _params(self, request: ClaimedRequest, body: dict[str, Any], prompt_tokens: int) -> SamplingParams:
        assert self._engine is not None
        options = {name: value for name, value in body.items() if name not in ("prompt", "messages")}
        context = self._engine.runner.max_model_len
        wanted = options.get("max_tokens", 1)
        if prompt_tokens + wanted > context:
            asked = f" and max_tokens {wanted}" if "max_tokens" in options else " leave no place for an answer and"
            raise ContextExceeded(f"{prompt_tokens} prompt tokens{asked} exceed the context of {context} tokens")
        options.setdefault("max_tokens", min(DEFAULT_MAX_TOKENS, context - prompt_tokens))
        # A request that runs again, after a crash or elsewhere, draws the same tokens again.
        options.setdefault("seed", _seed(request))
        wanted = options.pop("structured_outputs", None)
        return SamplingParams(**options, structured_outputs=None if wanted is None else StructuredOutputs(**wanted))


def _parsed(body: bytes) -> dict[str, Any]:
    """A stored line; empty where it is not what the API writes."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


class ContextExceeded(Exception):
    """A prompt and its answer are longer than the model's context."""


def _seed(request: ClaimedRequest) -> int:
    source = request.job_id.bytes + request.line.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(source, digest_size=8).digest(), "big") >> 1
