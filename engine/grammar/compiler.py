"""Compile grammars beside the steps, once for all requests with the same one.

    request ──▶ cached? ──▶ queue ──▶ worker thread: trial in its process ──▶ compile here, without the GIL ──▶ Future

Each grammar is compiled twice, because the trial's process may die of it; one that passed costs no more here.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

from llguidance import LLMatcher

from engine.errors import GrammarError
from engine.grammar.limits import GrammarLimits
from engine.grammar.matcher import Grammar, grammar_message
from engine.grammar.source import grammar_text
from engine.grammar.trial_process import TrialFailed, TrialProcess
from engine.grammar.vocabulary import UnreadableVocabulary, Vocabulary
from engine.structured_outputs import StructuredOutputs

Compiled = Future[Grammar]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is compiled, and cached."""

    outputs: StructuredOutputs
    forces: bool


# Bytes that a kept outcome counts for at least.
_LEAST_BYTES = 1 << 16


class GrammarCompiler:
    """Compiled grammars of one vocabulary. Threads and processes start with the first request and end with `close`."""

    def __init__(self, read_vocabulary: Callable[[], Vocabulary], limits: GrammarLimits | None = None) -> None:
        """`read_vocabulary` is called once, on a worker thread, and may raise `UnreadableVocabulary`."""
        self._workshop = _Workshop(read_vocabulary, limits or GrammarLimits())
        self._end = weakref.finalize(self, self._workshop.close)

    def request(self, wanted: StructuredOutputs, *, forces: bool = True) -> Compiled:
        """Return a grammar's future, the same for equal requests; it fails with `GrammarError`. Never waits.

        `forces` as for `grammar_text`; a vocabulary without a tokenizer forces nothing.
        """
        return self._workshop.request(_Wanted(wanted, forces))

    @property
    def num_cached(self) -> int:
        return len(self._workshop.cache)

    @property
    def cached_bytes(self) -> int:
        return self._workshop.cache.num_bytes

    def close(self) -> None:
        """End the threads and their processes. Pending futures fail."""
        self._end()


class _Workshop:
    """State that the worker threads share, apart so that they do not keep `GrammarCompiler` alive."""

    def __init__(self, read_vocabulary: Callable[[], Vocabulary], limits: GrammarLimits) -> None:
        self._read_vocabulary = read_vocabulary
        self._vocabulary: Vocabulary | UnreadableVocabulary | None = None
        self._reading = threading.Lock()
        self._limits = limits
        self._lock = threading.Lock()  # guards the cache and the pending futures
        self.cache = _Cache(limits.cached, limits.cached_bytes)
        self._pending: dict[_Wanted, Compiled] = {}
        self._queue: SimpleQueue[tuple[_Wanted, Compiled] | None] = SimpleQueue()
        self._trials: list[TrialProcess] = []

    def request(self, wanted: _Wanted) -> Compiled:
        with self._lock:
            known = self.cache.get(wanted) or self._pending.get(wanted)
            if known is not None:
                return known
            future: Compiled = Future()
            self._pending[wanted] = future
        if not self._trials:
            self._trials = [TrialProcess(self._limits) for _ in range(self._limits.workers)]
            for trial in self._trials:
                threading.Thread(target=self._work, args=(trial,), name="grammars", daemon=True).start()
        self._queue.put((wanted, future))
        return future

    def close(self) -> None:
        for trial in self._trials:
            self._queue.put(None)
            trial.close()

    def _work(self, trial: TrialProcess) -> None:
        while (task := self._queue.get()) is not None:
            wanted, future = task
            keep = True
            try:
                outcome: Grammar | GrammarError = self._compile(wanted, trial)
            except GrammarError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 - the request would wait for ever
                outcome, keep = GrammarError(f"the grammar could not be compiled: {grammar_message(str(error))}"), False
            with self._lock:
                self._pending.pop(wanted, None)
                if keep:
                    self.cache.put(wanted, future, outcome)
            if isinstance(outcome, Grammar):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def _compile(self, wanted: _Wanted, trial: TrialProcess) -> Grammar:
        vocabulary = self._known_vocabulary()
        name = _NAMES[wanted.outputs.kind]
        try:
            # The trial draws at random, and has no tokenizer to spell with.
            tried = grammar_text(wanted.outputs, forces=False)
            text = grammar_text(wanted.outputs, forces=wanted.forces and vocabulary.can_spell)
        except ValueError as error:
            raise GrammarError(f"not a {name}: {grammar_message(str(error))}") from error
        try:
            verdict = trial.judge(tried, vocabulary)
        except TrialFailed as error:
            raise GrammarError(f"the {name} cannot be compiled: {error}") from error
        if "error" in verdict:
            raise GrammarError(f"the {name} cannot be used: {grammar_message(verdict['error'])}")
        limits = self._limits.parser.for_llguidance()
        matcher = LLMatcher(vocabulary.for_llguidance, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"the {name} cannot be used: {grammar_message(matcher.get_error())}")
        return Grammar(matcher, vocabulary, verdict["bytes"])

    def _known_vocabulary(self) -> Vocabulary:
        with self._reading:
            if self._vocabulary is None:
                try:
                    self._vocabulary = self._read_vocabulary()
                except UnreadableVocabulary as error:
                    self._vocabulary = error
        if isinstance(self._vocabulary, UnreadableVocabulary):
            raise GrammarError(f"this model cannot give structured output: {self._vocabulary}")
        return self._vocabulary


_NAMES = {
    "json": "JSON schema",
    "json_object": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "grammar": "grammar",
}


class _Cache:
    """Grammars and refusals, the least recently used dropped first; bounded in number and bytes."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Wanted, tuple[Compiled, Grammar | None, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, wanted: _Wanted) -> Compiled | None:
        entry = self._entries.get(wanted)
        if entry is None:
            return None
        future, grammar, _ = entry
        if grammar is not None and grammar.is_broken:
            self._drop(wanted)
            return None
        self._entries.move_to_end(wanted)
        return future

    def put(self, wanted: _Wanted, future: Compiled, outcome: Grammar | GrammarError) -> None:
        grammar = outcome if isinstance(outcome, Grammar) else None
        size = max(_LEAST_BYTES, len(wanted.outputs.source) + (0 if grammar is None else grammar.num_bytes))
        self._entries[wanted] = (future, grammar, size)
        self.num_bytes += size
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, wanted: _Wanted) -> None:
        self.num_bytes -= self._entries.pop(wanted)[2]
