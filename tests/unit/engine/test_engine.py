"""The engine as its callers see it, over a model that is a function of the token history."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from engine import SamplingParams
from engine.batch import Batch
from engine.errors import RequestRejected
from tests.unit.engine.fake_engine import GREEDY, finish, make, speaking
from tests.unit.engine.fake_runner import FakeRunner


class TestGenerate:
    def test_generate_returns_outputs_in_order(self) -> None:
        engine = make()
        prompts = [[n, n + 1] for n in range(1, 40)]
        runner = engine.runner
        assert isinstance(runner, FakeRunner)
        outputs = engine.generate(prompts, GREEDY)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert [output.token_ids for output in outputs] == [runner.greedy(p, 10, ignore_eos=True) for p in prompts]
        assert {output.finish_reason for output in outputs} == {"length"}
        assert not engine.has_unfinished

    def test_generate_returns_texts(self) -> None:
        engine, runner, tokenizer = speaking()
        prompts = ["the fox", "the lazy dog", "naïve"]
        outputs = engine.generate(prompts, GREEDY)
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = runner.greedy(tokenizer.encode(prompt), 10, ignore_eos=True)
            assert output.token_ids == tokens
            assert output.text == tokenizer.hf_tokenizer.decode(tokens, skip_special_tokens=True)

    def test_generate_fails_a_bad_prompt_alone(self) -> None:
        engine, _, _ = speaking()
        prompts = ["fox", "\ud800", [1] * 200, [], [5, -1], [3], "dog"]
        outputs = engine.generate(prompts, GREEDY)
        assert [output.finish_reason for output in outputs] == ["length", *["error"] * 4, "length", "length"]
        assert [output.error is None for output in outputs] == [True, *[False] * 4, True, True]
        assert all(len(output.token_ids) == 10 for output in outputs if output.error is None)

    def test_generate_fails_texts_without_a_tokenizer(self) -> None:
        first, second = make().generate(["fox", [1]], GREEDY)
        assert first.error is not None
        assert "no tokenizer" in first.error
        assert second.error is None

    def test_generate_takes_parameters_for_each_prompt(self) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
        assert [len(output.token_ids) for output in make().generate([[1], [1], [1]], params)] == [1, 2, 3]
        with pytest.raises(ValueError, match="2 prompts came with 3"):
            make().generate([[1], [1]], params)
        with pytest.raises(TypeError, match="a list of prompts"):
            make().generate("fox")

    def test_generate_without_prompts_returns_nothing(self) -> None:
        assert make().generate([]) == []

    def test_generate_tokenizes_a_long_list_in_batches(self) -> None:
        """The first step comes after one batch of prompts was tokenized, not after all."""
        engine, _, tokenizer = speaking()
        batches: list[int] = []
        steps_before: list[int] = []
        encode = tokenizer.encode_batch

        def spy(texts: Sequence[str], **options: bool) -> object:
            batches.append(len(texts))
            steps_before.append(engine.stats().steps)
            return encode(texts, **options)

        tokenizer.encode_batch = spy  # type: ignore[method-assign,assignment]
        engine.generate(["fox"] * 1000, SamplingParams(temperature=0, max_tokens=2))
        assert batches == [256, 256, 256, 232]
        assert steps_before[0] == 0
        assert steps_before == sorted(set(steps_before))

    def test_generate_leaves_other_requests_in_place(self) -> None:
        engine = make()
        engine.add("mine", [7], GREEDY)
        (output,) = engine.generate([[8]], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        assert output.request_id != "mine"
        assert [other.request_id for other in engine.step()] == ["mine"]

    def test_generate_leaves_nothing_behind_when_interrupted(self) -> None:
        engine = make(decode_steps=1)
        run, calls = engine.runner.run, []

        def interrupted(batch: Batch) -> torch.Tensor:
            calls.append(batch)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return run(batch)

        engine.runner.run = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[1], [2]], GREEDY)
        engine.check()
        assert not engine.has_unfinished
        assert engine.stats().kv_blocks_used == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "params", "message"),
        [
            ([], GREEDY, "the prompt is empty"),
            ([50], GREEDY, "token id from 0 to 49"),
            ([True], GREEDY, "token id"),
            ([1] * 119, GREEDY, "exceed the context of 128"),
            ([1], SamplingParams(max_tokens=10**400), "exceed the context"),
            ([1] * 128, SamplingParams(max_tokens=None), "leaves none to generate"),
            ([1], SamplingParams(logit_bias={50: 1.0}), "logit_bias names a token beyond the vocabulary"),
            ([1], SamplingParams(stop_token_ids=[77]), "stop_token_ids"),
            ([1], SamplingParams(stop="x"), "no tokenizer"),
        ],
    )
    def test_request_that_can_never_run_is_refused(
        self, prompt: list[int], params: SamplingParams, message: str
    ) -> None:
        engine = make()
        with pytest.raises(RequestRejected, match=message) as caught:
            engine.add("r", prompt, params)
        assert isinstance(caught.value, ValueError)
        assert not engine.has_unfinished
        assert engine.stats().rejected == 1

    def test_request_larger_than_the_cache_is_refused(self) -> None:
        engine = make(FakeRunner(num_blocks=4, block_size=4))
        engine.add("fits", [1] * 7, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
        with pytest.raises(RequestRejected, match="exceed the whole KV cache of 16 positions"):
            engine.add("too long", [1] * 8, SamplingParams(max_tokens=10))
        with pytest.raises(RequestRejected, match="KV cache"):
            engine.add("prompt too long", [1] * 17, SamplingParams(max_tokens=0))
        engine.add("as much as fits", [1] * 8, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
        outputs = finish(engine)
        assert len(outputs["fits"].token_ids) == 10
        assert len(outputs["as much as fits"].token_ids) == 9

    def test_duplicate_request_id_is_refused(self) -> None:
        engine = make()
        engine.add("r", [1], GREEDY)
        with pytest.raises(RequestRejected, match="already here"):
            engine.add("r", [1], GREEDY)
        finish(engine)
        engine.add("r", [1], GREEDY)  # free again


class TestAbort:
    def test_abort_works_in_every_state(self) -> None:
        engine = make(max_num_seqs=1)
        engine.add("running", [1], GREEDY)
        engine.add("waiting", [2], GREEDY)
        engine.add("kept", [3], GREEDY)
        engine.step()
        for _ in range(2):
            engine.abort("running")
            engine.abort("waiting")
            engine.abort("unknown")
        engine.check()
        outputs = finish(engine)
        engine.abort("kept")
        assert {k: o.finish_reason for k, o in outputs.items()} == {
            "running": "abort",
            "waiting": "abort",
            "kept": "length",
        }
        assert len(outputs["running"].token_ids) == 1
        assert engine.stats().finished == {"abort": 2, "length": 1}

    def test_abort_keeps_a_completion_that_is_done(self) -> None:
        engine = make(max_num_seqs=1)
        engine.add("r", [1], SamplingParams(temperature=0, max_tokens=2, n=2, ignore_eos=True))
        engine.step()
        engine.step()
        engine.abort("r")
        (output,) = engine.step()
        assert [completion.finish_reason for completion in output.completions] == ["length", "abort"]
        assert output.finish_reason == "abort"


class TestCompletions:
    def test_completions_differ_and_stay_in_order(self) -> None:
        params = SamplingParams(n=5, seed=4, max_tokens=6, ignore_eos=True)
        (output,) = make().generate([[1, 2, 3, 4, 5]], params)
        assert [completion.index for completion in output.completions] == [0, 1, 2, 3, 4]
        assert len({tuple(completion.token_ids) for completion in output.completions}) == 5
        assert output.token_ids == output.completions[0].token_ids

    def test_first_completion_equals_the_only_one(self) -> None:
        one, many = make().generate(
            [[1, 2]] * 2, [SamplingParams(n=n, seed=4, max_tokens=6, ignore_eos=True) for n in (1, 3)]
        )
        assert many.completions[0] == one.completions[0]

    def test_prompt_of_several_completions_is_computed_once(self) -> None:
        engine = make(FakeRunner(block_size=4))
        engine.generate([[1] * 9], SamplingParams(n=4, max_tokens=1, ignore_eos=True))
        assert engine.stats().computed_tokens == 9 + 3
        assert engine.stats().cached_prompt_tokens == 24


class TestSeeds:
    PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)

    def test_seed_comes_from_the_request_id_when_not_given(self) -> None:
        def draws(request_id: str, engine_seed: int) -> Sequence[int]:
            engine = make(seed=engine_seed)
            engine.add(request_id, [1], self.PARAMS)
            return finish(engine)[request_id].token_ids

        assert draws("a", 0) == draws("a", 0)
        assert draws("a", 0) != draws("b", 0)
        assert draws("a", 0) != draws("a", 1)

    def test_request_resumed_from_its_tokens_draws_the_same(self) -> None:
        params = SamplingParams(max_tokens=12, ignore_eos=True, seed=5)
        (whole,) = make().generate([[1, 2]], params)
        begun = [1, 2, *whole.token_ids[:5]]
        (rest,) = make().generate([begun], SamplingParams(max_tokens=7, ignore_eos=True, seed=5))
        assert rest.token_ids == whole.token_ids[5:]


class TestLogprobs:
    def test_logprobs_of_prompt_and_output_are_the_models(self) -> None:
        """However the prompt is cut into chunks, and although another has filled the cache with it."""
        runner = FakeRunner()
        engine = make(runner, max_num_batched_tokens=4)
        prompt = list(range(1, 14))
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
        for _ in range(2):
            (output,) = engine.generate([prompt], params)
            assert output.prompt_logprobs is not None
            assert output.logprobs is not None
            assert output.prompt_logprobs[0] is None
            assert output.cached_tokens == 0
            history = [*prompt, *output.token_ids]
            scored = [*output.prompt_logprobs[1:], *output.logprobs]
            assert len(scored) == len(history) - 1
            for position, got in enumerate(scored, start=1):
                expected = torch.log_softmax(runner.logits_after(history[:position]), dim=-1)
                assert got is not None
                assert got.token_id == history[position]
                assert got.logprob == pytest.approx(expected[history[position]].item(), abs=1e-5)
                assert got.top[0][0] == int(expected.argmax())

    def test_prompt_logits_of_a_step_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A long prompt never asks for more rows of logits at once than memory allows."""
        monkeypatch.setattr("engine.engine._MAX_PROMPT_LOGITS", 5 * 50)
        runner = FakeRunner()
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
        prompts = [list(range(1, 20)), list(range(2, 30))]
        outputs = make(runner).generate(prompts, params)
        assert max(sum(entry.num_logits for entry in batch.entries) for batch in runner.batches) <= 6
        monkeypatch.undo()
        assert [o.prompt_logprobs for o in outputs] == [o.prompt_logprobs for o in make().generate(prompts, params)]


def test_salt_keeps_cached_prefixes_apart() -> None:
    engine = make(FakeRunner(block_size=4))
    prompt = [1] * 9
    cached = []
    for number, salt in enumerate([b"a", b"b", b"a", "a"]):
        engine.add(f"r{number}", prompt, GREEDY, cache_salt=salt)
        cached.append(finish(engine)[f"r{number}"].cached_tokens)
    assert cached == [0, 0, 8, 8]


def test_stats_count_tokens_steps_and_blocks() -> None:
    engine = make(FakeRunner(block_size=4))
    engine.generate([[1] * 9, [2] * 3], GREEDY)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.kv_usage) == (0, 0, 0, 0.0)
    assert (stats.prompt_tokens, stats.output_tokens) == (12, 20)
    assert stats.computed_tokens == 12 + 20 - 2
    assert stats.steps == 10
    assert stats.finished == {"length": 2}
    assert stats.output_tokens_per_second > 0
    engine.generate([[1] * 9], GREEDY)
    assert engine.stats().prefix_hit_rate == 8 / 21


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, engine; engine.SamplingParams(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
