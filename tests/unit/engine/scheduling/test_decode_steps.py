"""`DecodeStepPolicy`: how many decode steps run at once, and for which sequences."""

from __future__ import annotations

import pytest

from engine import Engine, EngineConfig, SamplingParams
from engine.scheduling.decode_steps import DecodeStepPolicy
from engine.scheduling.step import ScheduledStep
from tests.unit.engine.fake_runner import FakeRunner


def engine(
    *, decode_steps: int | None = 16, num_blocks: int = 500, seqs: int = 16, runner: FakeRunner | None = None
) -> Engine:
    runner = runner or FakeRunner(num_blocks=num_blocks, max_model_len=2000, eos_token_ids=frozenset())
    config = EngineConfig(block_size=4, max_num_seqs=seqs, max_num_batched_tokens=512, decode_steps=decode_steps)
    return Engine(runner, None, config)


def add(made: Engine, *lengths: int, first: int = 0) -> None:
    for number, length in enumerate(lengths):
        made.add(f"r{first + number}", [1 + number], SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))


def second_step(made: Engine) -> ScheduledStep:
    """The first reads the prompts."""
    made.step()
    step = made.scheduler.schedule()
    made.check()
    return step


@pytest.mark.parametrize(("decode_steps", "expected"), [(1, 1), (2, 2), (5, 4), (16, 16), (100, 64)])
def test_num_steps_is_the_largest_power_of_two_that_the_configuration_allows(decode_steps: int, expected: int) -> None:
    made = engine(decode_steps=decode_steps)
    add(made, *[200] * 4)
    step = second_step(made)
    assert step.num_steps == expected
    assert (len(step.multi_step), len(step.scheduled)) == ((4, 0) if expected > 1 else (0, 4))


@pytest.mark.parametrize(("lengths", "expected"), [([9] * 4, 8), ([8] * 4, 4), ([9, 9, 9, 5], 4), ([2] * 4, 1)])
def test_num_steps_is_limited_by_the_tokens_left(lengths: list[int], expected: int) -> None:
    """One token of each comes from the first step; a tenth of a multi-step batch may produce no token."""
    made = engine()
    add(made, *lengths)
    assert second_step(made).num_steps == expected


def test_num_steps_stays_large_when_few_sequences_end_early() -> None:
    made = engine()
    add(made, *[200] * 15, 3)
    assert second_step(made).num_steps == 16


def test_num_steps_is_small_when_requests_wait_and_outputs_are_short() -> None:
    made = engine(seqs=4)
    add(made, *[200] * 4)
    add(made, 200, first=4)
    for _ in range(64):
        made.scheduler.lengths.record(4, 32)
    assert second_step(made).num_steps == 4
    for _ in range(2048):
        made.scheduler.lengths.record(4, 10)
    assert made.scheduler.schedule().num_steps == 1


def test_num_steps_is_limited_by_the_free_blocks() -> None:
    """Two sequences in nine blocks of four: after their first, three and a half are left to each."""
    made = engine(runner=FakeRunner(num_blocks=9, block_size=4, eos_token_ids=frozenset()))
    made.scheduler.lengths._prior_output = 1
    add(made, 17, 17)
    step = second_step(made)
    assert step.num_steps == 8
    assert made.stats().preemptions == 0
    assert [len(item.sequence.table.blocks) for item in step.multi_step] == [3, 3]


def test_num_steps_is_limited_by_time_when_not_configured() -> None:
    lengths = {}
    for most in (None, 16):
        made = engine(decode_steps=most)
        add(made, *[200] * 4)
        made.step()
        made.scheduler.decode_steps.record(1.0, 20)
        lengths[most] = made.scheduler.schedule().num_steps
    assert lengths == {None: 4, 16: 16}


def test_prefill_steps_are_not_counted_in_the_decode_pace() -> None:
    made = engine(decode_steps=None)
    add(made, *[200] * 4)
    made.step()
    policy = made.scheduler.decode_steps
    policy.record(0.01, 1)
    policy.record(9.0, 1, only_decodes=False)
    assert made.scheduler.schedule().num_steps == 16


def test_sequence_leaves_multi_step_when_its_rope_scale_would_change() -> None:
    """The first passes the length at which it is computed anew; the multi-step batch runs without it until then."""

    class Growing(FakeRunner):
        def rope_length(self, num_prompt: int, num_tokens: int) -> int:
            return 999 if num_tokens > 22 and num_prompt > 10 else 0

    runner = Growing(num_blocks=500, max_model_len=2000, eos_token_ids=frozenset())
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    made = engine(decode_steps=4, runner=runner)
    prompts = [[3] * 20, *[[n] for n in range(1, 6)]]
    outputs = made.generate(prompts, params)
    assert [output.token_ids for output in outputs] == [runner.greedy(p, 40, ignore_eos=True) for p in prompts]
    assert made.stats().preemptions == 1
    assert {len(batch.entries) for batch in runner.multi_step_batches} >= {5, 6}


def test_num_steps_is_one_when_configured_so() -> None:
    assert DecodeStepPolicy(1, lambda *_: 0).num_steps_for([], None, None, num_waiting=0) == (1, [])  # type: ignore[arg-type]
