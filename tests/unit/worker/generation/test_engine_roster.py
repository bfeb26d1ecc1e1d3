"""The engines of a worker with two models, without Postgres: what is loaded, kept, unloaded, and counted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

import orjson
import pytest

from engine import Engine, EngineConfig
from engine.errors import EngineFailed
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome
from jobs.requests import ModelLimits
from tests.support.processes import await_condition
from tests.unit.engine.fake_runner import FakeRunner
from worker.generation.engine_roster import EngineRoster, ServedModel
from worker.generation.engine_thread import EngineCallbacks


@dataclass
class World:
    """A roster of `one` and `two`, and what it did."""

    roster: EngineRoster = field(init=False)
    loads: list[str] = field(default_factory=list)
    engines: dict[str, weakref.ref[Engine]] = field(default_factory=dict)
    """The last engine of each model."""

    limits: list[ModelLimits] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    broken: list[BaseException] = field(default_factory=list)
    on_load: Callable[[str], None] = lambda name: None

    def load(self, name: str, max_model_len: int) -> Engine:
        self.loads.append(name)
        self.on_load(name)
        engine = Engine(FakeRunner(max_model_len=max_model_len), None, EngineConfig(block_size=4))
        self.engines[name] = weakref.ref(engine)
        return engine

    def start(self, *, may_stay: bool = False, kept_bytes: int | None = None) -> None:
        self.roster = EngineRoster(
            [
                ServedModel("one", lambda: self.load("one", 64), may_stay),
                ServedModel("two", lambda: self.load("two", 128), may_stay),
            ],
            lambda model: EngineCallbacks(
                on_outcome=self.outcomes.append,
                on_preparing=lambda: None,
                on_capacity=lambda: None,
                on_idle=lambda: None,
                on_fatal=lambda error, *, is_understood: self.broken.append(error),
            ),
            on_ready=self.limits.extend,
            on_switched=lambda model: None,
            on_crash=self.broken.append,
            share_prefixes=False,
            kept_bytes=kept_bytes,
        )
        self.roster.start()

    def switch(self, name: str) -> None:
        self.roster.switch_to(name)
        await_condition(lambda: self.roster.present == name, f"the turn of {name}")

    def answer(self, line: int) -> None:
        known = len(self.outcomes)
        body = orjson.dumps({"prompt": [1, 2, line], "max_tokens": 4, "ignore_eos": True})
        self.roster.submit([ClaimedRequest(UUID(int=1), line, 1, UUID(int=2), UUID(int=3), body)])
        await_condition(lambda: len(self.outcomes) > known and not self.roster.held(), "an answer")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.roster.close()


def ready(world: World) -> World:
    await_condition(lambda: bool(world.limits), "the first turn")
    return world


def test_each_model_is_loaded_once_before_the_first_turn(world: World) -> None:
    world.start()
    ready(world)
    assert world.loads == ["two", "one"]
    assert [(limits.name, limits.max_model_len) for limits in world.limits] == [("one", 64), ("two", 128)]
    assert world.roster.loaded() == {"one"}
    assert set(world.roster.load_seconds()) == {"one", "two"}


def test_left_engine_is_unloaded_and_its_memory_given_back(world: World) -> None:
    world.start()
    ready(world).answer(1)
    world.switch("two")
    assert world.roster.loaded() == {"two"}
    assert world.engines["one"]() is None
    world.switch("one")
    assert world.loads == ["two", "one", "two", "one"]


def test_left_engine_stays_loaded_where_memory_allows(world: World) -> None:
    world.start(may_stay=True)
    ready(world)
    assert world.roster.switch_cost("two") > 0
    world.switch("two")
    assert world.roster.loaded() == {"one", "two"}
    assert world.roster.switch_cost("one") == 0
    world.switch("one")
    assert world.loads == ["two", "one", "two"]


def test_left_engine_is_unloaded_where_it_exceeds_what_may_be_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = iter(range(0, 10**12, 10**6))
    monkeypatch.setattr("worker.generation.engine_roster.resident_memory", lambda: next(memory))
    world.start(may_stay=True, kept_bytes=10**6 - 1)
    ready(world)
    world.switch("two")
    assert world.roster.loaded() == {"two"}


def test_left_engine_is_unloaded_where_the_next_would_have_no_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = iter(range(0, 10**12, 10**6))
    monkeypatch.setattr("worker.generation.engine_roster.resident_memory", lambda: next(memory))
    monkeypatch.setattr("worker.generation.engine_roster.free_memory", lambda: 2 * 10**6 - 1)
    world.start(may_stay=True)
    ready(world)
    world.switch("two")
    assert world.roster.loaded() == {"two"}


def test_counters_go_on_over_unloaded_engines(world: World) -> None:
    world.start()
    ready(world).answer(1)
    world.switch("two")
    world.answer(2)
    world.answer(3)
    by_model = world.roster.stats_by_model()
    assert {model: stats["output_tokens"] for model, stats in by_model.items()} == {"one": 4, "two": 8}
    assert by_model["one"]["kv_blocks"] == 0
    assert world.roster.stats()["output_tokens"] == 12
    assert world.roster.stats()["finished"]["length"] == 3
    world.switch("one")
    world.answer(4)
    assert world.roster.stats_by_model()["one"]["output_tokens"] == 8
    assert world.roster.stats()["output_tokens"] == 16


def test_nothing_is_taken_between_two_turns(world: World) -> None:
    world.start()
    ready(world)
    opened = threading.Event()
    world.on_load = lambda name: opened.wait(60)  # type: ignore[assignment,return-value]
    world.roster.switch_to("two")
    assert (world.roster.turn, world.roster.present) == ("two", None)
    assert (world.roster.free_capacity(), world.roster.live_capacity()) == (0, 0)
    assert world.roster.stalled_for() == 0
    request = ClaimedRequest(UUID(int=1), 1, 1, UUID(int=2), UUID(int=3), b"{}")
    assert world.roster.submit([request]) == [request]
    opened.set()
    await_condition(lambda: world.roster.present == "two", "the turn of two")


def test_model_that_cannot_be_loaded_ends_the_worker(world: World) -> None:
    world.start()
    ready(world)

    def fail(name: str) -> None:
        raise EngineFailed("its file is gone")

    world.on_load = fail
    world.roster.switch_to("two")
    await_condition(lambda: bool(world.broken), "the end")
    assert world.roster.present is None
