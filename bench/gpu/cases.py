"""The end-to-end cases: a model, and requests fixed by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.workload import FIRST_TOKEN, LAST_TOKEN, WorkloadRequest


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    title: str
    model: str
    """A name in `bench.models`."""

    requests: Callable[[random.Random], Sequence[WorkloadRequest]]
    temperature: float = 0.0
    max_num_seqs: int = 2048

    def round(self, number: int) -> list[WorkloadRequest]:
        """The requests of one round. Lengths are the same in all; tokens are not, so that no cache carries over."""
        lengths = self.requests(random.Random(self.name))
        draw = random.Random(f"{self.name} {number}")
        made: dict[int, Sequence[int]] = {}
        result = []
        for request in lengths:
            # Prompts that are one object in all places stay one prompt.
            if id(request.prompt) not in made:
                made[id(request.prompt)] = tokens(draw, len(request.prompt))
            result.append(WorkloadRequest(made[id(request.prompt)], request.max_tokens))
        return result


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]


def _same(count: int, prompt: int, output: int) -> Callable[[random.Random], Sequence[WorkloadRequest]]:
    return lambda draw: [WorkloadRequest(tokens(draw, prompt), output) for _ in range(count)]


def _ragged(count: int, least: int, most: int) -> Callable[[random.Random], Sequence[WorkloadRequest]]:
    return lambda draw: [
        WorkloadRequest(tokens(draw, draw.randint(least, most)), draw.randint(least, most)) for _ in range(count)
    ]


def _samples(
    prompts: int, length: int, samples: int, output: int
) -> Callable[[random.Random], Sequence[WorkloadRequest]]:
    def make(draw: random.Random) -> Sequence[WorkloadRequest]:
        shared = [tokens(draw, length) for _ in range(prompts)]
        return [WorkloadRequest(prompt, output) for prompt in shared for _ in range(samples)]

    return make


CASES = (
    Case("article", "gpt2-large, 50 requests of 8 + 50 tokens", "gpt2-large", _same(50, 8, 50)),
    Case(
        "article-4096",
        "gpt2-large, 4,096 requests of 8 + 50 tokens",
        "gpt2-large",
        _same(4096, 8, 50),
        max_num_seqs=4096,
    ),
    Case("ragged", "Qwen3-0.6B, 256 requests of 100..1,024 + 100..1,024 tokens", "qwen3-0.6b", _ragged(256, 100, 1024)),
    Case("long", "Llama-3.1-8B, 512 requests of 1,000 + 128 tokens", "llama-3.1-8b", _same(512, 1000, 128)),
    Case(
        "shared-prefix",
        "Qwen3-0.6B, 1,024 samples of each of 8 prompts of 1,024 tokens, 128 tokens each",
        "qwen3-0.6b",
        _samples(8, 1024, 1024, 128),
        temperature=1.0,
        max_num_seqs=4096,
    ),
)

DRY_CASE = Case("dry", "tiny, 4 requests of 8 + 4 tokens", "tiny", _same(4, 8, 4))
"""Stands for each of them in a dry run."""


def case(name: str, *, is_dry: bool) -> Case:
    return DRY_CASE if is_dry else next(one for one in CASES if one.name == name)
