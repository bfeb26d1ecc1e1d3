"""Structured output as the engine gives it: real grammars and tokenizers over a model that says anything."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from demo.tokenizer import build_tokenizer
from engine import Engine, EngineConfig, RequestOutput, SamplingParams, StructuredOutputs
from engine.errors import RequestRejected
from engine.grammar.limits import GrammarLimits
from engine.tokenization.tokenizer import Tokenizer
from tests.support.processes import await_condition
from tests.unit.engine.fake_runner import FakeRunner
from tests.unit.engine.grammar.test_compiler import PATIENCE, trials
from tests.unit.engine.hostile import HOSTILE
from tests.unit.engine.tokenization.test_tokenizer import byte_level, with_byte_fallback

EOS = 1
COMPACT = {"whitespace_flexible": False}


def make(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    eos: frozenset[int] = frozenset({EOS}),
    limits: GrammarLimits | None = None,
    num_blocks: int = 600,
    **settings: Any,
) -> Engine:
    tokenizer = tokenizer or byte_level()
    # Rows beyond the tokenizer's: models pad their vocabulary, and this one likes to say them.
    runner = FakeRunner(
        vocab_size=len(tokenizer) + 7, eos_token_ids=eos, num_blocks=num_blocks, block_size=8, max_model_len=400
    )
    config = EngineConfig(block_size=8, **{"max_num_seqs": 32, "max_num_batched_tokens": 128, **settings})
    return Engine(runner, Tokenizer(tokenizer), config, grammar_limits=limits)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make()


def finish(engine: Engine, within: float = PATIENCE) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    give_up = time.monotonic() + within
    while engine.has_unfinished:
        assert time.monotonic() < give_up
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check()
    return outputs


def params(max_tokens: int = 200, n: int = 1, seed: int = 0, **wanted: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=n, seed=seed, structured_outputs=StructuredOutputs(**wanted))


def one(engine: Engine, params: SamplingParams) -> RequestOutput:
    (output,) = engine.generate([[5, 6]], [params])
    return output


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte fallback": with_byte_fallback,
    "characters": lambda: build_tokenizer(100),
}


@pytest.mark.parametrize("make_tokenizer", KINDS.values(), ids=KINDS)
def test_output_follows_each_kind_of_grammar_with_each_tokenizer(
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
) -> None:
    engine = make(make_tokenizer())
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b c"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    wanted: list[dict[str, Any]] = [
        {"json": schema},
        {"regex": "[0-9]{3}-[a-f]{2,4}"},
        {"choice": [" yes", "no", "perhaps"]},
        {"grammar": 'start: "(" start ")" | "x" | "[" start "]"'},
    ]
    every = [params(seed=seed, **one) for one in wanted for seed in range(6)]
    outputs = engine.generate([[5, 6]] * len(every), every)
    for output, asked in zip(outputs, every, strict=True):
        assert output.error is None
        if output.finish_reason != "stop":
            assert asked.structured_outputs is not None
            assert asked.structured_outputs.kind in ("json", "grammar"), "blanks and brackets may go on for long"
            continue
        if asked.structured_outputs == StructuredOutputs(json=schema):
            jsonschema.validate(json.loads(output.text), schema)
        elif asked.structured_outputs == StructuredOutputs(regex="[0-9]{3}-[a-f]{2,4}"):
            assert re.fullmatch("[0-9]{3}-[a-f]{2,4}", output.text)
        elif asked.structured_outputs == StructuredOutputs(choice=[" yes", "no", "perhaps"]):
            assert output.text in (" yes", "no", "perhaps")
    assert sum(output.finish_reason == "stop" for output in outputs) > len(outputs) / 2


# Schemas whose outputs end soon, with any model.
CONSTANTS = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text('aé"\\\n', max_size=4))
LEAVES = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-99, 99),
        st.integers(0, 500),
    ),
    st.builds(lambda options: {"enum": options}, st.lists(CONSTANTS, min_size=1, max_size=4, unique_by=repr)),
    st.just({"type": "boolean"}),
    st.just({"type": ["null", "boolean"]}),
    st.builds(lambda n: {"type": "string", "pattern": f"^[a-c]{{1,{n}}}-?x$"}, st.integers(1, 4)),
)
NAMES = st.text("abcdé _", min_size=1, max_size=5)


def objects(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], optional: set[str]) -> dict[str, Any]:
        required = [name for name in properties if name not in optional]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return st.builds(build, st.dictionaries(NAMES, children, max_size=4), st.sets(NAMES, max_size=2))


SCHEMAS = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        objects(children),
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, children, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(children, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_outputs_of_random_schemas_validate(engine: Engine, schema: dict[str, Any], seed: int) -> None:
    wanted = {"x-guidance": COMPACT, **schema}
    output = one(engine, params(max_tokens=390, seed=seed, json=wanted))
    assert output.error is None
    assert output.finish_reason == "stop", output.text
    jsonschema.validate(json.loads(output.text), schema)


class TestEnds:
    def test_output_ends_with_the_grammar_when_nothing_can_follow(self, engine: Engine) -> None:
        output = one(engine, params(choice=["a"]))
        assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", None)
        assert len(output.token_ids) == 1

    def test_output_ends_with_the_grammar_before_min_tokens(self, engine: Engine) -> None:
        output = one(engine, replace(params(choice=["ab"]), min_tokens=50))
        assert (output.text, output.finish_reason) == ("ab", "stop")

    def test_end_of_sequence_is_sampled_only_where_the_grammar_may_end(self, engine: Engine) -> None:
        outputs = [one(engine, params(regex="(ab)*", seed=seed)) for seed in range(10)]
        ended = [output for output in outputs if output.token_ids[-1] == EOS]
        assert ended
        assert all(re.fullmatch("(ab)*", output.text) for output in ended)
        assert not any(EOS in output.token_ids[:-1] for output in outputs)

    def test_ignored_end_of_sequence_does_not_end_the_output(self, engine: Engine) -> None:
        output = one(engine, replace(params(regex="(ab)*", max_tokens=41), ignore_eos=True))
        assert output.finish_reason == "length"
        assert output.text.startswith("abab")
        assert EOS not in output.token_ids

    @pytest.mark.parametrize("regex", ["[xy]{3}", "(?s:.)x?é?"])
    def test_output_ends_with_the_grammar_when_the_model_has_no_end_of_sequence(self, regex: str) -> None:
        # The demo's tokenizer has no é: what only it could continue is complete.
        output = one(make(build_tokenizer(100), eos=frozenset()), params(regex=regex))
        assert output.finish_reason == "stop"
        assert re.fullmatch(regex, output.text)

    def test_finish_reason_is_length_when_the_grammar_is_incomplete(self, engine: Engine) -> None:
        output = one(engine, params(max_tokens=3, regex="a{200}"))
        assert output.finish_reason == "length"
        # Complete with the very last token is complete.
        assert one(engine, params(max_tokens=1, choice=["a"])).finish_reason == "stop"

    def test_stop_string_ends_the_output_inside_a_grammar(self, engine: Engine) -> None:
        output = one(engine, replace(params(regex="a{3}b{200}"), stop=["bb"]))
        assert (output.text, output.finish_reason, output.stop_reason) == ("aaa", "stop", "bb")

    def test_empty_grammar_gives_an_empty_output(self, engine: Engine) -> None:
        output = one(engine, params(regex=""))
        assert (output.text, output.finish_reason) == ("", "stop")

    def test_request_fails_when_the_model_has_no_token_for_the_grammar(self) -> None:
        output = one(make(build_tokenizer(100)), params(regex="[ab]{40}é"))
        assert output.finish_reason == "error"
        assert output.error_code == "generation_failed"  # only the model's vocabulary stands in the way
        assert "no token of the model" in (output.error or "")


def test_other_parameters_hold_beside_a_grammar(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    output = one(engine, replace(params(regex="[ab]{5}"), banned_token_ids=[a], logprobs=2))
    assert "a" not in output.text or a not in output.token_ids
    assert len(output.logprobs or ()) == len(output.token_ids)
    # Of the model's own distribution, before any ban.
    assert any(token not in output.token_ids for position in output.logprobs or () for token, _ in position.top)
    output = one(engine, replace(params(regex="b{5}"), allowed_token_ids=[a]))
    assert "no token is allowed" in (output.error or "")
    assert output.error_code == "generation_failed"


def test_completions_keep_their_own_grammar_state(engine: Engine) -> None:
    (output,) = engine.generate([[5, 6]], [replace(params(n=8, regex="[a-e]{4}[0-9]{4}"), temperature=2.0)])
    texts = [completion.text for completion in output.completions]
    assert all(re.fullmatch("[a-e]{4}[0-9]{4}", text) for text in texts)
    assert len(set(texts)) > 4


def test_structured_output_is_unchanged_by_preemption() -> None:
    every = [replace(params(seed=seed, regex="([a-e]{3}-){12}", max_tokens=64), ignore_eos=True) for seed in range(12)]
    prompts = [[5, seed + 6] for seed in range(12)]
    engine = make()
    expected = [output.token_ids for output in engine.generate(prompts, every)]
    for number, (prompt, wanted) in enumerate(zip(prompts, every, strict=True)):
        engine.add(str(number), prompt, wanted)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        for sequence in [s for s in engine.scheduler.running if s.num_output % 7 == 3]:
            engine.scheduler.preempt(sequence)
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check()
    assert [outputs[str(number)].token_ids for number in range(12)] == expected
    assert engine.stats().preemptions >= 12


def test_structured_output_is_refused_without_a_tokenizer() -> None:
    engine = Engine(FakeRunner(), None, EngineConfig(block_size=4))
    with pytest.raises(RequestRejected, match="tokenizer"):
        engine.add("r", [1], params(regex="a"))


class TestWhileCompiling:
    """A process that tries a grammar is stopped, as one that hangs would be; then the steps are counted."""

    def hanging(self) -> tuple[Engine, int]:
        before = trials()
        engine = make(limits=GrammarLimits(workers=1, patience=PATIENCE), decode_steps=1)
        assert one(engine, params(choice=["a"])).text == "a"
        (pid,) = trials() - before
        os.kill(pid, signal.SIGSTOP)
        return engine, pid

    def test_other_requests_run_while_a_grammar_compiles(self) -> None:
        engine, pid = self.hanging()
        engine.add("waits", [5], params(regex="[ab]{3}"))
        free = SamplingParams(max_tokens=20, ignore_eos=True)
        for number in range(4):
            engine.add(f"free-{number}", [number + 5], free)
        ended: list[str] = []
        for _ in range(20):  # exactly as many as their tokens
            assert engine.can_step
            ended += [output.request_id for output in engine.step()]
            engine.check()
        assert sorted(ended) == [f"free-{number}" for number in range(4)]
        assert not engine.can_step
        assert engine.has_unfinished
        stats = engine.stats()
        assert (stats.compiling, stats.running, stats.waiting) == (1, 0, 0)
        steps = stats.steps
        assert engine.step() == []  # waits a moment, and is no step
        assert engine.stats().steps == steps
        os.kill(pid, signal.SIGCONT)
        assert finish(engine)["waits"].finish_reason == "stop"

    def test_num_requests_wanted_counts_requests_that_wait_for_their_grammar(self) -> None:
        engine, pid = self.hanging()
        room = engine.num_requests_wanted()
        for number in range(room):
            engine.add(str(number), [5], params(regex="[ab]{3}"))
        assert engine.num_requests_wanted() == 0
        os.kill(pid, signal.SIGCONT)
        finish(engine)

    def test_on_compiled_is_called_when_compilation_ends(self) -> None:
        engine, pid = self.hanging()
        told: list[bool] = []
        engine.on_compiled = lambda: told.append(engine.can_step)
        engine.add("waits", [5], params(regex="[ab]{3}"))
        assert not engine.can_step
        os.kill(pid, signal.SIGCONT)
        await_condition(lambda: bool(told), "the call")
        assert told == [True]
        assert finish(engine)["waits"].error is None

    def test_request_can_be_aborted_while_its_grammar_compiles(self) -> None:
        engine, pid = self.hanging()
        engine.add("waits", [5], params(regex="[ab]{3}", n=2))
        engine.abort("waits")
        engine.check()
        (output,) = engine.step()
        assert output.finish_reason == "abort"
        assert not engine.has_unfinished
        # The same name again, while the first one's grammar is still under way.
        engine.add("waits", [5], params(regex="[ab]{3}"))
        os.kill(pid, signal.SIGCONT)
        assert finish(engine)["waits"].error is None
        assert engine.stats().compiling == 0

    def test_death_of_a_trial_process_fails_only_its_request(self) -> None:
        engine, pid = self.hanging()
        engine.add("waits", [5], params(regex="[ab]{3}"))
        engine.add("free", [5], SamplingParams(max_tokens=5, ignore_eos=True))
        os.kill(pid, signal.SIGKILL)
        outputs = finish(engine)
        assert outputs["free"].finish_reason == "length"
        assert outputs["waits"].error_code == "invalid_grammar"
        assert "SIGKILL" in (outputs["waits"].error or "")
        assert one(engine, params(choice=["b"])).text == "b"


def _schema(number: int, draw: random.Random) -> dict[str, Any]:
    """A different schema for each number, with outputs of some forty tokens at most."""
    properties: dict[str, Any] = {f"n{number}": {"type": "integer", "minimum": 0, "maximum": draw.randrange(1, 1000)}}
    for place in range(draw.randrange(3)):
        properties[f"p{place}"] = draw.choice(
            [
                {"type": "string", "maxLength": draw.randrange(1, 6)},
                {"enum": ["red", "green", None, 7]},
                {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                {"type": "string", "pattern": "^[a-c]{1,3}$"},
                {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 5}]},
            ]
        )
    return {
        "x-guidance": COMPACT,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("requests", "hostile"),
    [(60, 8), pytest.param(1000, 52, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
def test_hostile_schemas_do_not_change_other_outputs(requests: int, hostile: int) -> None:
    draw = random.Random(5)
    schemas = [_schema(number, draw) for number in range(requests)]
    names = list(HOSTILE)[:: len(HOSTILE) // hostile][:hostile]
    good = {f"good-{n}": params(max_tokens=150, seed=n, json=schema) for n, schema in enumerate(schemas)}
    bad = {f"bad-{name}": SamplingParams(max_tokens=30, structured_outputs=HOSTILE[name]) for name in names}
    mixed = [*good, *bad]
    draw.shuffle(mixed)

    def run(names: list[str]) -> dict[str, RequestOutput]:
        engine = make()
        outputs = {}
        queue = iter(names)
        give_up = time.monotonic() + 1000
        while len(outputs) < len(names):
            assert time.monotonic() < give_up
            for name in itertools.islice(queue, engine.num_requests_wanted()):
                engine.add(name, [5, 6], (good | bad)[name])
            outputs |= {output.request_id: output for output in engine.step()}
        engine.close()
        return outputs

    alone, together = run(list(good)), run(mixed)
    assert [together[name].token_ids for name in good] == [alone[name].token_ids for name in good]
    for number, schema in enumerate(schemas):
        output = together[f"good-{number}"]
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), schema)
    for name in bad:
        output = together[name]
        assert output.finish_reason in ("error", "length", "stop")
        assert output.error_code in (None, "invalid_grammar")
