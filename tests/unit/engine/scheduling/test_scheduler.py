"""What runs in a step, and what deciding it costs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import FrameType

import pytest

from engine import Engine, EngineConfig, SamplingParams
from tests.support.paths import REPOSITORY
from tests.unit.engine.fake_runner import FakeRunner

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def engine(
    *, num_blocks: int = 64, block_size: int = 4, seqs: int = 8, tokens: int = 16, caching: bool = True
) -> Engine:
    runner = FakeRunner(num_blocks=num_blocks, block_size=block_size, max_model_len=10_000)
    config = EngineConfig(
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        enable_prefix_caching=caching,
        decode_steps=1,
    )
    return Engine(runner, None, config)


def scheduled(made: Engine) -> dict[str, tuple[int, int]]:
    """Run a step; who had which tokens in it."""
    scheduled: dict[str, tuple[int, int]] = {}
    schedule = made.scheduler.schedule

    def spy() -> object:
        step = schedule()
        scheduled.update({s.sequence.request.request_id: (s.start, s.end) for s in step.scheduled})
        return step

    made.scheduler.schedule = spy  # type: ignore[method-assign,assignment]
    made.step()
    made.scheduler.schedule = schedule  # type: ignore[method-assign]
    made.check()
    return scheduled


def test_prefill_and_decode_share_a_step_within_the_budget() -> None:
    made = engine(tokens=16)
    made.add("a", [1, 2, 3], GREEDY)
    assert scheduled(made) == {"a": (0, 3)}
    made.add("long", [5] * 40, GREEDY)
    made.add("b", [7, 8], GREEDY)
    assert scheduled(made) == {"a": (3, 4), "long": (0, 15)}
    assert scheduled(made) == {"a": (4, 5), "long": (15, 30)}
    assert scheduled(made) == {"a": (5, 6), "long": (30, 40), "b": (0, 2)}
    assert scheduled(made) == {"a": (6, 7), "long": (40, 41), "b": (2, 3)}


def test_chunk_leaves_a_token_to_every_later_decode() -> None:
    made = engine(tokens=8)
    for request_id in ("a", "b"):
        made.add(request_id, [1], GREEDY)
    made.step()
    made.add("first", [5] * 40, GREEDY, priority=1)
    assert scheduled(made) == {"a": (1, 2), "b": (1, 2), "first": (0, 6)}
    assert scheduled(made) == {"first": (6, 12), "a": (2, 3), "b": (2, 3)}


def test_requests_start_by_priority_then_arrival() -> None:
    made = engine(seqs=1, tokens=64)
    for request_id, priority in (("a", 0), ("b", 0), ("c", 5)):
        made.add(request_id, [1], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), priority=priority)
    assert [output.request_id for _ in range(3) for output in made.step()] == ["c", "a", "b"]


def test_prefix_is_shared_in_the_step_that_computes_it() -> None:
    made = engine(tokens=64)
    for request_id in ("a", "b"):
        made.add(request_id, [5, 6, 7, 8, 9, 10, 11, 12, 13], GREEDY)
    assert scheduled(made) == {"a": (0, 9), "b": (8, 9)}
    outputs = {}
    while made.has_unfinished:
        outputs |= {output.request_id: output for output in made.step()}
    assert (outputs["a"].cached_tokens, outputs["b"].cached_tokens) == (0, 8)
    assert outputs["a"].token_ids == outputs["b"].token_ids


def test_last_sequence_is_preempted_and_resumes_from_the_cache() -> None:
    made = engine(num_blocks=8, block_size=4, tokens=64)
    made.add("first", [1] * 8, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    made.add("last", [2] * 8, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    # A forecast that is far too low lets both in.
    made.scheduler.lengths._prior_output = 1
    outputs, ran = [], list[set[str]]()
    schedule = made.scheduler.schedule

    def spy() -> object:
        step = schedule()
        ran.append({item.sequence.request.request_id for item in step.scheduled})
        # A sequence that was just preempted is not admitted again at once.
        assert not any(sequence in made.scheduler.running for sequence in step.preempted)
        return step

    made.scheduler.schedule = spy  # type: ignore[method-assign,assignment]
    while made.has_unfinished:
        outputs += made.step()
        made.check()
    assert [output.request_id for output in outputs] == ["first", "last"]
    assert {"first"} in ran
    stats = made.stats()
    assert stats.preemptions >= 1
    # Tokens of a prompt count when it is first read, and not when it is read again.
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (8 + 8, 0)
    assert [output.cached_tokens for output in outputs] == [0, 0]
    runner = made.runner
    assert isinstance(runner, FakeRunner)
    for output, token in zip(outputs, (1, 2), strict=True):
        assert output.token_ids == runner.greedy([token] * 8, 20, ignore_eos=True)
    # Had nothing been found again, each preempted token would have been computed twice.
    assert made.stats().computed_tokens < 2 * (28 + 28)


def test_output_lengths_are_learned_rather_than_reserved() -> None:
    """Requests may take 400 tokens but stop after a few: soon many run where two would be reserved for."""
    runner = FakeRunner(num_blocks=100, block_size=8, vocab_size=4, max_model_len=1000)
    made = Engine(runner, None, EngineConfig(block_size=8, max_num_seqs=64, max_num_batched_tokens=512))
    peak = 0
    for number in range(200):
        made.add(f"r{number}", [1 + number % 3, 1 + number // 3 % 3], SamplingParams(seed=number, max_tokens=400))
    while made.has_unfinished:
        made.step()
        peak = max(peak, len(made.scheduler.running))
    assert peak > 20


class TestRoom:
    def test_num_requests_wanted_shrinks_with_waiting_and_running_requests(self) -> None:
        made = engine(num_blocks=1000, seqs=8)
        room = made.num_requests_wanted()
        assert 8 <= room <= 16
        for number in range(room):
            assert made.num_requests_wanted() == room - number
            made.add(f"r{number}", [1], GREEDY)
        assert made.num_requests_wanted() == 0
        made.step()
        assert len(made.scheduler.running) == 8
        assert made.num_requests_wanted() == 0

    @pytest.mark.parametrize(("ahead", "queued"), [(0, 2), (2, 2), (5, 5), (100, 100)])
    def test_full_engine_wants_a_quarter_or_what_ends_meanwhile(self, ahead: int, queued: int) -> None:
        made = engine(num_blocks=1000, seqs=8)
        for number in range(8):
            made.add(f"r{number}", [1], GREEDY)
        made.step()
        assert len(made.scheduler.running) == 8
        assert made.num_requests_wanted(ahead=ahead) == queued
        made.add("next", [1], GREEDY)
        assert made.num_requests_wanted(ahead=ahead) == queued - 1

    def test_idle_engine_wants_requests_however_small_its_cache(self) -> None:
        assert engine(num_blocks=1).num_requests_wanted() > 0

    def test_num_requests_wanted_grows_when_outputs_are_short(self) -> None:
        """Short outputs leave room for more of them."""
        made = engine(num_blocks=400, block_size=4, seqs=1000, tokens=1000)
        before = made.num_requests_wanted()
        for _ in range(64):
            made.scheduler.lengths.record(4, 4)
        assert made.num_requests_wanted() > 10 * before

    def test_num_requests_wanted_shrinks_with_the_blocks_of_running_requests(self) -> None:
        made = engine(num_blocks=40, block_size=4, seqs=1000, tokens=2000)
        for _ in range(64):
            made.scheduler.lengths.record(4, 4)
        free = made.num_requests_wanted()
        made.add("big", [1] * 120, GREEDY)
        made.step()
        assert made.num_requests_wanted() < free / 2


class CountedInt(int):
    """A priority that counts how often the queue compares it."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        CountedInt.comparisons += 1
        return int(self) < int(other)

    def __neg__(self) -> CountedInt:
        return CountedInt(-int(self))

    def __eq__(self, other: object) -> bool:
        CountedInt.comparisons += 1
        return int(self) == other

    __hash__ = int.__hash__


def operations(made: Engine, steps: int) -> tuple[int, int]:
    """Python calls and lines, and comparisons within the queue, of some steps."""
    seen: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, argument: object) -> object:
        seen[event] += 1
        return trace

    CountedInt.comparisons = 0
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        for _ in range(steps):
            made.step()
    finally:
        sys.settrace(None)
    return sum(seen.values()), CountedInt.comparisons


def operations_with_queued(queued: int) -> tuple[int, int]:
    """`operations` of 40 steps beside that many queued requests."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    made = engine(num_blocks=1000, seqs=8, tokens=64)
    for number in range(queued):
        made.add(f"r{number}", [1 + number % 40], params, priority=CountedInt(0))
    for number in range(100, queued, 50):
        made.abort(f"r{number}")
    made.step()
    counted = operations(made, 40)
    assert made.stats().finished["length"] == 80
    return counted


def test_step_cost_is_independent_of_the_number_of_waiting_requests() -> None:
    """30,000 queued requests cost a step no more operations than 1,000, up to the heap's logarithm."""
    program = f"from {__name__} import operations_with_queued as count; print(*count(1_000), *count(30_000))"
    # In a process without other threads: beside them, CPython 3.11 may trace one line of `step` for ever.
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    few_lines, few_comparisons, many_lines, many_comparisons = map(int, done.stdout.split())
    assert many_lines < 1.1 * few_lines
    assert many_comparisons < 3 * few_comparisons
