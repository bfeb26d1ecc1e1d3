"""Spell text in a model's tokens as its tokenizer does: what a grammar forces stands there as in training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

_GUARD = "\x02"
"""A character to put before a text whose beginning the tokenizer would change."""


class Speller:
    """Finds the tokens of a text, whose bytes are exactly the text's."""

    def __init__(self, backend: Any, tokens: Sequence[bytes], special: Collection[int]) -> None:
        """`backend` is a tokenizer of the tokenizers library; `tokens` are each token's bytes."""
        self._backend = backend
        self._tokens = tokens
        self._special = frozenset(special)

    def spell(self, text: str) -> list[int]:
        """Return the tokenizer's tokens; where those say another text, the longest that fit, one after the other."""
        wanted = text.encode()
        found = self._encode(text)
        if self._says(found, wanted):
            return found
        # SentencePiece puts a space before a text. Behind the guard the text is no beginning.
        guarded = self._encode(_GUARD + text)
        for num_guards in (1, 2):  # the guard alone, or a space and the guard
            if self._says(guarded[num_guards:], wanted):
                return guarded[num_guards:]
        return self._greedy(wanted)

    def _encode(self, text: str) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        # A tokenizer may pad to a fixed length.
        return [token for token, is_text in zip(encoding.ids, encoding.attention_mask, strict=True) if is_text]

    def _says(self, token_ids: Sequence[int], text: bytes) -> bool:
        if not self._special.isdisjoint(token_ids) or any(token >= len(self._tokens) for token in token_ids):
            return False
        return b"".join(self._tokens[token] for token in token_ids) == text

    def _greedy(self, text: bytes) -> list[int]:
        """The longest tokens that fit, up to a byte that no token has: nothing can spell what follows."""
        known, longest = self._by_bytes
        token_ids: list[int] = []
        start = 0
        while start < len(text):
            sizes = range(min(longest, len(text) - start), 0, -1)
            size = next((size for size in sizes if text[start : start + size] in known), 0)
            if not size:
                break
            token_ids.append(known[text[start : start + size]])
            start += size
        return token_ids

    @cached_property
    def _by_bytes(self) -> tuple[dict[bytes, int], int]:
        known = {text: token for token, text in enumerate(self._tokens) if text and token not in self._special}
        return known, max(map(len, known), default=0)
