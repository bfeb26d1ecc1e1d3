"""Questions to a worker's tokenizer, without Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from jobs.requests import ModelLimits
from tests.unit.worker.generation.test_prompts import HANGING, Letters, chat
from worker.generation import chat_prompt
from worker.generation.tokenizer_server import Refused, answer

MODEL = ModelLimits("m", max_model_len=100_000, vocab_size=256)


class Tokenizer(Letters):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode()

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(token) for token in token_ids]

    def info(self) -> dict[str, Any]:
        return {"eos_token": "$"}


def ask(line: dict[str, object], tokenizer: Tokenizer | None = None) -> Any:
    return answer(tokenizer or Tokenizer(), MODEL, {"line": line, "return_token_strs": True})


def test_pieces_stand_beside_their_tokens() -> None:
    assert ask({"prompt": "ab"}) == {"tokens": [97, 98], "pieces": ["a", "b"]}
    assert answer(Tokenizer(), MODEL, {"tokens": [97, 98]}) == {"prompt": "ab"}


def test_text_that_becomes_no_tokens_is_refused() -> None:
    with pytest.raises(Refused, match="no token for !"):
        ask({"prompt": "a!"})


def test_text_beyond_four_contexts_is_refused_without_tokenization() -> None:
    tokenizer = Tokenizer()
    assert len(ask({"prompt": "a" * 400_000}, tokenizer)["tokens"]) == 400_000
    tokenizer.batches.clear()
    with pytest.raises(Refused) as caught:
        ask({"prompt": "a" * 400_001}, tokenizer)
    assert caught.value.reply["code"] == "context_length_exceeded"
    assert tokenizer.batches == []


def test_template_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_prompt, "TEMPLATE_LIMIT", 0.2)
    with pytest.raises(Refused, match=r"more than 0\.2 s"):
        ask(chat("hang"), Tokenizer(HANGING))


def test_model_without_a_tokenizer_is_named() -> None:
    with pytest.raises(Refused, match="m has no tokenizer"):
        answer(None, MODEL, {"line": {"prompt": "a"}, "return_token_strs": False})
