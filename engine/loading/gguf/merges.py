"""SentencePiece's vocabulary as the merges of byte-pair encoding."""

from __future__ import annotations

from collections.abc import Sequence

_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6
_NOT_MERGED = frozenset({_UNKNOWN, _CONTROL, _BYTE})
"""Types of tokens that are not made of others."""


def merges_of(tokens: Sequence[str], ranks: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, those of a higher rank first.

    Among equal ranks the longer first part comes first, as in transformers' conversion.
    """
    plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind not in _NOT_MERGED}
    found: list[tuple[float, int, int, str, str]] = []
    for token, rank, kind in zip(tokens, ranks, kinds, strict=True):
        if kind in _NOT_MERGED:
            continue
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in plain and second in plain:
                found.append((-rank, -len(first), -len(second), first, second))
    found.sort(key=lambda pair: pair[:3])
    return [(first, second) for *_, first, second in found]
