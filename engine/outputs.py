"""What the engine hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""stop: end of sequence, a stop token or a stop string. length: max_tokens or the context is reached."""

ErrorCode = Literal["invalid_grammar", "generation_failed"]
"""invalid_grammar: the schema, regex or grammar of its structured outputs is wrong or costs too much."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, of the model's own distribution (before temperature and filters)."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]]
    """The most likely tokens, best first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One of a request's `n` completions."""

    index: int
    token_ids: Sequence[int]
    """Every generated token, the end-of-sequence or stop token included."""

    text: str
    """What the tokens say, cut before the stop string or stop token; empty when the engine has no tokenizer."""

    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for end of sequence."""

    logprobs: Sequence[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class CompletionProgress:
    """One of an unfinished request's completions, between two steps."""

    token_ids: Sequence[int]
    """The tokens that are known by now. A token that may end the output is among them."""

    logprobs: Sequence[TokenLogprobs]
    completion: Completion | None
    """The whole, where it has ended before others of its request."""


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Seconds that a request spent in each phase, one after the other; together they are its time in the engine.

    `prefill` ends with the first token, `decode` with the last; what it was preempted is in neither.
    """

    grammar: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    preempted: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request. With `n` of 1 the shortcuts say all; `completions` holds all `n`, in order."""

    request_id: str
    prompt_token_ids: Sequence[int]
    completions: Sequence[Completion]
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    """One for each prompt token; the first has nothing before it and is None."""

    cached_tokens: int = 0
    """Prompt tokens whose keys and values the prefix cache held when the request started."""

    error: str | None = None
    """Why the request failed; then each completion holds what it had until then."""

    error_code: ErrorCode | None = None
    """Which kind of error, where it came up after `add`."""

    timing: RequestTiming | None = field(default=None, compare=False)
    """None where it failed before it was queued. Outputs that differ in this alone are equal."""

    @classmethod
    def failed(cls, request_id: str, prompt_token_ids: Sequence[int], error: str) -> RequestOutput:
        """A request that failed before it ran."""
        return cls(request_id, prompt_token_ids, (Completion(0, (), "", "error"),), error=error)

    @property
    def token_ids(self) -> Sequence[int]:
        return self.completions[0].token_ids

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """The first completion's, unless the request as a whole ended otherwise."""
        if self.error is not None:
            return "error"
        aborted = any(completion.finish_reason == "abort" for completion in self.completions)
        return "abort" if aborted else self.completions[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.completions[0].stop_reason

    @property
    def logprobs(self) -> Sequence[TokenLogprobs] | None:
        return self.completions[0].logprobs


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment. Counters run since it was made; rates cover the last seconds with work."""

    seats: int
    """Completions that the batch holds at most."""

    running: int
    """Completions in the batch."""

    waiting: int
    """Completions queued, preempted ones included."""

    compiling: int
    """Completions that wait for their grammar."""

    kv_blocks: int
    kv_blocks_used: int
    steps: int
    preemptions: int
    prompt_tokens: int
    """Prompt tokens of started completions."""

    cached_prompt_tokens: int
    """Those of them that the prefix cache held."""

    output_tokens: int
    computed_tokens: int
    """Tokens run through the model, recomputed ones included."""

    output_tokens_per_second: float
    computed_tokens_per_second: float
    busy_seconds: float
    """Time inside steps."""

    finished: Mapping[FinishReason, int] = field(default_factory=dict)
    """Requests by how they ended."""

    rejected: int = 0
    """Requests that `add` refused, or failed to queue."""

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens that the prefix cache held, 0 to 1."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def errors(self) -> int:
        return self.finished.get("error", 0)
