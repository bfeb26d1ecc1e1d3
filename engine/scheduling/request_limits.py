"""What a request may ask for at most: beyond it, it could never run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import RequestRejected
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Of one engine; they do not depend on what else it has to do."""

    vocab_size: int
    context: int
    """Positions that a sequence may have, prompt and output together."""

    cache: int
    """Positions that the whole KV cache has."""

    has_tokenizer: bool

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """The most tokens that a request may generate; raises `RequestRejected` for one that can never run here."""
        self._check_tokens(prompt, params)
        if not self.has_tokenizer and (params.stop or params.echo):
            raise RequestRejected("this model has no tokenizer: stop strings and echo need one")
        if not self.has_tokenizer and params.structured_outputs is not None:
            raise RequestRejected("this model has no tokenizer: structured outputs need one")

        # The last token is never run through the model, so it needs no place in the cache.
        most = min(self.context, self.cache + 1) - len(prompt)
        wanted = params.max_tokens
        if wanted is None:
            if most < 1:
                raise RequestRejected(
                    f"the prompt has {len(prompt)} tokens and leaves none to generate: "
                    f"the context has {self.context} positions, the KV cache {self.cache}"
                )
            return most
        if len(prompt) + wanted > self.context:
            raise RequestRejected(
                f"the prompt's {len(prompt)} tokens and max_tokens of {_shown(wanted)} "
                f"exceed the context of {self.context} positions"
            )
        if wanted > most or len(prompt) > self.cache:
            raise RequestRejected(
                f"the prompt's {len(prompt)} tokens and max_tokens of {wanted} "
                f"exceed the whole KV cache of {self.cache} positions"
            )
        return wanted

    def _check_tokens(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in prompt):
            raise RequestRejected(f"the prompt holds something that is not a token id from 0 to {self.vocab_size - 1}")
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "banned_token_ids"):
            if any(token >= self.vocab_size for token in getattr(params, name) or ()):
                raise RequestRejected(f"{name} names a token beyond the vocabulary of {self.vocab_size}")


def _shown(number: int) -> str:
    return str(number) if number < 10**12 else "over 10**12"
