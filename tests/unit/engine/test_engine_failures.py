"""What a failing request, a full memory, a broken runner or tokenizer does to an engine and to other requests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engine import SamplingParams
from engine.batch import Batch
from engine.errors import EngineFailed, RequestFailed
from tests.unit.engine.fake_engine import GREEDY, finish, make, speaking
from tests.unit.engine.fake_runner import FakeRunner


class TestFailures:
    def test_nan_logits_fail_one_request(self) -> None:
        runner = FakeRunner(nan_on=49)
        prompts = [[1], [2, 49], [3]]
        outputs = make(runner).generate(prompts, GREEDY)
        assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
        assert outputs[1].error == "the model's logits are not finite numbers"
        assert outputs[2].token_ids == runner.greedy([3], 10, ignore_eos=True)

    def test_nan_in_prompt_logprobs_fails_the_request(self) -> None:
        outputs = make(FakeRunner(nan_on=49)).generate([[2, 49, 3]], SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert outputs[0].finish_reason == "error"

    def test_request_that_raises_fails_alone(self) -> None:
        runner = FakeRunner(raises_on=49)
        prompts = [[n] for n in range(1, 8)]
        prompts[4] = [5, 49]
        engine = make(runner)
        outputs = engine.generate(prompts, GREEDY)
        engine.check()
        for prompt, output in zip(prompts, outputs, strict=True):
            if 49 in prompt:
                assert output.error is not None
                assert "fake kernel failure" in output.error
            else:
                assert output.token_ids == runner.greedy(prompt, 10, ignore_eos=True)
        assert engine.stats().errors == 1

    def test_sequence_restarts_when_the_writer_of_its_shared_block_fails(self) -> None:
        """The prefix that both share is indexed in the step in which the first one fails."""
        runner = FakeRunner(raises_on=49, block_size=4)
        shared = [1, 2, 3, 4]
        engine = make(runner)
        engine.add("bad", [*shared, 49], GREEDY)
        engine.add("good", [*shared, 6, 7, 8, 9], GREEDY)
        assert [output.request_id for output in engine.step()] == ["bad"]
        engine.check()
        # Neither the block that was not filled nor the one computed from it may be found again.
        assert engine.scheduler.blocks.num_cached == 0
        assert engine.stats().preemptions == 1
        assert finish(engine)["good"].token_ids == runner.greedy([*shared, 6, 7, 8, 9], 10, ignore_eos=True)

    @pytest.mark.parametrize("decode_steps", [1, 8])
    def test_step_runs_in_parts_when_memory_is_short_and_later_ones_are_smaller(self, decode_steps: int) -> None:
        runner = FakeRunner()
        prompts = [[n, 2] for n in range(1, 9)]
        engine = make(runner, decode_steps=decode_steps)
        engine.scheduler.lengths._prior_output = 1  # all of them run
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, GREEDY)
        engine.step()
        runner.max_tokens_at_once = 5  # another process took the rest
        outputs = finish(engine)
        assert {output.error for output in outputs.values()} == {None}
        for number, prompt in enumerate(prompts):
            assert outputs[str(number)].token_ids == runner.greedy(prompt, 10, ignore_eos=True)
        assert runner.num_out_of_memory <= 2
        assert engine.stats().preemptions >= 4

    def test_prompt_is_read_in_smaller_chunks_when_memory_is_short(self) -> None:
        runner = FakeRunner(max_tokens_at_once=5)
        engine = make(runner)
        (output,) = engine.generate([[3] * 60], GREEDY)
        assert output.token_ids == runner.greedy([3] * 60, 10, ignore_eos=True)
        engine.check()

    def test_engine_fails_when_memory_holds_no_token(self) -> None:
        engine = make(FakeRunner(max_tokens_at_once=0))
        engine.add("r", [3, 4], GREEDY)
        with pytest.raises(EngineFailed, match="memory is full"):
            finish(engine)

    def test_two_bad_requests_alone_do_not_end_the_engine(self) -> None:
        engine = make(FakeRunner(raises_on=49))
        outputs = engine.generate([[49], [1, 49]], GREEDY)
        assert [output.finish_reason for output in outputs] == ["error", "error"]
        assert engine.generate([[1]], GREEDY)[0].finish_reason == "length"

    @pytest.mark.parametrize("requests", [1, 3])
    def test_broken_runner_ends_the_engine_without_request_errors(self, requests: int) -> None:
        engine = make()

        def broken(batch: Batch) -> torch.Tensor:
            raise RuntimeError("the driver is gone")

        engine.runner.run = broken  # type: ignore[method-assign]
        for number in range(requests):
            engine.add(f"r{number}", [1 + number], GREEDY)
        with pytest.raises(EngineFailed, match="the driver is gone"):
            engine.step()
        assert engine.stats().errors == 0

    def test_sticky_device_error_ends_the_engine_at_once(self) -> None:
        engine = make()
        calls = []

        def sticky(batch: Batch) -> torch.Tensor:
            calls.append(batch)
            raise torch.AcceleratorError("an illegal memory access was encountered")

        engine.runner.run = sticky  # type: ignore[method-assign]
        engine.add("a", [1], GREEDY)
        engine.add("b", [2], GREEDY)
        with pytest.raises(EngineFailed, match="illegal memory access"):
            engine.step()
        assert len(calls) == 1

    def test_request_fails_alone_when_the_tokenizer_raises(self) -> None:
        engine, _, tokenizer = speaking()
        decode = tokenizer.decode

        def fussy(token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            if len(token_ids) == 3:
                raise ValueError("no threes")
            return decode(token_ids, skip_special_tokens=skip_special_tokens)

        tokenizer.decode = fussy  # type: ignore[method-assign]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 3, 4)]
        outputs = engine.generate([[5], [6], [7]], params)
        assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
        assert "no threes" in (outputs[1].error or "")

    def test_request_that_cannot_be_queued_fails_alone(self) -> None:
        class Picky(FakeRunner):
            def rope_length(self, num_prompt: int, num_tokens: int) -> int:
                if num_prompt == 3:
                    raise ArithmeticError("three is too many")
                return 0

        engine = make(Picky())
        engine.add("good", [1], GREEDY)
        with pytest.raises(RequestFailed, match="could not be queued: three is too many"):
            engine.add("bad", [1, 2, 3], GREEDY)
        assert set(finish(engine)) == {"good"}
        assert engine.stats().rejected == 1
        good, bad = engine.generate([[1], [1, 2, 3]], GREEDY)
        assert (good.finish_reason, bad.finish_reason) == ("length", "error")
