"""Chat prompts for SmolLM2 from the English that ships with Python: what `help()` reads."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pydoc_data import topics

from tokenizers import Tokenizer

from bench.models import smollm2_tokenizer

TASKS = (
    "Summarize this in one sentence.",
    "What is this text about?",
    "Explain this to a beginner in simple words.",
    "Name the three most important words of this text.",
    "Write a title for this text.",
)


def chat_prompts(draw: random.Random, sizes: Sequence[int]) -> list[list[int]]:
    """A user's turn for each size, a piece of text and a task about it, so many tokens long with the answer's head."""
    tokenizer, text = smollm2_tokenizer(), _text()
    start = _encoded(tokenizer, "<|im_start|>user\n")
    ends = [_encoded(tokenizer, f"\n\n{task}<|im_end|>\n<|im_start|>assistant\n") for task in TASKS]
    prompts = []
    for size in sizes:
        end = draw.choice(ends)
        length = size - len(start) - len(end)
        place = draw.randrange(len(text) - length)
        prompts.append([*start, *text[place : place + length], *end])
    return prompts


@functools.cache
def _text() -> list[int]:
    english = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    return _encoded(smollm2_tokenizer(), english)


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
