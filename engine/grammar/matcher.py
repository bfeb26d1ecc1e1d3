"""Compiled grammars, the position of a completion in one, and masks of the tokens that may come next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher

from engine.errors import GrammarError, RequestFailed
from engine.grammar.vocabulary import Vocabulary, Words

_SHOWN = 300  # characters of the library's message

# Where the parser's state, a backtrace or the grammar with its added lines begins in a message.
_STATE = re.compile(r"<non-verbose/>|<backtrace>|<state>|\n *[0-9]+ \| ")


def grammar_message(message: str) -> str:
    """Return the library's message as one short line, without the parser's state or a backtrace."""
    text = _STATE.split(message, maxsplit=1)[0]
    if text.strip() == "NoExtensionBias":
        return "no text in the model's tokens satisfies it"
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} …"


class Grammar:
    """A compiled grammar. Its completions share the automaton, which grows while they use it."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, num_bytes: int) -> None:
        self.vocabulary = vocabulary
        self.num_bytes = num_bytes
        """Bytes of memory that compilation took."""
        self.is_broken = False
        """Whether a completion hit a limit of the shared automaton; new requests then get a new one."""
        self._matcher = matcher

    def start(self) -> Matcher:
        """Return the matcher of a completion without tokens."""
        return Matcher(self._matcher.deep_copy(), self)


class Matcher:
    """The position of one completion. It advances with each accepted token and survives preemptions."""

    __slots__ = ("_matcher", "grammar")

    def __init__(self, matcher: LLMatcher, grammar: Grammar) -> None:
        self._matcher = matcher
        self.grammar = grammar

    def accept(self, token_id: int) -> None:
        """Advance past a chosen token, unless it is an end of sequence; raises `RequestFailed`."""
        if token_id in self.grammar.vocabulary.eos_token_ids and not self._matcher.validate_tokens([token_id]):
            return
        if not self._matcher.consume_token(token_id):
            raise self.failure()

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next, spelled as the tokenizer does; empty where there is a choice.

        The last few may be left out, where what follows them may change their spelling.
        """
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    @property
    def is_complete(self) -> bool:
        """Whether no token can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def failure(self) -> RequestFailed:
        """Return why the output cannot go on: a `GrammarError` where the grammar costs too much.

        A dead end is no fault of the caller's: the grammar compiled, and another output may satisfy it.
        """
        message = self._matcher.get_error()
        if message.startswith("NoExtensionBias"):
            return RequestFailed("the output cannot be finished: no token of the model continues it in the wanted form")
        self.grammar.is_broken = True
        return GrammarError(f"the grammar is too costly here: {grammar_message(message)}")


@dataclass(frozen=True, slots=True)
class Masks:
    """The tokens that may come next in several completions."""

    words: Words
    """int32 `[completions, words]`; bit `t % 32` of word `t // 32` allows token t."""

    complete: Sequence[int]
    """Places where nothing but the end can follow."""

    failed: dict[int, RequestFailed]
    """Places where the grammar cannot say."""


class MaskFiller:
    """Computes the masks of a step, on as many threads as the machine has cores."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None

    def fill(self, matchers: Sequence[Matcher], ignore_eos: Sequence[bool]) -> Masks:
        """Compute masks, without changing a matcher.

        End-of-sequence tokens are allowed where the output may end, unless `ignore_eos` says otherwise for the place.
        """
        if self._executor is None:
            self._executor = LLExecutor()
        vocabulary = matchers[0].grammar.vocabulary
        words: Words = np.zeros((len(matchers), vocabulary.num_words), dtype=np.int32)
        states = [(matcher._matcher, place) for place, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(states, words.ctypes.data, words.shape[1] * 4, len(matchers))
        word, bit = divmod(vocabulary.end_id, 32)
        may_end = (words[:, word] >> bit & 1).astype(bool)
        words &= vocabulary.real_bits
        # Where the grammar itself names an end-of-sequence token, that is left as it is.
        complete = may_end & ~words.any(axis=1)
        words[may_end & ~np.array(ignore_eos)] |= vocabulary.eos_bits
        failed = {place: m.failure() for place, m in enumerate(matchers) if m._matcher.is_error()}
        return Masks(words, [place for place in np.flatnonzero(complete).tolist() if place not in failed], failed)
