"""Find where a stop string ends an output, also across tokens or inside one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

Decode = Callable[[Sequence[int]], str]

# Tokens that may lie in one character of UTF-8: it has at most four bytes. Text that is incomplete after so many tokens
# is taken as it stands.
MAX_OPEN_TOKENS = 4


class StopScanner:
    """Watches one output for its stop strings.

    `feed` is cheap: it decodes the last few tokens and searches the end of the text. `cut` is exact: it searches the
    whole text as the tokenizer decodes it, and decides.
    """

    def __init__(
        self,
        decode: Decode,
        stop: Sequence[str],
        *,
        min_tokens: int,
        include_stop: bool,
        decode_all: Decode | None = None,
    ) -> None:
        """`decode_all` keeps the special tokens that `decode` leaves out: a stop string in either text counts."""
        self._all = (
            None if decode_all is None else StopScanner(decode_all, stop, min_tokens=min_tokens, include_stop=False)
        )
        self._decode = decode
        self._stop = stop
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._num_kept = max(len(text) for text in stop) - 1
        self._num_tokens = 0
        # The last tokens: those whose text is in the tail already, then those that are new. The old ones are decoded
        # with the new, since some decoders treat a text's first token apart (SentencePiece strips its space).
        self._window: list[int] = []
        self._num_old = 0
        self._old_text = ""
        self._tail = ""

    def feed(self, token_id: int) -> bool:
        """Take in the next token of the output; returns whether a stop string may be complete."""
        is_in_all = self._all is not None and self._all.feed(token_id)
        self._num_tokens += 1
        self._window.append(token_id)
        text = self._decode(self._window)
        seen = self._tail + (text[len(self._old_text) :] if text.startswith(self._old_text) else text)
        if self._num_old and text == self._old_text:
            # A token without text. Alone in the window it would leave the next one to be treated as a text's first.
            del self._window[self._num_old :]
        elif not text.endswith("\N{REPLACEMENT CHARACTER}") or len(self._window) - self._num_old >= MAX_OPEN_TOKENS:
            self._tail = seen[-self._num_kept :] if self._num_kept else ""
            del self._window[: self._num_old]
            self._num_old = len(self._window)
            self._old_text = self._decode(self._window)
        return is_in_all or (self._num_tokens >= self._min_tokens and any(stop in seen for stop in self._stop))

    def cut(self, token_ids: Sequence[int], text: str) -> tuple[str, str] | None:
        """Return the text up to its first stop string, and that string; None where there is none.

        `text` is what `token_ids`, the output, decode to. A stop string that was complete before `min_tokens` does not
        count.
        """
        ignored = len(self._decode(token_ids[: self._min_tokens - 1])) if self._min_tokens > 1 else 0
        first = self._first_in_all(token_ids)
        for stop in self._stop:
            found = text.find(stop, max(0, ignored - len(stop) + 1))
            if found >= 0 and (first is None or found < first[0]):
                first = (found, stop)
        if first is None:
            return None
        start, stop = first
        return text[:start] + (stop if self._include_stop else ""), stop

    def _first_in_all(self, token_ids: Sequence[int]) -> tuple[int, str] | None:
        """Return where the text is cut for a stop string in the text with special tokens, and that string."""
        if self._all is None:
            return None
        decode_all = self._all._decode
        cut = self._all.cut(token_ids, decode_all(token_ids))
        if cut is None:
            return None
        start = len(cut[0])
        # The stop string begins in token `place`.
        place = bisect_right(range(1, len(token_ids)), start, key=lambda size: len(decode_all(token_ids[:size])))
        before, after = (len(self._decode(token_ids[:size])) for size in (place, place + 1))
        return min(before + start - len(decode_all(token_ids[:place])), after), cut[1]


def may_touch(stop: Iterable[str], special_texts: Iterable[str]) -> bool:
    """Return whether a stop string may lie in, around or across a special token."""
    return any(
        text in string
        or string in text
        or any(string.startswith(text[-size:]) or string.endswith(text[:size]) for size in range(1, len(text)))
        for text in special_texts
        for string in stop
    )
