"""Tokens that a grammar demands: how they are spelled, and what they change in a request."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast

from demo.tokenizer import build_tokenizer
from engine import Engine, EngineConfig, RequestOutput, SamplingParams, StructuredOutputs
from engine.grammar.source import grammar_text
from engine.grammar.vocabulary import Vocabulary
from engine.tokenization.tokenizer import Tokenizer
from tests.unit.engine.fake_runner import FakeRunner
from tests.unit.engine.tokenization.test_tokenizer import byte_level, with_byte_fallback

EOS = 1
KINDS = {"byte-level": byte_level, "byte fallback": with_byte_fallback, "characters": lambda: build_tokenizer(100)}

LONG = "the quick brown fox jumps over the lazy dog"
FORCED = f"[ab]{{2}}{LONG}[ab]{{3}}"
"""Two free tokens, a text without a choice, three free tokens."""


def make(tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> Engine:
    tokenizer = tokenizer or byte_level()
    runner = FakeRunner(
        vocab_size=len(tokenizer) + 7, eos_token_ids=frozenset({EOS}), num_blocks=200, block_size=8, max_model_len=400
    )
    config = EngineConfig(block_size=8, **{"max_num_seqs": 32, "max_num_batched_tokens": 128, **settings})
    return Engine(runner, Tokenizer(tokenizer), config)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make()


def params(regex: str = FORCED, **more: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 100, "seed": 3, "structured_outputs": StructuredOutputs(regex=regex), **more}
    )


def one(engine: Engine, params: SamplingParams) -> RequestOutput:
    (output,) = engine.generate([[5, 6]], [params])
    assert output.error is None
    return output


def num_steps(engine: Engine, params: SamplingParams) -> tuple[RequestOutput, int]:
    one(engine, params)  # the grammar compiles, and the prompt is cached
    before = engine.stats().steps
    output = one(engine, params)
    return output, engine.stats().steps - before


class TestSpelling:
    @pytest.mark.parametrize("make_tokenizer", KINDS.values(), ids=KINDS)
    def test_forced_tokens_are_those_of_the_tokenizer(self, make_tokenizer: Any) -> None:
        tokenizer = make_tokenizer()
        vocabulary = Vocabulary.of(tokenizer, len(tokenizer) + 7, {EOS})
        text = grammar_text(StructuredOutputs(regex=f"x{LONG}[ab]"), forces=True)
        matcher = LLMatcher(vocabulary.for_llguidance, text, log_level=0)
        forced = matcher.compute_ff_tokens()
        spelled = vocabulary.decode(forced, skip_special_tokens=False)
        assert f"x{LONG}".startswith(spelled)
        assert len(spelled) > len(LONG) - 10, "all but what the next character may change"
        expected = Tokenizer(tokenizer).encode(f"x{LONG}", add_special_tokens=False)
        if vocabulary.tokens[expected[0]] == b" ":  # SentencePiece's, before every text
            del expected[0]
        assert forced == expected[: len(forced)]

    def test_text_in_tokens_equals_the_tokenizers_whole_spelling(self, engine: Engine) -> None:
        output = one(engine, params())
        assert engine.tokenizer is not None
        # Not two spellings of one text: what the model chose, and in between what the tokenizer says.
        inner = engine.tokenizer.encode(LONG, add_special_tokens=False)
        tokens = list(output.token_ids)
        assert any(tokens[start : start + len(inner) - 1] == inner[:-1] for start in range(len(tokens)))

    def test_special_tokens_name_in_forced_text_is_spelled_as_text(self, engine: Engine) -> None:
        output = one(engine, params("a</s>b{20}"))
        assert output.text == "a</s>" + 20 * "b"
        assert EOS not in output.token_ids

    def test_text_without_a_token_ends_its_request_alone(self) -> None:
        engine = make(build_tokenizer(100))
        bad, good = engine.generate([[5, 6], [5, 6]], [params("[ab]{40}é{3}x"), params("[ab]{2}cd")])
        assert bad.error_code == "generation_failed"
        assert "no token of the model" in (bad.error or "")
        assert good.error is None


class TestSteps:
    def test_forced_tokens_take_no_steps(self, engine: Engine) -> None:
        output, steps = num_steps(engine, params())
        assert output.text[2:-3] == LONG
        free = len(output.token_ids) - len(engine.tokenizer.encode(LONG, add_special_tokens=False))  # type: ignore[union-attr]
        assert steps <= free + 2
        assert len(output.token_ids) > 2 * steps

    def test_log_probabilities_make_them_sampled_one_by_one_and_change_no_token(self, engine: Engine) -> None:
        output = one(engine, params())
        scored, steps = num_steps(engine, params(logprobs=2))
        assert scored.token_ids == output.token_ids
        assert steps == len(scored.token_ids)
        assert [each.token_id for each in scored.logprobs or ()] == list(scored.token_ids)

    def test_usage_counts_forced_tokens(self, engine: Engine) -> None:
        before = engine.stats().output_tokens
        output = one(engine, params())
        assert engine.stats().output_tokens - before == len(output.token_ids)

    def test_forced_tokens_end_with_max_tokens(self, engine: Engine) -> None:
        before = engine.stats().output_tokens
        output = one(engine, params(max_tokens=6))
        assert (len(output.token_ids), output.finish_reason) == (6, "length")
        assert engine.stats().output_tokens - before == 6
        assert output.text[2:] == LONG[: len(output.text) - 2]

    def test_stop_string_in_forced_text_cuts_it(self, engine: Engine) -> None:
        output = one(engine, params(stop=["brown"]))
        assert output.text[2:] == "the quick "
        assert (output.finish_reason, output.completions[0].stop_reason) == ("stop", "brown")
        assert len(output.token_ids) < len(one(engine, params()).token_ids)

    def test_stop_token_in_forced_text_ends_the_output(self, engine: Engine) -> None:
        whole = one(engine, params())
        place = len(whole.token_ids) // 2
        output = one(engine, params(stop_token_ids=[whole.token_ids[place]]))
        first = list(whole.token_ids).index(whole.token_ids[place])
        assert list(output.token_ids) == list(whole.token_ids[: first + 1])
        assert output.completions[0].stop_reason == whole.token_ids[place]

    def test_stop_token_before_min_tokens_leaves_the_spelling_to_the_model(self, engine: Engine) -> None:
        whole = one(engine, params())
        banned = whole.token_ids[4]
        output = one(engine, params(stop_token_ids=[banned], min_tokens=90))
        assert output.text == output.text[:2] + LONG + output.text[-3:]
        assert banned not in output.token_ids

    def test_banned_token_leaves_the_spelling_to_the_model(self, engine: Engine) -> None:
        banned = one(engine, params()).token_ids[4]
        output = one(engine, params(banned_token_ids=[banned]))
        assert output.text[2:-3] == LONG
        assert banned not in output.token_ids

    def test_penalties_count_forced_tokens(self, engine: Engine) -> None:
        regex = "(the ){9}[a-z]{3}"
        plain = one(engine, params(regex, temperature=0.0))
        penalized = one(engine, params(regex, temperature=0.0, presence_penalty=2.0, logprobs=0))
        together = one(engine, params(regex, temperature=0.0, presence_penalty=2.0))
        assert together.token_ids == penalized.token_ids
        assert plain.text[:36] == together.text[:36]


def asked() -> list[tuple[list[int], SamplingParams]]:
    """Requests with forced text of several places and lengths, and free ones between them."""
    regexes = [f"[ab]{{{n % 3 + 1}}}{LONG}[cd]{{{n % 4}}}( and [a-f]{{2}}){{2}}" for n in range(10)]
    forced = [([5, 6, n + 7], params(regex, seed=n)) for n, regex in enumerate(regexes)]
    free = [([5, 6, n + 7], SamplingParams(max_tokens=40, ignore_eos=True, seed=n)) for n in range(5)]
    return [*forced, *free]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    engine = make(enable_prefix_caching=False, decode_steps=1)
    return [list(engine.generate([prompt], [wanted])[0].token_ids) for prompt, wanted in asked()]


class TestTogether:
    """Neighbours, chunks, preemptions, the prefix cache and several steps at once change nothing."""

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"decode_steps": 8},
            {"enable_prefix_caching": False},
            {"max_num_batched_tokens": 16},
            {"max_num_seqs": 3},
        ],
        ids=str,
    )
    def test_outputs_are_those_of_each_request_alone(self, alone: list[list[int]], settings: dict[str, Any]) -> None:
        prompts, wanted = zip(*asked(), strict=True)
        for _ in range(2):  # again, with all prefixes cached
            outputs = make(**settings).generate(list(prompts), list(wanted))
            assert [list(output.token_ids) for output in outputs] == alone

    def test_preemption_within_a_forced_text_changes_nothing(self, alone: list[list[int]]) -> None:
        engine = make(max_num_batched_tokens=16)
        for number, (prompt, wanted) in enumerate(asked()):
            engine.add(str(number), prompt, wanted)
        outputs: dict[str, RequestOutput] = {}
        while engine.has_unfinished:
            for sequence in [s for s in engine.scheduler.running if s.num_tokens - s.num_computed_tokens > 3][:1]:
                if sequence.num_output and sequence.num_started < 4:
                    engine.scheduler.preempt(sequence)
            outputs |= {output.request_id: output for output in engine.step()}
            engine.check()
        assert engine.stats().preemptions >= 5
        assert [list(outputs[str(number)].token_ids) for number in range(len(alone))] == alone

    def test_completions_of_one_request_share_the_forced_text_and_differ_elsewhere(self, engine: Engine) -> None:
        output = one(engine, replace(params(), n=6, temperature=2.0))
        texts = [completion.text for completion in output.completions]
        assert all(text[2:-3] == LONG for text in texts)
        assert len(set(texts)) > 3


def test_json_keys_are_forced_between_the_blanks_that_the_model_chooses(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"description": {"enum": ["a", "b"]}, "recommendation": {"type": "boolean"}},
        "required": ["description", "recommendation"],
        "additionalProperties": False,
    }
    wanted = params(structured_outputs=StructuredOutputs(json=schema))
    output, steps = num_steps(engine, wanted)
    assert json.loads(output.text).keys() == {"description", "recommendation"}
    assert steps < len(output.token_ids)
