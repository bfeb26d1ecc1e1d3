"""OpenAI's shapes of log-probabilities, over a vocabulary of a few tokens."""

from __future__ import annotations

import math

import orjson
import pytest

from engine.outputs import TokenLogprobs
from worker.generation.logprobs import openai_logprobs

TOKENS = [b"A", b" B", b"</s>", b"\xe2\x80", b"\xa6", b" B"]
END = 2


class Tokens:
    def token_bytes(self, token_id: int) -> bytes:
        return TOKENS[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id == END


def test_completion_lists_the_best_and_the_chosen_token_by_their_texts() -> None:
    positions = [TokenLogprobs(0, -0.5, ((1, -0.25), (0, -0.5))), TokenLogprobs(1, -3.0, ((0, -0.1), (2, -math.inf)))]
    shaped = openai_logprobs(positions, "A B", Tokens(), is_chat=False)
    assert orjson.loads(orjson.dumps(shaped)) == {
        "tokens": ["A", " B"],
        "token_logprobs": [-0.5, -3.0],
        "top_logprobs": [{" B": -0.25, "A": -0.5}, {"A": -0.1, "</s>": -9999.0, " B": -3.0}],
        "text_offset": [0, 1],
    }


def test_completion_without_likely_tokens_lists_the_chosen_one() -> None:
    shaped = openai_logprobs([TokenLogprobs(0, -0.5, ())], "A", Tokens(), is_chat=False)
    assert shaped["top_logprobs"] == [{"A": -0.5}]


def test_completion_offsets_count_characters_and_stay_in_the_text() -> None:
    positions = [TokenLogprobs(token, -1.0, ()) for token in (3, 4, 1, END, 0)]
    shaped = openai_logprobs(positions, "\N{HORIZONTAL ELLIPSIS} B", Tokens(), is_chat=False)
    assert shaped["tokens"] == ["bytes:\\xe2\\x80", "bytes:\\xa6", " B", "</s>", "A"]
    assert shaped["text_offset"] == [0, 0, 1, 3, 3]


def test_completion_offsets_follow_a_text_without_its_first_space() -> None:
    shaped = openai_logprobs([TokenLogprobs(1, -1.0, ()), TokenLogprobs(0, -1.0, ())], "BA", Tokens(), is_chat=False)
    assert shaped["text_offset"] == [0, 1]


def test_chosen_token_has_its_own_value_where_another_has_its_text() -> None:
    shaped = openai_logprobs([TokenLogprobs(5, -2.0, ((1, -0.5), (5, -2.0)))], " B", Tokens(), is_chat=False)
    assert shaped["top_logprobs"] == [{" B": -2.0}]


def test_chat_gives_each_token_with_its_bytes() -> None:
    positions = [TokenLogprobs(0, -0.5, ((3, -0.25),)), TokenLogprobs(END, -0.1, ())]
    assert openai_logprobs(positions, "A", Tokens(), is_chat=True) == {
        "content": [
            {
                "token": "A",
                "logprob": -0.5,
                "bytes": [65],
                "top_logprobs": [{"token": "\\xe2\\x80", "logprob": -0.25, "bytes": [0xE2, 0x80]}],
            },
            {"token": "</s>", "logprob": -0.1, "bytes": list(b"</s>"), "top_logprobs": []},
        ],
        "refusal": None,
    }


@pytest.mark.parametrize("is_chat", [False, True])
def test_tokens_are_ids_where_the_model_has_no_tokenizer(is_chat: bool) -> None:
    shaped = openai_logprobs([TokenLogprobs(7, -0.5, ())], "", None, is_chat=is_chat)
    tokens = [entry["token"] for entry in shaped["content"]] if is_chat else shaped["tokens"]
    assert tokens == ["token_id:7"]


def test_echoed_prompt_comes_first_and_its_first_token_has_no_value() -> None:
    positions = [TokenLogprobs(1, -0.2, ((1, -0.2),))]
    prompt = [None, TokenLogprobs(1, -1.5, ((0, -0.1), (1, -1.5)))]
    shaped = openai_logprobs(positions, "A B B", Tokens(), is_chat=False, prompt=prompt, first_token=0)
    assert shaped == {
        "tokens": ["A", " B", " B"],
        "token_logprobs": [None, -1.5, -0.2],
        "top_logprobs": [None, {"A": -0.1, " B": -1.5}, {" B": -0.2}],
        "text_offset": [0, 1, 3],
    }
