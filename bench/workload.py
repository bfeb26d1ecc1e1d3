"""What a workload is: a model, and requests whose prompts and lengths are fixed by seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.discovery import offered

# Ids that every model here knows, and none of them a special one.
FIRST_TOKEN, LAST_TOKEN = 1_000, 15_000


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """A prompt, and exactly how many tokens are to follow it: greedy, the end of sequence ignored."""

    prompt: Sequence[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind to one model."""

    name: str
    title: str
    model: str
    """A name in `bench.models`."""

    lengths: Callable[[random.Random], Sequence[tuple[int, int]]]
    """Tokens of each request's prompt, and to generate."""

    shared_prefix: int = 0
    """Tokens with which all prompts of a round begin alike. Nothing else is shared."""

    def requests(self, round_number: int) -> list[WorkloadRequest]:
        """The requests of one round. Lengths are the same in all; tokens are not, so that no cache carries over."""
        lengths = self.lengths(random.Random(self.name))
        tokens = random.Random(f"{self.name} {round_number}")
        prefix = _draw(tokens, self.shared_prefix)
        return [
            WorkloadRequest([*prefix, *_draw(tokens, prompt - self.shared_prefix)], max_tokens)
            for prompt, max_tokens in lengths
        ]

    def warm_up(self, max_tokens: int) -> list[WorkloadRequest]:
        """A round of its own with the same prompts' lengths and short outputs, for what happens only once."""
        return [WorkloadRequest(request.prompt, min(max_tokens, request.max_tokens)) for request in self.requests(-1)]


def workloads() -> dict[str, Workload]:
    """All workloads in `bench.workloads`, by name."""
    found = [workload for workload in offered("bench.workloads", "WORKLOAD") if isinstance(workload, Workload)]
    return {workload.name: workload for workload in found}


def _draw(tokens: random.Random, count: int) -> list[int]:
    return [tokens.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]
