"""JSON by schema from SmolLM2: spelled as the model would, beside transformers under llguidance's own masks."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from engine import SamplingParams, StructuredOutputs
from engine.grammar.source import grammar_text
from tests.real.conftest import RealModel

pytestmark = pytest.mark.slow

TIE = 1e-3
"""Nats by which transformers may like another allowed token better than the one that was taken."""

WORD = {"type": "string", "maxLength": 16}
PHRASE = {"type": "string", "maxLength": 60}
WORDS = {"type": "array", "items": WORD, "minItems": 1, "maxItems": 3}
SMALL = {"type": "integer", "minimum": 0, "maximum": 59}
PAIR = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

TASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Classify the review: Great phone, battery lasts two days.", {"sentiment": {"enum": ["positive", "negative"]}}),
    (
        "Classify the review: It broke after a week.",
        {"sentiment": {"enum": ["positive", "negative"]}, "reason": PHRASE},
    ),
    ("Ada Lovelace was born in London in 1815.", {"name": WORD, "city": WORD, "year": {"type": "integer"}}),
    ("Name three primary colors.", {"colors": WORDS}),
    ("Is water wet?", {"answer": {"enum": ["yes", "no", "unknown"]}, "is_certain": {"type": "boolean"}}),
    ("Order: 2 apples and 3 pears.", {"apples": {"type": "integer"}, "pears": {"type": "integer"}}),
    ("Capital of France?", {"capital_city": {"const": "Paris"}, "country": {"properties": {"name": WORD}}}),
    ("Give a title for a story about rain.", {"title": PHRASE, "number_of_pages": {"type": "integer", "maximum": 999}}),
    ("Is 7 a prime number?", {"number": {"type": "integer"}, "is_prime": {"type": "boolean"}}),
    ("Mixed up: red, dog, blue, cat.", {"colors": WORDS, "animals": WORDS}),
    ("The meeting is on Monday at 9:30.", {"day_of_week": {"enum": list(DAYS)}, "hour": SMALL, "minute": SMALL}),
    ("Translate to French: good morning.", {"source_language": {"const": "English"}, "translated_text": PHRASE}),
    ("Coffee 2.50, cake 4.25.", {"coffee_price": {"type": "number"}, "cake_price": {"type": "number"}}),
    ("Dr. Smith sees Ann and Bob.", {"doctor": {"properties": {"last_name": WORD}}, "patients": WORDS}),
    ("Rate the hotel: clean room, rude staff.", {"rating": {"enum": [1, 2, 3, 4, 5]}, "complaint": PHRASE}),
    ("Is the user signed in? Nothing is known.", {"signed_in": {"type": ["boolean", "null"]}, "user_name": WORD}),
    ("Which team won, Reds 3, Blues 1?", {"winner": {"enum": ["Reds", "Blues"]}, "score": PAIR}),
    (
        "Tag the article: New telescope sees oldest star.",
        {"topic": WORD, "tags": WORDS, "is_news": {"type": "boolean"}},
    ),
    ("Mail: help@example.org, phone 555-0100.", {"e_mail_address": WORD, "phone_number": WORD}),
    ("Plan a trip to Rome.", {"destination": {"properties": {"city": WORD, "country": WORD}}, "days": SMALL}),
)


def schema_of(properties: dict[str, Any]) -> dict[str, Any]:
    closed = {
        name: {"type": "object", "required": list(each["properties"]), "additionalProperties": False, **each}
        if "properties" in each
        else each
        for name, each in properties.items()
    }
    return {"type": "object", "properties": closed, "required": list(closed), "additionalProperties": False}


def prompts_of(model: RealModel) -> list[list[int]]:
    return [
        model.tokenizer.encode_chat(
            [{"role": "user", "content": f"{task} Answer in JSON with {', '.join(properties)}."}]
        )
        for task, properties in TASKS
    ]


def params_of(schema: dict[str, Any], **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=64, temperature=0.0, structured_outputs=StructuredOutputs(json=schema), **more)


def test_structured_outputs_equal_transformers_under_the_librarys_own_masks(smollm2: RealModel) -> None:
    """The masks are computed from transformers' tokenizer by llguidance alone, without our vocabulary."""
    schemas = [schema_of(properties) for _, properties in TASKS]
    prompts = prompts_of(smollm2)
    outputs = smollm2.engine.generate(prompts, [params_of(schema) for schema in schemas])
    tokenizer = from_tokenizer(smollm2.reference_tokenizer)
    for prompt, schema, output in zip(prompts, schemas, outputs, strict=True):
        assert output.error is None
        tokens = list(output.token_ids)
        theirs = smollm2.reference_logprobs(prompt, tokens)
        text = grammar_text(StructuredOutputs(json=schema), forces=True)
        matcher = LLMatcher(tokenizer, text, log_level=0)
        for place, token in enumerate(tokens):
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = torch.from_numpy(mask[: theirs.shape[1]].astype(bool))
            assert allowed[token], f"{output.text!r} leaves the masks at token {place}"
            best = float(theirs[place][allowed].max())
            assert best - float(theirs[place, token]) < TIE, f"{output.text!r} leaves transformers' at token {place}"
            assert matcher.consume_token(token)


def test_structured_outputs_are_finished_and_hold_their_schema(smollm2: RealModel) -> None:
    schemas = [schema_of(properties) for _, properties in TASKS]
    outputs = smollm2.engine.generate(prompts_of(smollm2), [params_of(schema) for schema in schemas])
    for output, schema in zip(outputs, schemas, strict=True):
        assert output.finish_reason == "stop", output.text
        jsonschema.validate(json.loads(output.text), schema)
    assert json.loads(outputs[0].text)["sentiment"] == "positive"


def test_forced_tokens_save_steps_of_json(smollm2: RealModel) -> None:
    saved = []
    for prompt, (_, properties) in zip(prompts_of(smollm2), TASKS, strict=True):
        before = smollm2.engine.stats().steps
        (output,) = smollm2.engine.generate([prompt], params_of(schema_of(properties)))
        saved.append((len(output.token_ids), smollm2.engine.stats().steps - before))
    tokens, steps = (sum(column) for column in zip(*saved, strict=True))
    assert steps < tokens * 0.9, f"{tokens} tokens in {steps} steps"


def test_log_probabilities_of_forced_tokens_are_the_models(smollm2: RealModel) -> None:
    prompt, (_, properties) = prompts_of(smollm2)[0], TASKS[0]
    plain, scored = smollm2.engine.generate(
        [prompt] * 2, [params_of(schema_of(properties), **more) for more in ({}, {"logprobs": 1})]
    )
    assert scored.token_ids == plain.token_ids
    theirs = smollm2.reference_logprobs(prompt, list(scored.token_ids))
    assert scored.logprobs is not None
    for place, ours in enumerate(scored.logprobs):
        assert abs(ours.logprob - float(theirs[place, ours.token_id])) < 2e-3
