"""Completing a list of prompts: requests are added as the engine wants them, until all have their output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from engine.errors import InvalidPrompt, RequestFailed, RequestRejected
from engine.loop.request_tracker import RequestTracker
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.tokenization.tokenizer import Tokenizer

Prompt = str | Sequence[int]

# Prompts that are tokenized at a time: enough to use every core, too few to delay the first step.
_TOKENIZE_AT_ONCE = 256


class Steppable(Protocol):
    """What `generate` needs of an engine; see `Engine`."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def add(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def num_requests_wanted(self) -> int: ...


def generate(
    engine: Steppable,
    tracker: RequestTracker,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    id_prefix: str,
) -> list[RequestOutput]:
    """See `Engine.generate`. `id_prefix` is unique to the call; outputs of other requests go back to the tracker."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, not a single text")
    if params is None:
        params = SamplingParams()
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(every) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(every)} sampling parameters")

    ids = [f"{id_prefix}-{place}" for place in range(len(prompts))]
    own = frozenset(ids)
    outputs: dict[str, RequestOutput] = {}
    others: list[RequestOutput] = []
    queue = zip(ids, _tokenized(prompts, engine.tokenizer), every, strict=True)
    try:
        while len(outputs) < len(ids):
            num_wanted = max(engine.num_requests_wanted(), 0 if len(tracker) else 1)
            for request_id, tokens, its_params in itertools.islice(queue, num_wanted):
                try:
                    if isinstance(tokens, InvalidPrompt):
                        raise tokens
                    engine.add(request_id, tokens, its_params)
                except (InvalidPrompt, RequestRejected, RequestFailed) as error:
                    given = () if isinstance(tokens, InvalidPrompt) else tokens
                    outputs[request_id] = RequestOutput.failed(request_id, given, error.message)
            for output in engine.step():
                if output.request_id in own:
                    outputs[output.request_id] = output
                else:
                    others.append(output)
    finally:
        for request_id in ids:
            engine.abort(request_id)
        others += [output for output in tracker.take_outputs() if output.request_id not in own]
        tracker.put_back(others)
    return [outputs[request_id] for request_id in ids]


def _tokenized(prompts: Sequence[Prompt], tokenizer: Tokenizer | None) -> Iterator[Sequence[int] | InvalidPrompt]:
    """Tokens of each prompt, made shortly before they are needed."""
    for start in range(0, len(prompts), _TOKENIZE_AT_ONCE):
        part = prompts[start : start + _TOKENIZE_AT_ONCE]
        texts = [prompt for prompt in part if isinstance(prompt, str)]
        if texts and tokenizer is None:
            encoded: Iterator[list[int] | InvalidPrompt] = itertools.repeat(
                InvalidPrompt("this model has no tokenizer: prompts must be token ids"), len(texts)
            )
        else:
            encoded = iter(tokenizer.encode_batch(texts) if tokenizer is not None else [])
        for prompt in part:
            yield next(encoded) if isinstance(prompt, str) else prompt
