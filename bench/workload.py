"""What a workload is: a model, and requests whose prompts and lengths are fixed by seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.discovery import offered

# Ids that every model here knows, and none of them a special one.
FIRST_TOKEN, LAST_TOKEN = 1_000, 15_000


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """A prompt, and how many tokens are to follow it, greedily: exactly so many, unless it `stops_at_eos`."""

    prompt: Sequence[int]
    max_tokens: int
    stops_at_eos: bool = False
    """Whether the end of sequence ends it, and `max_tokens` is the most."""


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

    stops_at_eos: bool = False
    """See `WorkloadRequest`."""

    prompts: Callable[[random.Random, Sequence[int]], Sequence[Sequence[int]]] | None = None
    """Makes prompts of given lengths. None: of tokens drawn evenly."""

    def requests(self, round_number: int) -> list[WorkloadRequest]:
        """The requests of one round. Lengths are the same in all; tokens are not, so that no cache carries over."""
        lengths = self.lengths(random.Random(self.name))
        tokens = random.Random(f"{self.name} {round_number}")
        sizes = [prompt for prompt, _ in lengths]
        prompts = self.prompts(tokens, sizes) if self.prompts is not None else self._drawn(tokens, sizes)
        return [
            WorkloadRequest(prompt, max_tokens, self.stops_at_eos)
            for prompt, (_, max_tokens) in zip(prompts, lengths, strict=True)
        ]

    def warm_up(self, max_tokens: int) -> list[WorkloadRequest]:
        """A round of its own with the same prompts' lengths and short outputs, for what happens only once."""
        return [replace(request, max_tokens=min(max_tokens, request.max_tokens)) for request in self.requests(-1)]

    def _drawn(self, tokens: random.Random, sizes: Sequence[int]) -> list[list[int]]:
        prefix = _draw(tokens, self.shared_prefix)
        return [[*prefix, *_draw(tokens, size - self.shared_prefix)] for size in sizes]


def workloads() -> dict[str, Workload]:
    """All workloads in `bench.workloads`, by name."""
    found = [workload for workload in offered("bench.workloads", "WORKLOAD") if isinstance(workload, Workload)]
    return {workload.name: workload for workload in found}


def _draw(tokens: random.Random, count: int) -> list[int]:
    return [tokens.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]
