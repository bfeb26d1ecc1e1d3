"""The engine thread without Postgres: one bad request among others."""

from __future__ import annotations

import threading
import time
from uuid import UUID

import orjson
import pytest

from engine import Engine, EngineConfig
from engine.errors import EngineFailed
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.states import RequestState
from tests.support.processes import await_condition
from tests.unit.engine.fake_runner import FakeRunner
from worker.generation.engine_thread import EngineCallbacks, EngineThread


class BrokenAt13(FakeRunner):
    """A runner with a slip: the engine cannot queue a prompt of 13 tokens."""

    def rope_length(self, num_prompt: int, num_tokens: int) -> int:
        if num_prompt == 13:
            raise ZeroDivisionError("thirteen")
        return super().rope_length(num_prompt, num_tokens)


def claimed(line: int, prompt: list[int]) -> ClaimedRequest:
    body = orjson.dumps({"prompt": prompt, "max_tokens": 4})
    return ClaimedRequest(UUID(int=1), line, 1, UUID(int=2), UUID(int=3), body)


class BrokenWhileIdle(FakeRunner):
    """A runner one of whose other processes ends while nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.has_ended = threading.Event()

    def raise_if_broken(self) -> None:
        if self.has_ended.is_set():
            raise EngineFailed("rank 1 ended")


def test_engine_thread_ends_when_an_idle_engine_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.generation.engine_thread.IDLE_CHECK", 0.01)
    runner = BrokenWhileIdle()
    broken: list[BaseException] = []
    loaded = threading.Event()
    callbacks = EngineCallbacks(
        on_loaded=lambda model: loaded.set(),
        on_outcome=lambda outcome: None,
        on_preparing=lambda: None,
        on_capacity=lambda: None,
        on_idle=lambda: None,
        on_fatal=lambda error, *, is_understood: broken.append(error),
    )
    thread = EngineThread(
        lambda: Engine(runner, None, EngineConfig(block_size=4)), callbacks, model="m", share_prefixes=False
    )
    thread.start()
    assert loaded.wait(60)
    runner.has_ended.set()
    await_condition(lambda: bool(broken), "the end of the thread")
    thread.close()
    assert isinstance(broken[0], EngineFailed)


def test_engine_thread_fails_one_request_alone_when_adding_it_raises() -> None:
    outcomes: dict[int, Outcome] = {}
    broken: list[BaseException] = []
    loaded, idle = threading.Event(), threading.Event()
    callbacks = EngineCallbacks(
        on_loaded=lambda model: loaded.set(),
        on_outcome=lambda outcome: outcomes.update({outcome.token.line: outcome}),
        on_preparing=lambda: None,
        on_capacity=lambda: None,
        on_idle=idle.set,
        on_fatal=lambda error, *, is_understood: broken.append(error),
    )
    thread = EngineThread(
        lambda: Engine(BrokenAt13(), None, EngineConfig(block_size=4)), callbacks, model="m", share_prefixes=False
    )
    thread.start()
    assert loaded.wait(60)
    thread.submit([claimed(1, [1, 2]), claimed(2, [1] * 13), claimed(3, [3, 4])])
    await_condition(lambda: len(outcomes) == 3, "three outcomes")
    assert idle.wait(60)
    thread.close()
    assert broken == []
    states = {line: outcome.state for line, outcome in outcomes.items()}
    assert states == {1: RequestState.COMPLETED, 2: RequestState.FAILED, 3: RequestState.COMPLETED}
    assert orjson.loads(outcomes[2].body)["response"]["body"]["error"]["message"].endswith(
        "could not be queued: thirteen"
    )


def test_engine_thread_wants_more_queued_where_requests_end_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of a whole batch change hands in less time than a claim takes."""
    monkeypatch.setattr("worker.generation.turnover.WINDOW", 1000.0)  # as if all this ended within `AHEAD` seconds
    monkeypatch.setattr("worker.generation.turnover.AHEAD", 1000.0)
    num_outcomes = 0
    loaded, idle = threading.Event(), threading.Event()

    def on_outcome(outcome: Outcome) -> None:
        nonlocal num_outcomes
        num_outcomes += 1

    callbacks = EngineCallbacks(
        on_loaded=lambda model: loaded.set(),
        on_outcome=on_outcome,
        on_preparing=lambda: None,
        on_capacity=lambda: None,
        on_idle=idle.set,
        on_fatal=lambda error, *, is_understood: None,
    )
    config = EngineConfig(block_size=4, max_num_seqs=8)
    runner = FakeRunner(num_blocks=1000)
    thread = EngineThread(lambda: Engine(runner, None, config), callbacks, model="m", share_prefixes=False)
    thread.start()
    assert loaded.wait(60)
    # Of an engine at rest: all places, and a quarter.
    assert thread.free_capacity() == 8 + 2
    thread.submit([claimed(line, [1, 2]) for line in range(1, 21)])
    assert idle.wait(60)
    # Twenty ended meanwhile: all places, and as many.
    await_condition(lambda: thread.free_capacity() == 8 + 20, "the capacity after the last step")
    thread.close()
    assert num_outcomes == 20


@pytest.mark.parametrize("times_lines", [True, False])
def test_outcome_has_the_phases_of_its_line_where_they_are_wanted(times_lines: bool) -> None:
    outcomes: list[Outcome] = []
    loaded = threading.Event()
    callbacks = EngineCallbacks(
        on_loaded=lambda model: loaded.set(),
        on_outcome=outcomes.append,
        on_preparing=lambda: None,
        on_capacity=lambda: None,
        on_idle=lambda: None,
        on_fatal=lambda error, *, is_understood: None,
    )
    thread = EngineThread(
        lambda: Engine(FakeRunner(), None, EngineConfig(block_size=4)),
        callbacks,
        model="m",
        share_prefixes=False,
        times_lines=times_lines,
    )
    thread.start()
    assert loaded.wait(60)
    began = time.monotonic()
    thread.submit([claimed(1, [1, 2])])
    await_condition(lambda: len(outcomes) == 1, "an outcome")
    took = time.monotonic() - began
    thread.close()
    timing = outcomes[0].timing
    if not times_lines:
        assert timing is None
        return
    assert timing is not None
    phases = (timing.engine, timing.grammar, timing.prefill, timing.decode, timing.preempted)
    assert began <= timing.ended <= began + took
    assert 0 < sum(phases) <= took
    assert min(phases) >= 0
