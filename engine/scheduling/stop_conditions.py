"""Stop conditions by token, grammar and length; those by text are in `engine.tokenization.stop_strings`."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from engine.outputs import FinishReason
from engine.scheduling.sequence import Sequence


class Stop(NamedTuple):
    finish_reason: FinishReason
    stop_reason: int | str | None
    by_token: bool = False
    """Whether the last token said so, and is no part of the text."""


def token_stop(sequence: Sequence, eos_token_ids: Set[int]) -> Stop | None:
    """What the last token ends, if anything. An end by token or grammar comes before one by length."""
    params = sequence.request.params
    token = sequence.token_ids[-1]
    if sequence.num_output >= params.min_tokens:
        if token in params.stop_token_ids:
            return Stop("stop", token, by_token=True)
        if token in eos_token_ids and not params.ignore_eos:
            return Stop("stop", None, by_token=True)
    matcher = sequence.sampling.matcher
    if matcher is not None and matcher.is_complete:
        return Stop("stop", None)
    if sequence.num_output >= sequence.max_output:
        return Stop("length", None)
    return None
