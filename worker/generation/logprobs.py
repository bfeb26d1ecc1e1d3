"""Log-probabilities in OpenAI's two shapes: of legacy completions, and of chats.

A token's text is its bytes as UTF-8. Bytes that are no whole characters are written as `\\xe2\\x80`, with `bytes:` in
front in a legacy completion, so that two of them never look alike.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class TokenLogprobs(Protocol):
    """Log-probabilities at one position; see `engine.outputs`."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...


class TokenTexts(Protocol):
    """A tokenizer, as far as it is needed here; see `engine.tokenization.tokenizer`."""

    def token_bytes(self, token_id: int) -> bytes: ...
    def is_special(self, token_id: int) -> bool: ...


def openai_logprobs(
    positions: Sequence[TokenLogprobs],
    text: str,
    tokens: TokenTexts | None,
    *,
    is_chat: bool,
    prompt: Sequence[TokenLogprobs | None] = (),
    first_token: int = 0,
) -> Mapping[str, object]:
    """Return `choice.logprobs` for the generated tokens of `text`. Without a tokenizer tokens are `token_id:123`.

    `prompt` holds the prompt's positions where `text` echoes it; the first of them, of `first_token`, has no
    log-probability and is None.
    """
    tokens = tokens if tokens is not None else _TokenIds()
    if is_chat:
        return _of_chat(positions, tokens)
    return _of_completion([*prompt, *positions], text, tokens, first_token)


def _of_chat(positions: Sequence[TokenLogprobs], tokens: TokenTexts) -> Mapping[str, object]:
    def entry(token_id: int, logprob: float) -> dict[str, object]:
        raw = tokens.token_bytes(token_id)
        return {"token": _shown(raw), "logprob": max(logprob, LEAST), "bytes": list(raw)}

    content = [
        entry(position.token_id, position.logprob)
        | {"top_logprobs": [entry(token_id, logprob) for token_id, logprob in position.top]}
        for position in positions
    ]
    return {"content": content, "refusal": None}


def _of_completion(
    positions: Sequence[TokenLogprobs | None], text: str, tokens: TokenTexts, first_token: int
) -> Mapping[str, object]:
    def key(token_id: int) -> str:
        return _shown(tokens.token_bytes(token_id), prefix="bytes:")

    token_ids = [first_token if position is None else position.token_id for position in positions]
    top_logprobs: list[dict[str, float] | None] = []
    for position in positions:
        if position is None:
            top_logprobs.append(None)
            continue
        listed: dict[str, float] = {}
        for token_id, logprob in position.top:
            listed.setdefault(key(token_id), max(logprob, LEAST))
        # The chosen one is always listed, also where another token has the same text.
        listed[key(position.token_id)] = max(position.logprob, LEAST)
        top_logprobs.append(listed)
    return {
        "tokens": [key(token_id) for token_id in token_ids],
        "token_logprobs": [None if position is None else max(position.logprob, LEAST) for position in positions],
        "top_logprobs": top_logprobs,
        "text_offset": _offsets(token_ids, text, tokens),
    }


def _offsets(token_ids: Sequence[int], text: str, tokens: TokenTexts) -> list[int]:
    """Where each token begins in `text`, in code points; at its end for what was cut off, as a stop token is."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    seen = ""
    starts = []
    for token_id in token_ids:
        starts.append(len(seen))
        if not tokens.is_special(token_id):
            seen += decoder.decode(tokens.token_bytes(token_id))
    # Some tokenizers strip the space at a text's beginning.
    stripped = int(seen.startswith(" ") and not text.startswith(" "))
    return [min(max(0, start - stripped), len(text)) for start in starts]


def _shown(raw: bytes, *, prefix: str = "") -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


class _TokenIds:
    """Tokens of a model without a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        return f"token_id:{token_id}".encode()

    def is_special(self, token_id: int) -> bool:
        del token_id
        return False
