"""What a step's logits say: the next token of each sequence that is due one, and prompts' log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.outputs import TokenLogprobs
from engine.sampling.sampler import Sampled, Sampler
from engine.scheduling.step import ScheduledSequence


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought for one sequence."""

    item: ScheduledSequence
    sampled: Sampled | None
    prompt_logprobs: Sequence[TokenLogprobs] = ()


@torch.inference_mode()
def sample_step(sampler: Sampler, items: Sequence[ScheduledSequence], logits: torch.Tensor) -> list[StepResult]:
    """Read `[sum of num_logits, vocab_size]`, the items' rows in order.

    Changes no sequence, so that a step can be run again; the logits may be overwritten.
    """
    rows: list[int] = []
    prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}
    first = 0
    for place, item in enumerate(items):
        if item.scores_prompt:
            prompt_logprobs[place] = _score_prompt(sampler, item, logits[first : first + item.num_logits])
        first += item.num_logits
        if item.samples:
            rows.append(first - 1)
    sampled: list[Sampled] = []
    if rows:
        states = [item.sequence.sampling for item in items if item.samples]
        sampled = sampler.sample(logits if len(rows) == len(logits) else logits[rows], states)
    next_sampled = iter(sampled)
    return [
        StepResult(item, next(next_sampled) if item.samples else None, prompt_logprobs.get(place, ()))
        for place, item in enumerate(items)
    ]


def _score_prompt(sampler: Sampler, item: ScheduledSequence, logits: torch.Tensor) -> list[TokenLogprobs]:
    """Log-probabilities of the prompt tokens that follow the item's last `num_logits` tokens."""
    sequence = item.sequence
    start = item.end - item.num_logits
    targets = sequence.token_ids[start + 1 : min(item.end + 1, sequence.num_prompt)]
    return sampler.score(logits[: len(targets)], targets, sequence.request.params.prompt_logprobs or 0)
