"""Compiling: what comes out, what is kept, and what strangers cannot do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from llguidance import LLMatcher

from engine import StructuredOutputs
from engine.errors import GrammarError
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.limits import GrammarLimits
from engine.grammar.matcher import Grammar, MaskFiller, Matcher
from engine.grammar.source import grammar_text
from engine.grammar.trial_process import TrialFailed, TrialProcess
from engine.grammar.vocabulary import UnreadableVocabulary, Vocabulary
from tests.support.processes import await_condition
from tests.unit.engine.hostile import HOSTILE
from tests.unit.engine.tokenization.test_tokenizer import byte_level

PATIENCE = 120


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = byte_level()
    return Vocabulary.of(tokenizer, len(tokenizer) + 13, {1})


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(lambda: vocabulary)
    yield compiler
    compiler.close()


def compiled(compiler: GrammarCompiler, *, forces: bool = False, **wanted: object) -> Grammar:
    return compiler.request(StructuredOutputs(**wanted), forces=forces).result(PATIENCE)  # type: ignore[arg-type]


def spelled(vocabulary: Vocabulary, text: str) -> list[int]:
    """A text byte by byte."""
    return [vocabulary.tokens.index(bytes([byte])) for byte in text.encode()]


def allowed(matcher: Matcher, *, ignore_eos: bool = False) -> set[int]:
    masks = MaskFiller().fill([matcher], [ignore_eos])
    assert not masks.failed
    return {t for t in range(masks.words.shape[1] * 32) if masks.words[0, t // 32] >> (t % 32) & 1}


class TestGrammar:
    @pytest.mark.parametrize(
        ("wanted", "accepted", "rejected"),
        [
            ({"json": {"enum": ["é", 1.5, None]}}, ['"é"', "1.5", "null"], ['"e"', "1.50", "true"]),
            ({"json": '{"type": "array", "items": {"type": "integer"}}'}, ["[]", "[1, 2]", "[\n1\n]"], ["[1.5]", "{}"]),
            ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", "{'a': 1}"]),
            ({"regex": "a/b+\n?é"}, ["a/bé", "a/bbb\né"], ["a/é", "xa/bé"]),
            ({"regex": "^[ab]{2}$"}, ["ab"], ["a", "abb"]),
            ({"choice": [" yes", "ye", 'n"o\n\x01/', "é"]}, [" yes", "ye", 'n"o\n\x01/', "é"], ["yes", "no"]),
            ({"choice": ["a\x7fb", "\\x7f", "\u2028"]}, ["a\x7fb", "\\x7f", "\u2028"], ["ab", "\x7f"]),
            ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["((x)", "()"]),
            ({"grammar": "start: NUM\nNUM: /[0-9]+/"}, ["12"], ["1a"]),
            ({"grammar": 'start: "x"\n%llguidance {"no_forcing": false}'}, ["x"], ["y"]),
        ],
        ids=str,
    )
    def test_grammar_accepts_its_language_alone(
        self,
        compiler: GrammarCompiler,
        vocabulary: Vocabulary,
        wanted: dict[str, object],
        accepted: list[str],
        rejected: list[str],
    ) -> None:
        grammar = compiled(compiler, **wanted)
        for text in accepted:
            matcher = grammar.start()
            for token in spelled(vocabulary, text):
                assert token in allowed(matcher), text
                matcher.accept(token)
            assert matcher.is_complete or 1 in allowed(matcher), text
        for text in rejected:
            matcher = grammar.start()
            follows = True
            for token in spelled(vocabulary, text):
                follows = token in allowed(matcher)
                if not follows:
                    break
                matcher.accept(token)
            assert not follows or not (matcher.is_complete or 1 in allowed(matcher)), text

    def test_end_of_sequence_is_allowed_only_when_the_grammar_may_end(
        self, compiler: GrammarCompiler, vocabulary: Vocabulary
    ) -> None:
        (a,) = spelled(vocabulary, "a")
        matcher = compiled(compiler, regex="a{2,3}").start()
        assert 1 not in allowed(matcher)
        matcher.accept(a)
        matcher.accept(a)
        assert 1 in allowed(matcher)
        assert 1 not in allowed(matcher, ignore_eos=True)
        matcher.accept(1)  # the end itself is no part of a grammar
        assert not matcher.is_complete
        matcher.accept(a)
        assert matcher.is_complete
        assert MaskFiller().fill([matcher], [False]).complete == [0]

    def test_masks_exclude_special_tokens_and_padding_from_text(
        self, compiler: GrammarCompiler, vocabulary: Vocabulary
    ) -> None:
        within = allowed(compiled(compiler, regex="(?s:.*)").start(), ignore_eos=True)
        assert within == {t for t, text in enumerate(vocabulary.tokens) if text and t not in vocabulary.special} - {
            t for t, text in enumerate(vocabulary.tokens) if text[:1] and text[0] in _NEVER_FIRST
        }

    def test_grammar_may_name_special_tokens_but_no_padding(
        self, compiler: GrammarCompiler, vocabulary: Vocabulary
    ) -> None:
        assert allowed(compiled(compiler, grammar='start: <s> "a"').start()) == {0}
        everything = allowed(compiled(compiler, grammar="start: <[*]>").start())
        assert everything == {t for t, text in enumerate(vocabulary.tokens) if text}

    @pytest.mark.parametrize(
        ("blanks", "too_many"), [(" ", " "), (" ", "\n"), ("\n", "\n"), ("\n" + 32 * " ", " "), ("\r\n\t\t", "\n")]
    )
    def test_blanks_between_json_tokens_are_a_space_or_a_line_break_and_an_indent(
        self, compiler: GrammarCompiler, vocabulary: Vocabulary, blanks: str, too_many: str
    ) -> None:
        (blank,) = spelled(vocabulary, too_many)
        matcher = compiled(compiler, json={"type": "array", "items": {"type": "null"}}).start()
        for token in spelled(vocabulary, f"[{blanks}"):
            matcher.accept(token)
        assert blank not in allowed(matcher)
        with pytest.raises(GrammarError):
            matcher.accept(blank)

    def test_blanks_are_those_that_the_schema_asks_for(self, compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
        schema = {"type": "array", "items": {"type": "null"}, "x-guidance": {"whitespace_pattern": "_{3}"}}
        matcher = compiled(compiler, json=schema).start()
        for token in spelled(vocabulary, "[___null"):
            assert token in allowed(matcher)
            matcher.accept(token)
        assert not allowed(matcher) & set(spelled(vocabulary, " \n"))

    def test_dead_end_is_no_grammar_error(self) -> None:
        """The form wants a byte that no token of this model has."""
        vocabulary = Vocabulary([b"<end>", b"a", b"b"], (), {0}, 3)
        text = grammar_text(StructuredOutputs(grammar='start: "a" "x"'))
        grammar = Grammar(LLMatcher(vocabulary.for_llguidance, text, log_level=0), vocabulary, 0)
        matcher = grammar.start()
        matcher.accept(1)
        (error,) = MaskFiller().fill([matcher], [False]).failed.values()
        assert not isinstance(error, GrammarError)
        assert "cannot be finished" in str(error)
        assert not grammar.is_broken

    def test_masks_of_a_batch_equal_those_of_each_matcher(
        self, compiler: GrammarCompiler, vocabulary: Vocabulary
    ) -> None:
        matchers = [compiled(compiler, regex=regex).start() for regex in ("a+", "[ab]+", "a+", "c")]
        matchers[0].accept(*spelled(vocabulary, "a"))
        words = MaskFiller().fill(matchers, [False, True, False, True]).words
        for place, (matcher, ignore_eos) in enumerate(zip(matchers, (False, True, False, True), strict=True)):
            assert (MaskFiller().fill([matcher], [ignore_eos]).words[0] == words[place]).all()


# Bytes that no character of UTF-8 begins with.
_NEVER_FIRST = {*range(0x80, 0xC2), *range(0xF5, 0x100)}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_grammar_is_refused_in_a_sentence_or_costs_little(
        self, compiler: GrammarCompiler, name: str
    ) -> None:
        error = compiler.request(HOSTILE[name]).exception(PATIENCE)
        if error is None:
            matcher = compiler.request(HOSTILE[name]).result().start()
            assert not MaskFiller().fill([matcher], [False]).failed
        else:
            assert isinstance(error, GrammarError)
            assert 20 < len(str(error)) < 400
            assert "\n" not in str(error)

    def test_hostile_grammars_number_at_least_fifty(self) -> None:
        assert len(HOSTILE) >= 50

    def test_grammar_is_refused_when_it_exceeds_processor_time(self, vocabulary: Vocabulary) -> None:
        compiler = GrammarCompiler(lambda: vocabulary, GrammarLimits(seconds=0.1, memory=16 << 30, workers=1))
        error = compiler.request(HOSTILE["schema: doubling allOf"]).exception(PATIENCE)
        assert "processor time" in str(error)
        assert compiled(compiler, regex="after it").start() is not None
        compiler.close()

    def test_grammar_is_refused_when_it_exceeds_memory(self, vocabulary: Vocabulary) -> None:
        compiler = GrammarCompiler(lambda: vocabulary, GrammarLimits(seconds=60.0, memory=256 << 20, workers=1))
        error = compiler.request(HOSTILE["schema: doubling allOf"]).exception(PATIENCE)
        assert "MiB of memory" in str(error)
        assert compiled(compiler, regex="after it").start() is not None
        compiler.close()

    def test_grammar_is_refused_when_its_masks_take_long(self, vocabulary: Vocabulary) -> None:
        compiler = GrammarCompiler(lambda: vocabulary, GrammarLimits(seconds_a_token=-1.0, workers=1))
        error = compiler.request(StructuredOutputs(regex="abc")).exception(PATIENCE)
        assert "ms to check" in str(error)
        compiler.close()

    def test_trial_process_is_replaced_when_it_hangs(self, vocabulary: Vocabulary) -> None:
        trial = TrialProcess(GrammarLimits())
        grammar = grammar_text(StructuredOutputs(regex="a"))
        assert "bytes" in trial.judge(grammar, vocabulary)
        assert trial.pid is not None
        os.kill(trial.pid, signal.SIGSTOP)
        trial.patience = 0.2
        with pytest.raises(TrialFailed, match="no answer within"):
            trial.judge(grammar, vocabulary)
        assert trial.pid is None
        trial.patience = PATIENCE
        assert "bytes" in trial.judge(grammar, vocabulary)
        trial.close()


def trials() -> set[int]:
    """The processes that try grammars for this one."""
    return {
        child.pid
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and any(Path(part).name == "trial.py" for part in child.cmdline())
    }


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class TestKeeping:
    def test_equal_requests_share_one_compilation(self, compiler: GrammarCompiler) -> None:
        first = compiler.request(StructuredOutputs(regex="once"))
        assert compiler.request(StructuredOutputs(regex="once")) is first
        first.result(PATIENCE)
        assert compiler.request(StructuredOutputs(regex="once")) is first

    def test_refusal_is_cached(self, compiler: GrammarCompiler) -> None:
        first = compiler.request(StructuredOutputs(regex="(["))
        assert first.exception(PATIENCE) is not None
        assert compiler.request(StructuredOutputs(regex="([")) is first

    def test_cache_is_bounded_in_number_and_bytes(self, vocabulary: Vocabulary) -> None:
        for limits in (GrammarLimits(cached=3, workers=1), GrammarLimits(cached_bytes=3 << 16, workers=1)):
            compiler = GrammarCompiler(lambda: vocabulary, limits)
            first = compiler.request(StructuredOutputs(regex="0"))
            for number in range(1, 8):
                compiler.request(StructuredOutputs(regex=str(number))).result(PATIENCE)
                assert compiler.num_cached <= 3
                assert compiler.cached_bytes <= 256 << 20
                assert compiler.request(StructuredOutputs(regex=str(number))).done()
            assert compiler.request(StructuredOutputs(regex="0")) is not first
            compiler.close()

    def test_broken_grammar_is_compiled_anew(self, compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
        wanted = StructuredOutputs(regex="[ab]c")
        grammar = compiler.request(wanted).result(PATIENCE)
        with pytest.raises(GrammarError):
            grammar.start().accept(*spelled(vocabulary, "x"))
        again = compiler.request(wanted).result(PATIENCE)
        assert again is not grammar
        assert compiler.request(wanted).result(PATIENCE) is again


class TestEnds:
    def test_trial_processes_end_when_the_compiler_is_closed(self, vocabulary: Vocabulary) -> None:
        before = trials()
        compiler = GrammarCompiler(lambda: vocabulary)
        compiler.request(StructuredOutputs(regex="a")).result(PATIENCE)
        assert trials() - before
        compiler.close()
        assert not trials() - before

    def test_trial_processes_end_when_the_compiler_is_collected(self, vocabulary: Vocabulary) -> None:
        before = trials()
        compiler = GrammarCompiler(lambda: vocabulary)
        compiler.request(StructuredOutputs(regex="a")).result(PATIENCE)
        assert trials() - before
        del compiler
        assert not trials() - before

    def test_trial_processes_end_when_their_owner_is_killed(self) -> None:
        """The processes of an owner that was killed find their input at its end."""
        code = (
            "import os, psutil, sys\n"
            "from engine import StructuredOutputs\n"
            "from engine.grammar.compiler import GrammarCompiler\n"
            "from engine.grammar.vocabulary import Vocabulary\n"
            "vocabulary = Vocabulary([bytes([b]) for b in range(128)], (), {0}, 128)\n"
            "compiler = GrammarCompiler(lambda: vocabulary)\n"
            "compiler.request(StructuredOutputs(regex='a')).result(60)\n"
            "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
            "os.kill(os.getpid(), 9)\n"
        )
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
        pids = [int(pid) for pid in killed.stdout.split()]
        assert pids, killed.stderr
        await_condition(lambda: not any(is_alive(pid) for pid in pids), "their end")

    def test_trial_process_gets_no_secrets_from_the_environment(
        self, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PAGEMILL_DATABASE_URL", "postgresql://secret")
        before = trials()
        compiler = GrammarCompiler(lambda: vocabulary, GrammarLimits(workers=1))
        compiler.request(StructuredOutputs(regex="a")).result(PATIENCE)
        (pid,) = trials() - before
        assert "PAGEMILL_DATABASE_URL" not in psutil.Process(pid).environ()
        compiler.close()

    def test_every_request_fails_when_the_vocabulary_is_unreadable(self) -> None:
        def read() -> Vocabulary:
            raise UnreadableVocabulary("its tokens are poems")

        compiler = GrammarCompiler(read)
        for regex in ("a", "b"):
            error = compiler.request(StructuredOutputs(regex=regex)).exception(PATIENCE)
            assert "its tokens are poems" in str(error)
        compiler.close()
