"""A request, and the sequences that it becomes in the batch."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from enum import Enum
from typing import TYPE_CHECKING

from engine.outputs import Completion, CompletionProgress, ErrorCode, FinishReason, RequestOutput, TokenLogprobs
from engine.sampling.state import SamplingState, decodes_on_device
from engine.sampling_params import SamplingParams
from engine.scheduling.block_manager import BlockTable
from engine.scheduling.request_clock import RequestClock
from engine.tokenization.stop_strings import StopScanner

if TYPE_CHECKING:
    from engine.grammar.compiler import Compiled


class Status(Enum):
    COMPILING = "compiling"
    """In the `GrammarQueue`. The engine queues it when its grammar is compiled; an abort or an error finishes it."""

    WAITING = "waiting"
    """In the queue, without blocks. The scheduler admits it; an abort finishes it."""

    RUNNING = "running"
    """In the batch, with blocks. The scheduler may preempt it to WAITING; a stop, an abort or an error finishes it."""

    FINISHED = "finished"
    """Without blocks; final."""


class Sequence:
    """One completion on its way: the tokens so far, and how many of them are in the KV cache.

    token_ids   [ prompt ................ | output ........ ] unseen ...
    positions   0 .... num_computed_tokens ..... num_prompt ...... num_tokens ... num_tokens_with_in_flight
                in the KV cache | still to run through the model

    What a started step will have brought counts as if it were there: its keys and values as computed, its tokens, which
    the device alone knows, as unseen. So the next step can be scheduled before the host reads them.
    """

    __slots__ = (
        "admission_id",
        "batch_slot",
        "decodes_on_device",
        "finish_reason",
        "key",
        "logprobs",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_prompt",
        "num_shared",
        "num_started",
        "request",
        "rope_length",
        "sampling",
        "status",
        "stop_reason",
        "stop_scanner",
        "table",
        "text",
        "token_ids",
    )

    def __init__(
        self, request: Request, sampling: SamplingState, key: tuple[int, int, int], stop_scanner: StopScanner | None
    ) -> None:
        self.request = request
        self.sampling = sampling
        self.key = key
        """Order of service, smallest first: (-priority, arrival, index). Unique."""
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        """Tokens that started steps sample. It may turn out that it ended before the last of them."""
        self.num_shared = 0
        """Blocks that it took from the prefix cache when it was last admitted."""
        self.num_started = 0
        """How often it was admitted; above 1 after a preemption."""
        self.batch_slot = self.admission_id = -1
        """Its place in the batch, and the number of its stay there, while it is in it."""
        self.decodes_on_device = decodes_on_device(sampling)
        self.rope_length = 0
        """What `Runner.rope_length` says of it."""
        self.table = BlockTable(salt=request.salt)
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""
        """The output's text, known once it is finished."""
        self.stop_scanner = stop_scanner

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens_with_in_flight(self) -> int:
        """Tokens, with the unseen ones."""
        return len(self.token_ids) + self.num_in_flight_tokens

    @property
    def num_tokens_to_run(self) -> int:
        """Tokens to run before the next one can be sampled: 1 while decoding, 0 if none is left to sample."""
        return self.num_tokens_to_run_from(self.num_computed_tokens)

    def num_tokens_to_run_from(self, start: int) -> int:
        """The same if the tokens before `start` were computed."""
        # The last token that it may have is never run.
        return min(self.num_tokens_with_in_flight, self.num_prompt + max(0, self.max_output - 1)) - start

    @property
    def max_output(self) -> int:
        return self.request.max_tokens

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def scores_prompt(self) -> bool:
        """Whether logits of prompt tokens are still wanted. One sequence collects them for its request."""
        request = self.request
        return (
            request.params.prompt_logprobs is not None
            and self.sampling.index == 0
            and len(request.prompt_logprobs) < self.num_prompt - 1
        )

    def prompt_logits(self, start: int, end: int) -> int:
        """How many of the last tokens among `start .. end` must yield logits for prompt log-probabilities."""
        if not self.scores_prompt:
            return 0
        return max(0, end - max(start, len(self.request.prompt_logprobs)))

    def set_rope_length(self, rope_length: int) -> None:
        """For a sequence without blocks: keys that turn by another length are not shared."""
        self.rope_length = rope_length
        self.table.salt = (self.request.salt, rope_length) if rope_length else self.request.salt

    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def priority(self) -> int:
        return -self.key[0]

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            index=self.sampling.index,
            token_ids=self.output_token_ids(),
            text=self.text,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs if self.request.params.logprobs is not None else None,
        )


class Request:
    """A prompt with its parameters, and its `n` sequences."""

    __slots__ = (
        "cached_tokens",
        "clock",
        "error",
        "error_code",
        "grammar",
        "max_tokens",
        "params",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "salt",
        "sequences",
    )

    def __init__(
        self, request_id: str, prompt_token_ids: Sequence_[int], params: SamplingParams, *, max_tokens: int, salt: bytes
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.max_tokens = max_tokens
        """What `params.max_tokens` comes to within context and cache."""
        self.salt = salt
        self.sequences: list[Sequence] = []
        self.cached_tokens = 0
        self.clock = RequestClock()
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens from the second on, as far as they are known. The first sequence collects them."""
        self.error: str | None = None
        self.error_code: ErrorCode | None = None
        self.grammar: Compiled | None = None
        """Of its structured outputs; it is queued when that is there."""

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def progress(self) -> list[CompletionProgress]:
        """What each sequence has generated so far."""
        return [
            CompletionProgress(
                sequence.output_token_ids(),
                tuple(sequence.logprobs),
                sequence.completion() if sequence.finished else None,
            )
            for sequence in self.sequences
        ]

    def output(self) -> RequestOutput:
        """The outcome of a finished request."""
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            completions=tuple(sequence.completion() for sequence in self.sequences),
            prompt_logprobs=(None, *self.prompt_logprobs) if self.params.prompt_logprobs is not None else None,
            cached_tokens=self.cached_tokens,
            error=self.error,
            error_code=self.error_code,
            timing=self.clock.timing(),
        )
