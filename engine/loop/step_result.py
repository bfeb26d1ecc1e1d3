"""What a step's logits say: the next token of each sequence that is due one, and prompts' log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.outputs import TokenLogprobs
from engine.sampling.sampler import Sampled, Sampler
from engine.scheduling.step import ScheduledSequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step brought for one sequence."""

    share: ScheduledSequence
    sampled: Sampled | None
    prompt_logprobs: Sequence[TokenLogprobs] = ()


@torch.inference_mode()
def sample_step(sampler: Sampler, shares: Sequence[ScheduledSequence], logits: torch.Tensor) -> list[Outcome]:
    """Read `[sum of num_logits, vocab_size]`, the shares' rows in order.

    Changes no sequence, so that a step can be run again; the logits may be overwritten.
    """
    rows: list[int] = []
    prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}
    first = 0
    for place, share in enumerate(shares):
        if share.scores_prompt:
            prompt_logprobs[place] = _score_prompt(sampler, share, logits[first : first + share.num_logits])
        first += share.num_logits
        if share.samples:
            rows.append(first - 1)
    sampled: list[Sampled] = []
    if rows:
        states = [share.sequence.sampling for share in shares if share.samples]
        sampled = sampler.sample(logits if len(rows) == len(logits) else logits[rows], states)
    next_sampled = iter(sampled)
    return [
        Outcome(share, next(next_sampled) if share.samples else None, prompt_logprobs.get(place, ()))
        for place, share in enumerate(shares)
    ]


def _score_prompt(sampler: Sampler, share: ScheduledSequence, logits: torch.Tensor) -> list[TokenLogprobs]:
    """Log-probabilities of the prompt tokens that follow the share's last `num_logits` tokens."""
    sequence = share.sequence
    start = share.end - share.num_logits
    targets = sequence.token_ids[start + 1 : min(share.end + 1, sequence.num_prompt)]
    return sampler.score(logits[: len(targets)], targets, sequence.request.params.prompt_logprobs or 0)
