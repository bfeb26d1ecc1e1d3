"""Text of an output that is still being generated, in pieces that no later token takes back.

    tokens ──decode──▶ … committed | new text | may become a character, or begins a stop string
                                     └─ given out

Pieces joined are a prefix of the finished text, which the engine makes from all tokens at once. `StopScanner` keeps a
window of the same kind, but searches text that a later token may still change, where this gives out only what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.tokenization.stop_strings import MAX_OPEN_TOKENS

Decode = Callable[[Sequence[int]], str]
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """One output. `stop` holds the strings whose beginning is held back."""

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = stop
        self._num_tokens = 0
        self._window: list[int] = []
        """The last tokens: those whose text is known, then those whose text may still change."""
        self._num_known = 0
        self._known_text = ""
        self._held_back = ""
        self.num_given = 0
        """Characters given out."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids`, the output's tokens from its first on, add to what was given out."""
        self._window += token_ids[self._num_tokens :]
        self._num_tokens = len(token_ids)
        text = self._decode(self._window)
        is_open = text.endswith(_REPLACEMENT) and len(self._window) - self._num_known < MAX_OPEN_TOKENS
        if not is_open and text.startswith(self._known_text):
            self._held_back += text[len(self._known_text) :]
            # The known tokens stay in the window, because some decoders treat a text's first token apart.
            if len(text) > len(self._known_text):
                del self._window[: self._num_known]
                self._num_known = len(self._window)
                self._known_text = self._decode(self._window)
            else:
                del self._window[self._num_known :]
        keep = max((overlap(self._held_back, stop) for stop in self._stop), default=0)
        given = self._held_back[: len(self._held_back) - keep]
        self._held_back = self._held_back[len(given) :]
        self.num_given += len(given)
        return given

    def finish(self, text: str) -> str:
        """The rest of the finished text."""
        rest = text[self.num_given :]
        self.num_given = len(text)
        return rest


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
