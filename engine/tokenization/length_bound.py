"""A lower bound on the number of a text's tokens, from its bytes alone.

A token of n bytes covers n bytes of the text, and each of them lies in no token longer than the longest that contains
that byte. Hence a text has at least the sum, over its bytes b, of 1 / (longest token with b) tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.tokenization.token_bytes import UnreadableDecoder, piece_reader

Shares = npt.NDArray[np.float64]

_KEEPING = {"ByteLevel", "Digits", "Metaspace", "Sequence", "Split", "Punctuation"}
"""Pre-tokenizers that lose no byte, unless they split by removing."""
_SPACE_MARK = "▁"
_ROUNDING = 1e-6


class LengthBound:
    """The bound of one tokenizer of the `tokenizers` library; 0 where bytes may be lost on the way to tokens."""

    def __init__(self, backend: Any) -> None:
        self._normalizer = backend.normalizer
        self._share = _shares(backend)

    def least_tokens(self, text: str) -> int:
        """Return the tokens that `text` has at least, without special tokens; 0 where unknown."""
        if self._share is None:
            return 0
        raw = _bound(text, self._share)
        if self._normalizer is None or raw == 0:
            return raw
        # Tokens cover the normalized text, which may be shorter.
        return _bound(self._normalizer.normalize_str(text), self._share)


def _bound(text: str, share: Shares) -> int:
    data = np.frombuffer(text.replace(_SPACE_MARK, " ").encode("utf-8", "replace"), np.uint8)
    return math.ceil(float(np.bincount(data, minlength=256) @ share) - _ROUNDING)


def _shares(backend: Any) -> Shares | None:
    """Return 1 / the length of the longest token with each byte; None where a byte may be covered by no token."""
    state = json.loads(backend.to_str())
    model = state["model"]
    steps = list(_flat(state["pre_tokenizer"]))
    splits = [str(step.get("behavior")) for step in steps]
    if model["type"] != "BPE" or {step["type"] for step in steps} - _KEEPING or "Removed" in splits:
        return None
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    try:
        to_bytes = piece_reader(backend.decoder)
    except UnreadableDecoder:
        return None
    tokens = [to_bytes(piece.replace(_SPACE_MARK, " ")) for piece in vocabulary]
    if len({token for token in tokens if len(token) == 1}) < 256 and not _falls_back(model):
        return None  # other bytes are dropped, or one <unk> covers any number of them
    added = backend.get_added_tokens_decoder().values()
    tokens += [info.content.encode() for info in added]
    if backend.normalizer is not None:
        tokens += [backend.normalizer.normalize_str(info.content).encode() for info in added]
    longest = np.ones(256)
    for token in tokens:
        for byte in set(token):
            longest[byte] = max(longest[byte], len(token))
    share = 1 / longest
    if any(info.lstrip or info.rstrip for info in added):
        # Such a token also covers all white space beside it, Unicode's too.
        share[[*b" \t\n\r\v\f", *range(0x1C, 0x20), *range(0x80, 0x100)]] = 0
    return share


def _falls_back(model: dict[str, Any]) -> bool:
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))


def _flat(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    yield step
    for part in step.get("pretokenizers", []):
        yield from _flat(part)
