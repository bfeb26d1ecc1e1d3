"""What an engine says of given text, and how far that is from what another said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from engine import Engine, SamplingParams
from engine.outputs import TokenLogprobs

GREEDY_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """From a reference's log-probabilities, over all tokens of all windows but their first."""

    tokens: int
    perplexity: float
    perplexity_change: float
    """Of the reference's, as a share: 0.01 is one per cent more."""

    mean_change: float
    """Of a token's log-probability, without sign, in nats."""

    mean_kl: float
    """The reference's distribution over the whole vocabulary against this one's, in nats."""

    same_top: float
    """The share of places where both like the same token best."""

    @classmethod
    def over(cls, windows: Sequence[Sequence[int]], reference: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
        """`[window - 1, vocabulary]` log-probabilities of each window from both."""
        true, changed, kl, same = [], [], [], []
        for window, before, after in zip(windows, reference, found, strict=True):
            targets = torch.tensor(window[1:])[:, None]
            true.append(before.gather(1, targets)[:, 0].double())
            changed.append(after.gather(1, targets)[:, 0].double())
            kl.append((before.exp() * (before - after)).sum(dim=-1, dtype=torch.float64))
            same.append(before.argmax(dim=-1) == after.argmax(dim=-1))
        before, after = torch.cat(true), torch.cat(changed)
        return cls(
            tokens=len(before),
            perplexity=math.exp(-float(after.mean())),
            perplexity_change=math.exp(float((before - after).mean())) - 1,
            mean_change=float((after - before).abs().mean()),
            mean_kl=float(torch.cat(kl).mean()),
            same_top=float(torch.cat(same).double().mean()),
        )


class LogProbabilities:
    """An engine's log-probabilities of some windows, kept in files: a vocabulary of 262,144 fills gigabytes."""

    def __init__(self, engine: Engine, windows: Sequence[Sequence[int]], directory: Path) -> None:
        self._files = []
        for number, window in enumerate(windows):
            scores = _scores(engine, window)
            file = directory / f"{number}.bin"
            kept = torch.from_file(str(file), shared=True, size=scores.numel(), dtype=scores.dtype).view_as(scores)
            kept.copy_(scores)
            self._files.append(kept)

    def difference(self, engine: Engine, windows: Sequence[Sequence[int]]) -> Difference:
        """What another engine makes of the same windows."""
        return Difference.over(windows, self._files, [_scores(engine, window) for window in windows])


def greedy_answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The token ids of each answer."""
    params = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0.0)
    return [tuple(output.token_ids) for output in engine.generate([list(prompt) for prompt in prompts], params)]


@torch.inference_mode()
def _scores(engine: Engine, window: Sequence[int]) -> Tensor:
    """`[window - 1, vocabulary]` log-probabilities, float32, as the engine's own steps compute them."""
    kept: list[Tensor] = []
    score = engine.sampler.score

    def keep(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        kept.append(logits.log_softmax(dim=-1))
        return score(logits, token_ids, num_top)

    with mock.patch.object(engine.sampler, "score", keep):
        (output,) = engine.generate([list(window)], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    if output.error is not None:
        raise RuntimeError(f"the engine refused a window: {output.error}")
    return torch.cat(kept)
