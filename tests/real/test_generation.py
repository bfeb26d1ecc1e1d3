"""What users ask of a real model, beside greedy tokens: stops, schemas, several completions, seeds, one bit pattern."""

from __future__ import annotations

import json

import jsonschema
import pytest

from engine import Engine, RequestOutput, SamplingParams, StructuredOutputs
from tests.real.conftest import RealModel, engine_of

pytestmark = pytest.mark.slow

QUESTIONS = ("What is the capital of Japan?", "Write a haiku about rain.", "List three primary colors.")


def chats(model: RealModel, questions: tuple[str, ...] = QUESTIONS) -> list[list[int]]:
    return [model.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]


@pytest.fixture(scope="module")
def deterministic(smollm2: RealModel) -> Engine:
    return engine_of(smollm2.path, deterministic=True)


def test_smollm2_knows_the_capital_of_france(smollm2: RealModel) -> None:
    (output,) = smollm2.engine.generate(["The capital of France is"], SamplingParams(max_tokens=2, temperature=0.0))
    assert output.text.startswith(" Paris.")


def test_smollm2_ends_its_answer_by_itself(smollm2: RealModel) -> None:
    (output,) = smollm2.engine.generate(chats(smollm2)[:1], SamplingParams(max_tokens=40, temperature=0.0))
    assert output.finish_reason == "stop"
    assert "Tokyo" in output.text
    assert "<|im_end|>" not in output.text


def test_stop_string_cuts_the_text_that_would_have_come(smollm2: RealModel) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0)
    for whole in smollm2.engine.generate(chats(smollm2), params):
        middle = len(whole.text) // 2
        stop = whole.text[middle - 3 : middle + 4]
        first = whole.text.index(stop)
        stopped = SamplingParams(max_tokens=24, temperature=0.0, stop=(stop,))
        (output,) = smollm2.engine.generate([whole.prompt_token_ids], stopped)
        assert output.text == whole.text[:first]
        assert (output.finish_reason, output.completions[0].stop_reason) == ("stop", stop)
        assert len(output.token_ids) < len(whole.token_ids)


WORD = {"type": "string", "maxLength": 12}
SCHEMAS: tuple[dict[str, object], ...] = (
    {"properties": {"city": WORD, "country": WORD}, "required": ["city", "country"]},
    {"properties": {"colors": {"type": "array", "items": WORD, "maxItems": 3}}, "required": ["colors"]},
    {"properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}}, "required": ["answer", "sure"]},
)


def test_outputs_by_schema_parse_and_hold_it(smollm2: RealModel) -> None:
    schemas = [{"type": "object", "additionalProperties": False, **schema} for schema in SCHEMAS]
    params = [
        SamplingParams(max_tokens=64, temperature=0.0, structured_outputs=StructuredOutputs(json=schema))
        for schema in schemas
    ]
    outputs = smollm2.engine.generate(chats(smollm2), params)
    for output, schema in zip(outputs, schemas, strict=True):
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), schema)


def sampled(engine: Engine, prompts: list[list[int]], seed: int = 7, n: int = 3) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, n=n, seed=seed, logprobs=1)
    return engine.generate(prompts, params)


def test_completions_of_one_prompt_differ_and_repeat_by_their_seed(deterministic: Engine, smollm2: RealModel) -> None:
    prompts = chats(smollm2)
    together = sampled(deterministic, prompts)
    for prompt, output in zip(prompts, together, strict=True):
        assert len({tuple(completion.token_ids) for completion in output.completions}) == 3
        (alone,) = sampled(deterministic, [prompt])
        assert alone.completions == output.completions, "tokens and log-probabilities, bit by bit"
    others = sampled(deterministic, prompts, seed=8)
    assert all(one.completions != other.completions for one, other in zip(together, others, strict=True))


def test_deterministic_mode_changes_no_greedy_answer(deterministic: Engine, smollm2: RealModel) -> None:
    params = SamplingParams(max_tokens=16, temperature=0.0)
    usual = smollm2.engine.generate(chats(smollm2), params)
    exact = deterministic.generate(chats(smollm2), params)
    assert [output.text for output in exact] == [output.text for output in usual]
