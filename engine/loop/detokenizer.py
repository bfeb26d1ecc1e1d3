"""From a sequence's tokens to its text: what a request gets to read, and where a stop string cuts it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from engine.sampling_params import SamplingParams
from engine.scheduling.sequence import Sequence
from engine.scheduling.stop_conditions import Stop
from engine.tokenization.stop_strings import StopScanner, may_touch

if TYPE_CHECKING:
    from engine.tokenization.tokenizer import Tokenizer


class Detokenizer:
    """Reads sequences with a model's tokenizer; without one, every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def stop_scanner(self, params: SamplingParams) -> StopScanner | None:
        """What watches an output for stop strings; None where there are none."""
        tokenizer = self._tokenizer
        if tokenizer is None or not params.stop:
            return None
        return StopScanner(
            lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens),
            params.stop,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop_str_in_output,
            decode_all=(
                partial(tokenizer.decode, skip_special_tokens=False)
                if params.skip_special_tokens and may_touch(params.stop, tokenizer.special_texts)
                else None
            ),
        )

    def read(self, sequence: Sequence, stop: Stop | None) -> tuple[str, str | None]:
        """A sequence's text, cut where it ends, and the stop string that it was cut at.

        `stop` is how else it ends, if it does.
        """
        if self._tokenizer is None:
            return "", None
        params = sequence.request.params
        output = sequence.output_token_ids()
        if stop is not None and stop.by_token and not params.include_stop_str_in_output:
            output.pop()
        matcher = sequence.sampling.matcher
        decode = self._tokenizer.decode if matcher is None else matcher.grammar.vocabulary.decode
        text = decode(output, skip_special_tokens=params.skip_special_tokens)
        cut = None if sequence.stop_scanner is None else sequence.stop_scanner.cut(output, text)
        kept = text if cut is None else cut[0]
        if params.echo:
            # Decoded as one, since a space at the seam may belong to either.
            whole = self._tokenizer.decode(
                [*sequence.request.prompt_token_ids, *output], skip_special_tokens=params.skip_special_tokens
            )
            kept = whole[: len(whole) - (len(text) - len(kept))]
        return kept, None if cut is None else cut[1]
