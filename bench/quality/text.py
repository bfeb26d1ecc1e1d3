"""What models are judged on: text that ships with every Python, and questions."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from engine.tokenization.tokenizer import Tokenizer

WINDOW_TOKENS = 512
ENGLISH_WINDOWS, CODE_WINDOWS = 5, 3
CODE = "textwrap.py"

QUESTIONS = (
    "What is the capital of Japan?",
    "List three primary colors.",
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "Translate to French: good morning.",
    "What is 12 plus 30?",
    "Explain photosynthesis in one sentence.",
    "Who wrote Romeo and Juliet?",
    "Name an animal that can fly.",
    "How many days has a leap year?",
    "Give me a synonym for happy.",
    "Write a Python function that adds two numbers.",
    "What is the boiling point of water?",
    "Describe a sunset for a postcard.",
    "Is a tomato a fruit?",
    "Suggest a name for a black cat.",
    "What does HTTP stand for?",
    "Summarize: The meeting moved from Monday to Friday because the room was taken.",
    "Which planet is the largest?",
    "Write a polite refusal of an invitation.",
    "What is the opposite of cold?",
    "Give two reasons to exercise.",
    "Fix the grammar: he go to school yesterday.",
    "What is the square root of 81?",
)


def windows(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids, each window behind what the tokenizer begins a text with: help()'s topics, then a module's source."""
    start = tokenizer.encode("")
    found = [
        window
        for text, count in ((_english(), ENGLISH_WINDOWS), (_code(), CODE_WINDOWS))
        for window in _cut(tokenizer.encode(text, add_special_tokens=False), count)
    ]
    return [[*start, *window] for window in found]


def question_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """The questions as chats; as plain text where the model has no chat template."""
    if not tokenizer.has_chat_template:
        return [tokenizer.encode(f"Question: {question}\nAnswer:") for question in QUESTIONS]
    return [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def _english() -> str:
    return "\n\n".join(text for _, text in sorted(topics.topics.items()))[:40_000]


def _code() -> str:
    return (Path(sysconfig.get_path("stdlib")) / CODE).read_text(encoding="utf-8")


def _cut(token_ids: list[int], count: int) -> Iterator[list[int]]:
    if len(token_ids) < count * WINDOW_TOKENS:
        raise ValueError(f"{len(token_ids)} tokens do not fill {count} windows of {WINDOW_TOKENS}")
    for start in range(0, count * WINDOW_TOKENS, WINDOW_TOKENS):
        yield token_ids[start : start + WINDOW_TOKENS]
