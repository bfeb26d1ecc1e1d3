"""What sampling one sequence depends on, beside the logits. Without torch: the scheduler reads it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.sampling.token_counts import TokenCounts
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.grammar.matcher import Matcher

MAX_STOP_TOKENS = 8
"""Tokens that may end a sequence while it is sampled on the device; with more, the host samples it."""


@dataclass(slots=True, eq=False)
class SamplingState:
    """What the sampler knows about one sequence. `position` and `num_output` move on with every token."""

    params: SamplingParams
    seed: int
    """64 bits, unsigned."""

    index: int
    """Which of the request's completions; completions of one seed draw apart."""

    position: int
    """Where the next token will stand, counted from the prompt's start."""

    num_output: int = 0
    stop_tokens_banned_until_min: Sequence[int] = ()
    """Tokens banned until `min_tokens` are there: end of sequence and stop tokens."""

    counts: TokenCounts | None = None
    """Present when the parameters penalize."""

    matcher: Matcher | None = None
    """Where in its grammar the output stands, if it has one."""

    def skip(self, num_tokens: int) -> None:
        """Take in tokens that neither penalties nor a grammar have to know."""
        self.position += num_tokens
        self.num_output += num_tokens

    def advance(self, token_id: int) -> None:
        """Take in a chosen token; raises `GrammarError` where it leaves the grammar."""
        self.position += 1
        self.num_output += 1
        if self.counts is not None:
            self.counts.add(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)


def decodes_on_device(sampling: SamplingState) -> bool:
    """Whether a row says all that this sequence's next token depends on, and nothing but the token is asked for."""
    params = sampling.params
    return (
        sampling.counts is None
        and params.structured_outputs is None
        and params.logprobs is None
        and not params.logit_bias
        and not params.banned_token_ids
        and params.allowed_token_ids is None
        and len(sampling.stop_tokens_banned_until_min) <= MAX_STOP_TOKENS
    )
