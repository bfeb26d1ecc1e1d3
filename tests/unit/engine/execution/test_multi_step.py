"""Several decode steps at once give what one at a time gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.batch import MultiStepBatch, PendingTokens
from engine.errors import EngineFailed
from engine.sampling.sampler import LOGITS_TOO_LARGE
from engine.sampling.state import MAX_STOP_TOKENS
from engine.tokenization.tokenizer import Tokenizer
from tests.unit.engine.fake_runner import FakeRunner
from tests.unit.engine.tokenization.test_tokenizer import byte_level

STEPS = 8
LONG = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


def make(runner: FakeRunner, tokenizer: Tokenizer | None = None, decode_steps: int | None = STEPS) -> Engine:
    config = EngineConfig(
        block_size=runner.block_size, max_num_seqs=32, max_num_batched_tokens=256, decode_steps=decode_steps
    )
    return Engine(runner, tokenizer, config)


def finish(engine: Engine) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
        engine.check()
    return sorted(outputs, key=lambda output: output.request_id)


def run(
    decode_steps: int,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    is_static: bool = False,
    supports_overlap: bool = False,
) -> tuple[list[RequestOutput], Engine, FakeRunner]:
    tokenizer = Tokenizer(byte_level())
    runner = FakeRunner(
        vocab_size=len(tokenizer.hf_tokenizer),
        eos_token_ids=frozenset({1}),
        num_blocks=500,
        is_static=is_static,
        supports_overlap=supports_overlap,
    )
    engine = make(runner, tokenizer, decode_steps)
    for number, (prompt, its_params) in enumerate(zip(prompts, params, strict=True)):
        engine.add(f"r{number:02}", prompt, its_params)
    return finish(engine), engine, runner


def said(prompt: Sequence[int], first: int, last: int) -> str:
    """What the model says greedily with its output's tokens `first .. last`."""
    tokenizer = Tokenizer(byte_level())
    runner = FakeRunner(vocab_size=len(tokenizer.hf_tokenizer))
    return tokenizer.decode(runner.greedy(prompt, last, ignore_eos=True)[first:])


def is_in_flight(batch: MultiStepBatch) -> bool:
    """Whether it goes on from tokens that the host has not read yet."""
    return all(entry.token_id is None for entry in batch.entries)


PROMPTS = [[5, 6, 7, 8, 9, 10 + n] for n in range(28)]
VARIETY = [
    LONG,
    SamplingParams(temperature=0, max_tokens=7),
    SamplingParams(seed=1, max_tokens=20, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=21, temperature=0.7, top_k=5),
    SamplingParams(seed=3, max_tokens=22, temperature=1.3, top_p=0.7, ignore_eos=True),
    SamplingParams(seed=4, max_tokens=23, min_p=0.1, top_p=0.9, top_k=40, ignore_eos=True),
    SamplingParams(seed=5, max_tokens=24, n=3, stop_token_ids=list(range(0, 300, 40))),
    SamplingParams(seed=6, max_tokens=25, min_tokens=12, stop_token_ids=list(range(0, 300, 50)), ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=26, ignore_eos=True, stop=[said(PROMPTS[8], 9, 11)]),
    SamplingParams(temperature=0, max_tokens=27, ignore_eos=True, logprobs=2),
    SamplingParams(seed=7, max_tokens=28, presence_penalty=1.0, repetition_penalty=1.2),
    SamplingParams(seed=8, max_tokens=29, allowed_token_ids=list(range(40)), logit_bias={3: 2.0}),
    *(SamplingParams(seed=seed, max_tokens=30 + seed, ignore_eos=True) for seed in range(16)),
]


@pytest.mark.parametrize(("is_static", "supports_overlap"), [(False, False), (True, False), (True, True)])
def test_multi_step_outputs_equal_those_of_single_steps(
    is_static: bool, supports_overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens, reasons, texts, log-probabilities; and afterwards the same blocks are cached."""
    single, engine, runner = run(1, PROMPTS, VARIETY)
    assert runner.multi_step_batches == []
    several, other, multi = run(STEPS, PROMPTS, VARIETY, is_static=is_static, supports_overlap=supports_overlap)
    assert several == single
    assert {batch.num_steps for batch in multi.multi_step_batches} >= {2, 4}
    assert caplog.text == ""  # no multi-step batch failed
    assert single[8].stop_reason is not None
    assert "stop" in {output.finish_reason for output in single[6:8]}
    assert other.scheduler.blocks.num_cached == engine.scheduler.blocks.num_cached
    assert other.stats().computed_tokens == engine.stats().computed_tokens
    assert len(multi.batches) + len(multi.multi_step_batches) < len(runner.batches)
    for prompt, output in zip(PROMPTS, single, strict=True):
        # What was hashed is found again: the output's full blocks, and not a token more.
        whole = [*prompt, *output.token_ids]
        for made in (engine, other):
            hits = made.scheduler.blocks.lookup(whole, b"", len(whole))
            assert len(hits) == (len(whole) - 1) // runner.block_size


@pytest.mark.parametrize("supports_overlap", [False, True])
def test_prefix_cache_holds_nothing_past_a_stop_string(supports_overlap: bool) -> None:
    """The device went on to the end of its steps, or of the next ones; those tokens are discarded."""
    prompt = PROMPTS[0]
    stop = said(prompt, 4, 6)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop)
    (output,), engine, runner = run(STEPS, [prompt], [params], supports_overlap=supports_overlap)
    # The token sampled after the prompt is in flight when the first of two multi-step batches starts.
    expected = [True, True] if supports_overlap else [False]
    assert [is_in_flight(batch) for batch in runner.multi_step_batches] == expected
    assert 1 + runner.multi_step_batches[0].num_steps > len(output.token_ids)
    whole = [*prompt, *runner.greedy(prompt, 30, ignore_eos=True)]
    accepted = len(prompt) + len(output.token_ids) - 1
    assert len(engine.scheduler.blocks.lookup(whole, b"", len(whole))) == accepted // runner.block_size


class TestOverlap:
    """The next multi-step batch starts before the last one's tokens are looked at."""

    def with_steps_in_flight(self, *lengths: int, num_blocks: int = 300) -> tuple[Engine, FakeRunner]:
        """After the step that reads the prompts and the one that starts a multi-step batch."""
        runner = FakeRunner(num_blocks=num_blocks, eos_token_ids=frozenset(), supports_overlap=True, is_static=True)
        engine = make(runner)
        for number, length in enumerate(lengths):
            engine.add(f"r{number}", [number + 1], SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
        engine.step()
        assert engine.step() == []
        assert len(runner.multi_step_batches) == 1
        engine.check()
        return engine, runner

    def assert_right(self, engine: Engine, runner: FakeRunner, *lengths: int) -> None:
        for output, (number, length) in zip(finish(engine), enumerate(lengths), strict=True):
            assert output.token_ids == runner.greedy([number + 1], length, ignore_eos=True)

    def test_host_reads_one_multi_step_batch_behind_the_device(self) -> None:
        engine, runner = self.with_steps_in_flight(60, 60)
        assert engine.stats().output_tokens == 2
        engine.step()
        assert len(runner.multi_step_batches) == 2
        assert is_in_flight(runner.multi_step_batches[1])
        assert engine.stats().output_tokens == 2 + 2 * STEPS
        self.assert_right(engine, runner, 60, 60)
        # Only the last tokens, too few for a multi-step batch, are decoded one by one.
        assert len(runner.batches) <= 1 + 3

    def test_sequence_that_ends_in_a_multi_step_batch_is_not_in_the_next(self) -> None:
        engine, runner = self.with_steps_in_flight(*[60] * 9, 4)
        assert [output.request_id for output in engine.step()] == ["r9"]
        assert [len(batch.entries) for batch in runner.multi_step_batches] == [10, 9]
        self.assert_right(engine, runner, *[60] * 9)

    def test_waiting_request_joins_before_the_next_multi_step_batch(self) -> None:
        engine, runner = self.with_steps_in_flight(60, 60)
        engine.add("r2", [3], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        engine.step()
        assert len(runner.multi_step_batches) == 1
        engine.step()
        assert len(runner.batches[-1].entries) == 3
        self.assert_right(engine, runner, 60, 60, 60)

    def test_aborted_and_preempted_sequences_get_no_in_flight_tokens(self) -> None:
        engine, runner = self.with_steps_in_flight(60, 60, 60)
        engine.step()
        engine.abort("r0")
        engine.scheduler.preempt(engine.scheduler.running[0])
        engine.check()
        outputs = finish(engine)
        assert outputs[0].token_ids == runner.greedy([1], 60, ignore_eos=True)[: 1 + STEPS]
        for number in (1, 2):
            assert outputs[number].token_ids == runner.greedy([number + 1], 60, ignore_eos=True)

    def test_blocks_of_an_ended_sequence_are_written_last_by_the_next_owner(self) -> None:
        """A cache with room for one: the second gets the blocks that the first's unread batch still writes."""
        engine, runner = self.with_steps_in_flight(60, num_blocks=26)
        engine.step()
        engine.abort("r0")
        second = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        engine.add("r1", [2], second)
        outputs = finish(engine)
        assert outputs[1].token_ids == runner.greedy([2], 100, ignore_eos=True)

    def test_engine_is_idle_after_its_only_in_flight_request_is_aborted(self) -> None:
        engine, runner = self.with_steps_in_flight(60)
        engine.abort("r0")
        assert [output.request_id for output in engine.step()] == ["r0"]
        assert not engine.has_unfinished
        engine.add("r1", [2], LONG)
        (output,) = finish(engine)
        assert output.token_ids == runner.greedy([2], 30, ignore_eos=True)

    def test_multi_step_falls_back_to_single_steps_when_memory_runs_out(self) -> None:
        engine, runner = self.with_steps_in_flight(60, 60)
        decode = runner.decode

        def short_of_memory(batch: MultiStepBatch) -> PendingTokens:
            runner.decode = decode  # type: ignore[method-assign]
            raise torch.OutOfMemoryError("fake memory is full")

        runner.decode = short_of_memory  # type: ignore[method-assign]
        self.assert_right(engine, runner, 60, 60)


def test_nan_logits_fail_one_request_and_keep_its_tokens() -> None:
    runner = FakeRunner()
    tokens = runner.greedy([3], 30, ignore_eos=True)
    runner.nan_on = tokens[4]
    engine = make(runner)
    engine.add("bad", [3], LONG)
    engine.add("good", [4], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    bad, good = finish(engine)
    assert runner.multi_step_batches
    assert (bad.error, bad.token_ids) == ("the model's logits are not finite numbers", tokens[:5])
    assert good.error is None


def test_request_without_an_allowed_token_fails_alone() -> None:
    runner = FakeRunner(vocab_size=4, eos_token_ids=frozenset())
    params = SamplingParams(temperature=0, max_tokens=30, min_tokens=20, stop_token_ids=[0, 1, 2, 3])
    single, several = (make(FakeRunner(vocab_size=4), decode_steps=k).generate([[1]], params)[0] for k in (1, STEPS))
    assert single.error == several.error == "no token is allowed here by the request's parameters"
    assert single.token_ids == several.token_ids
    assert runner.multi_step_batches == []


class TestGroups:
    def test_sequences_that_need_host_sampling_decode_beside_the_multi_step_batch(self) -> None:
        """Penalties, log-probabilities and many stop tokens go one by one, in the same steps."""
        runner = FakeRunner(num_blocks=300, eos_token_ids=frozenset())
        engine = make(runner)
        for number in range(12):
            engine.add(f"r{number}", [number + 1], LONG)
        alone = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=tuple(range(40, 41 + MAX_STOP_TOKENS)))
        engine.add("alone", [1], alone)
        engine.step()
        before = len(runner.batches)
        engine.step()
        assert len(runner.multi_step_batches[-1].entries) == 12
        assert [len(batch.entries) for batch in runner.batches[before:]] == [1]
        outputs = finish(engine)
        assert all(output.error is None for output in outputs)

    def test_multi_step_is_off_when_half_the_batch_needs_host_sampling(self) -> None:
        runner = FakeRunner(num_blocks=300)
        engine = make(runner)
        for number in range(4):
            engine.add(f"r{number}", [number + 1], LONG)
            engine.add(f"p{number}", [number + 1], SamplingParams(max_tokens=30, ignore_eos=True, presence_penalty=1))
        finish(engine)
        assert runner.multi_step_batches == []


class TestFailures:
    def test_multi_step_falls_back_to_single_steps_when_it_raises(self, caplog: pytest.LogCaptureFixture) -> None:
        runner = FakeRunner()
        good = runner.greedy([3], 30, ignore_eos=True)
        bad = runner.greedy([4], 30, ignore_eos=True)
        only_bad = next(token for token in bad[3:] if token not in good)
        runner.raises_on = only_bad
        engine = make(runner)
        engine.add("bad", [4], LONG)
        engine.add("good", [3], LONG)
        outputs = finish(engine)
        assert "fake kernel failure" in (outputs[0].error or "")
        assert outputs[0].token_ids == bad[: bad.index(only_bad) + 1]
        assert outputs[1].token_ids == good
        assert "tried one by one: fake kernel failure" in caplog.text

    def test_device_error_ends_the_engine(self) -> None:
        class Lost:
            def wait(self) -> np.ndarray:
                raise torch.AcceleratorError("an illegal memory access was encountered")

        def at_once(batch: MultiStepBatch) -> PendingTokens:
            raise torch.AcceleratorError("an illegal memory access was encountered")

        for decode in (at_once, lambda batch: Lost()):
            engine = make(FakeRunner())
            engine.runner.decode = decode  # type: ignore[method-assign,assignment]
            engine.add("r", [1], LONG)
            engine.step()
            with pytest.raises(EngineFailed, match="illegal memory access"):
                engine.step()


@pytest.mark.parametrize("steps", [1, STEPS])
def test_temperature_that_overflows_fails_its_request_alone(steps: int) -> None:
    """With the same words by one step at a time, on the host, and by several, on the device."""
    runner = FakeRunner(eos_token_ids=frozenset(), supports_overlap=steps > 1)
    runner._table *= 1e34
    engine = make(runner, decode_steps=steps)
    engine.add("cold", [3], SamplingParams(temperature=2e-5, max_tokens=30, min_tokens=30))
    engine.add("greedy", [4], LONG)
    cold, greedy = finish(engine)
    assert bool(runner.multi_step_batches) == (steps > 1)
    assert (cold.error, cold.token_ids) == (LOGITS_TOO_LARGE, [])
    assert greedy.token_ids == runner.greedy([4], 30, ignore_eos=True)
