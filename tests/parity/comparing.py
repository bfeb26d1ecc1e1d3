"""Comparing an engine with transformers, token by token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedModel

from engine import Engine, RequestOutput, SamplingParams
from tests.parity.tiny_models import VOCAB_SIZE

LOGPROB_TOLERANCE = 4e-4
"""Most that a log-probability may differ in float32; 2e-4 was seen, where experts are mixed."""

TOP_N = 5
"""In bfloat16, where the two sides part, each one's token must be among this many best of the other."""


@dataclass(frozen=True)
class Reference:
    """What transformers generates greedily for one prompt."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: torch.Tensor
    """`[tokens, vocab]`, float32."""

    @property
    def margin(self) -> float:
        """The least by which the most likely token leads."""
        first, second = self.logprobs.topk(2, dim=-1).values.unbind(-1)
        return float((first - second).min())


def ragged_prompts(seed: int = 0, lengths: Sequence[int] = (1, 5, 17, 50)) -> list[list[int]]:
    """Four prompts of each length; the long ones share a beginning of 20 tokens."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, VOCAB_SIZE) for _ in range(20)]
    prompts = []
    for length in lengths:
        for _ in range(4):
            prompt = [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]
            prompts.append(shared + prompt[20:] if length > 20 else prompt)
    return prompts


def reference_greedy(model: PreTrainedModel, prompts: Sequence[list[int]], num_tokens: int) -> list[Reference]:
    """transformers' own `generate`. Prompts of one length run together, so that nothing is padded."""
    references: list[Reference] = []
    for _, group in groupby(prompts, key=len):
        batch = list(group)
        generated = model.generate(
            torch.tensor(batch),
            attention_mask=torch.ones(len(batch), len(batch[0]), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = torch.stack(generated.logits, dim=1).float().log_softmax(dim=-1)
        for row, prompt in enumerate(batch):
            tokens = generated.sequences[row, len(prompt) :].tolist()
            references.append(Reference(prompt, tokens, logprobs[row]))
    return references


def greedy(num_tokens: int, logprobs: int | None = TOP_N) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs)


def generate_with_preemptions(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Like `engine.generate`, but every few steps some running sequence loses its blocks and starts again.

    No more than as many times as there are prompts: with small chunks, none would ever come to an end.
    """
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for index, (prompt, its_params) in enumerate(zip(prompts, every, strict=True)):
        engine.add(str(index), prompt, its_params)
    outputs: dict[str, RequestOutput] = {}
    draw = random.Random(0)
    steps = 0
    while engine.has_unfinished:
        steps += 1
        running = engine.scheduler.running
        if steps % 4 == 0 and running and engine.stats().preemptions < len(prompts):
            engine.scheduler.preempt(draw.choice(running))
        outputs.update((output.request_id, output) for output in engine.step())
        engine.check()
    assert engine.stats().preemptions >= len(prompts) / 2
    return [outputs[str(index)] for index in range(len(prompts))]


def assert_same(outputs: Sequence[RequestOutput], references: Sequence[Reference]) -> float:
    """The same tokens, and log-probabilities within `LOGPROB_TOLERANCE`; and the comparison means something.

    Returns the largest difference between two log-probabilities.
    """
    worst = 0.0
    for output, reference in zip(outputs, references, strict=True):
        assert output.error is None
        assert list(output.token_ids) == reference.token_ids
        logprobs = output.completions[0].logprobs
        assert logprobs is not None
        for position, ours in enumerate(logprobs):
            theirs = reference.logprobs[position]
            for token, logprob in ours.top:
                worst = max(worst, abs(logprob - float(theirs[token])))
    assert worst < LOGPROB_TOLERANCE
    assert min(reference.margin for reference in references) > 2 * worst, "the top two are too close: take another seed"
    assert len({token for reference in references for token in reference.token_ids}) > 30, "always the same few tokens"
    return worst


def assert_close(outputs: Sequence[RequestOutput], references: Sequence[Reference]) -> None:
    """The rule for bfloat16: where the two sides part, each one's token is among the other's best; no further."""
    for output, reference in zip(outputs, references, strict=True):
        assert output.error is None
        logprobs = output.completions[0].logprobs
        assert logprobs is not None
        for position, (ours, theirs) in enumerate(zip(output.token_ids, reference.token_ids, strict=True)):
            if ours != theirs:
                assert ours in reference.logprobs[position].topk(TOP_N).indices.tolist()
                assert theirs in [token for token, _ in logprobs[position].top]
                break
