"""Requests that wait for their grammars, while the steps of the others go on.

    Engine.add ── put ──▶ waits ── its grammar is there, or refused ──▶ take ──▶ the scheduler's queue, or an error
                            │
                            └──── discard: it ended before that, and is not taken

All of it belongs to the engine's thread; threads of the compiler do no more than announce what is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from engine.scheduling.sequence import Request, Status

if TYPE_CHECKING:
    from engine.batch import Runner
    from engine.grammar.compiler import GrammarCompiler
    from engine.grammar.limits import GrammarLimits
    from engine.sampling_params import SamplingParams
    from engine.structured_outputs import StructuredOutputs
    from engine.tokenization.tokenizer import Tokenizer

# Seconds that `take` waits when there is nothing else to do.
_PATIENCE = 0.05


def _may_force(params: SamplingParams) -> bool:
    """Whether text that the grammar demands has but one spelling: not where parameters may ban a token of it."""
    return (
        not params.banned_token_ids
        and params.allowed_token_ids is None
        and not (params.min_tokens and params.stop_token_ids)
    )


class GrammarQueue:
    """Requests with structured outputs, from `Engine.add` until the scheduler has them.

    The first one starts the compiler, and loads what it is made of.
    """

    def __init__(self, tokenizer: Tokenizer | None, runner: Runner, limits: GrammarLimits | None) -> None:
        self.on_ready: Callable[[], None] | None = None
        """Called, from any thread, when there may be something to take."""
        self.num_sequences = 0
        """Completions of all who wait."""
        self._tokenizer = tokenizer
        self._runner = runner
        self._limits = limits
        self._compiler: GrammarCompiler | None = None
        self._waiting: set[Request] = set()
        self._ready: SimpleQueue[Request] = SimpleQueue()
        """Those whose grammar is there, or refused, and some that were discarded; other threads put them in."""

    @property
    def has_ready(self) -> bool:
        return not self._ready.empty()

    def put(self, request: Request, wanted: StructuredOutputs) -> None:
        """Have a grammar compiled for the request, which waits for it; never waits itself."""
        grammar = request.grammar = self._started().request(wanted, forces=_may_force(request.params))
        for sequence in request.sequences:
            sequence.status = Status.COMPILING
        self._waiting.add(request)
        self.num_sequences += len(request.sequences)
        grammar.add_done_callback(lambda _: self._announce(request))

    def discard(self, request: Request) -> None:
        """Forget a request that has ended, if it waits here."""
        if request in self._waiting:
            self._waiting.remove(request)
            self.num_sequences -= len(request.sequences)

    def take(self, *, wait: bool) -> Iterator[tuple[Request, BaseException | None]]:
        """Requests that wait no more: their sequences stand at the beginning of the grammar, or an error says why not.

        With `wait`, a moment is spent on the first of them; those that are not ready cost nothing.
        """
        wait = wait and bool(self._waiting)
        while True:
            try:
                request = self._ready.get(block=wait, timeout=_PATIENCE)
            except Empty:
                return
            wait = False
            if request not in self._waiting:
                continue
            self.discard(request)
            request.clock.compiled()
            assert request.grammar is not None
            error = request.grammar.exception()
            if error is None:
                for sequence in request.sequences:
                    sequence.status = Status.WAITING
                    sequence.sampling.matcher = request.grammar.result().start()
            yield request, error

    def close(self) -> None:
        """End the compiler's threads and processes; what waits for them is never ready."""
        if self._compiler is not None:
            self._compiler.close()

    def _announce(self, request: Request) -> None:
        """From a thread of the compiler's, or at once where the grammar was there."""
        self._ready.put(request)
        if self.on_ready is not None:
            self.on_ready()

    def _started(self) -> GrammarCompiler:
        if self._compiler is None:
            from engine.grammar.compiler import GrammarCompiler
            from engine.grammar.vocabulary import Vocabulary

            assert self._tokenizer is not None
            tokenizer, vocab_size, eos = (
                self._tokenizer.hf_tokenizer,
                self._runner.vocab_size,
                self._runner.eos_token_ids,
            )
            self._compiler = GrammarCompiler(lambda: Vocabulary.of(tokenizer, vocab_size, eos), self._limits)
        return self._compiler
