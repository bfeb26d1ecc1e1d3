"""A Redis that answers with errors, under a Celery worker process of ours: a real Valkey that is attacked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from jobs.settings import Settings
from tests.support.processes import PATIENCE, await_condition
from worker.app import make_app

QUEUE = "attacked"
LISTENING = f"""
from jobs.settings import Settings
from cli import logs
from worker import broker_consumer
from worker.app import make_app, run_solo

broker_consumer.FIRST_PAUSE, broker_consumer.LONGEST_PAUSE, broker_consumer.STEADY_AFTER = 0.1, 0.5, 1.0
logs.configure("info")
app = make_app(Settings(), "test")

@app.task(name="note")
def note(number):
    print("note", number, flush=True)

raise SystemExit(run_solo(app, queues=["{QUEUE}"], name="test", end_within=60))
"""
OUTAGE = "no notifications, work is found by polling"
RECOVERY = "notifications arrive again"


@dataclass
class Listener:
    """A worker that notes the messages it gets in its log, and the Valkey that it listens to."""

    process: subprocess.Popen[bytes]
    log: Path
    valkey: redis.Redis
    redis_url: str

    def await_words(self, words: str, number: int) -> None:
        def said() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.log.read_text().count(words) >= number

        await_condition(said, f"{words!r} in the worker's log", PATIENCE)

    def send(self, number: int, queue: str = QUEUE) -> None:
        with contextlib.closing(make_app(Settings(redis_url=self.redis_url), "test")) as app:
            app.send_task("note", args=[number], queue=queue)

    def await_message(self, number: int) -> None:
        self.send(number)
        self.await_words(f"note {number}\n", 1)
        # Celery says at length that it cannot acknowledge a message, which is beside the point here.
        await_condition(lambda: self.valkey.hlen("unacked") == 0, "the message's acknowledgement")


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    directory = tmp_path_factory.mktemp("valkey")
    log = directory / "worker.log"
    with contextlib.ExitStack() as stack:
        child_log = stack.enter_context(contextlib.closing(ChildLog(directory / "logs")))
        services = stack.enter_context(embedded_services(DataDir(directory), child_log, postgres=False))
        assert services.redis_url is not None
        sink = stack.enter_context(log.open("wb"))
        valkey = stack.enter_context(contextlib.closing(redis.Redis.from_url(services.redis_url)))
        process = subprocess.Popen(
            [sys.executable, "-c", LISTENING],
            env=os.environ | {"PAGEMILL_REDIS_URL": services.redis_url},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield Listener(process, log, valkey, services.redis_url)


# Each attack as Valkey commands, and those that end it.
ATTACKS = {
    "READONLY": (["REPLICAOF 127.0.0.1 1"], ["REPLICAOF NO ONE"]),
    "NOREPLICAS": (["CONFIG SET min-replicas-to-write 1"], ["CONFIG SET min-replicas-to-write 0"]),
    "NOPERM": (["ACL SETUSER default -brpop"], ["ACL SETUSER default +brpop"]),
    "MASTERDOWN": (
        ["CONFIG SET replica-serve-stale-data no", "REPLICAOF 127.0.0.1 1"],
        ["REPLICAOF NO ONE", "CONFIG SET replica-serve-stale-data yes"],
    ),
    "UNBLOCKED": (["CLIENT UNBLOCK {blocked} ERROR"], []),
    "NOAUTH": (["CONFIG SET requirepass other", "CLIENT KILL TYPE normal"], ["CONFIG SET requirepass {password}"]),
}


@pytest.mark.parametrize("answer", ATTACKS)
def test_worker_survives_an_error_answer_and_hears_again_after_it(listener: Listener, answer: str) -> None:
    number = list(ATTACKS).index(answer) + 1
    listener.await_message(number)
    outages = listener.log.read_text().count(OUTAGE)
    recoveries = listener.log.read_text().count(RECOVERY)
    attack, end = ATTACKS[answer]
    for command in attack:
        _execute(listener, command)
    listener.await_words(OUTAGE, outages + 1)
    for command in end:
        _execute(listener, command)
    listener.await_message(100 + number)
    listener.await_words(RECOVERY, recoveries + 1)
    assert listener.log.read_text().count(OUTAGE) == outages + 1
    assert "Traceback" not in listener.log.read_text()


def test_worker_survives_a_redis_that_cannot_save(listener: Listener) -> None:
    """MISCONF: every write is refused once a snapshot failed."""
    listener.await_message(201)
    outages, recoveries = (listener.log.read_text().count(words) for words in (OUTAGE, RECOVERY))
    # Where a directory stands, no snapshot can be put.
    directory = Path(os.fsdecode(listener.valkey.config_get("dir")["dir"]))
    obstacle = directory / os.fsdecode(listener.valkey.config_get("dbfilename")["dbfilename"]) / "in the way"
    obstacle.mkdir(parents=True)
    listener.valkey.config_set("save", "3600 1")
    _execute(listener, "BGSAVE")
    listener.await_words(OUTAGE, outages + 1)
    _execute(listener, "CONFIG SET stop-writes-on-bgsave-error no")
    listener.await_message(202)
    listener.await_words(RECOVERY, recoveries + 1)
    listener.valkey.config_set("save", "")  # or it would not end
    obstacle.rmdir()
    obstacle.parent.rmdir()


def test_worker_survives_a_redis_without_memory(listener: Listener) -> None:
    """OOM answers only what takes memory, such as Celery's note of a message that it just got."""
    listener.await_message(301)
    outages, recoveries = (listener.log.read_text().count(words) for words in (OUTAGE, RECOVERY))
    listener.send(302, "aside")
    [message] = listener.valkey.lrange("aside", 0, -1)
    with listener.valkey.pipeline(transaction=True) as transaction:
        transaction.lpush(QUEUE, message)
        transaction.config_set("maxmemory", 1)
        transaction.execute()
    listener.await_words(OUTAGE, outages + 1)
    _execute(listener, "CONFIG SET maxmemory 0")
    listener.await_message(303)
    listener.await_words(RECOVERY, recoveries + 1)
    assert "Traceback" not in listener.log.read_text()


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[redis.Redis]:
    """Another Valkey, with data that a replica of it takes in key by key."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(ChildLog(tmp_path / "logs")))
        services = stack.enter_context(embedded_services(DataDir(tmp_path), log, postgres=False))
        assert services.redis_url is not None
        client = stack.enter_context(contextlib.closing(redis.Redis.from_url(services.redis_url)))
        client.config_set("repl-diskless-sync-delay", 0)
        client.config_set("rdbcompression", "no")
        client.mset({f"key {number}": "x" * 2000 for number in range(1000)})
        yield client


def test_worker_survives_a_redis_that_loads_its_data(listener: Listener, primary: redis.Redis) -> None:
    """LOADING, as after a restart or here at the full synchronisation of a replica."""
    listener.await_message(401)
    outages, recoveries = (listener.log.read_text().count(words) for words in (OUTAGE, RECOVERY))
    answers = _loading_answers(listener)
    where = primary.connection_pool.connection_kwargs
    for command in (
        "CONFIG SET key-load-delay 100000",  # microseconds for each key: more than a minute for all of them
        "CONFIG SET loading-process-events-interval-bytes 1024",  # it hears its clients after each key
        "CONFIG SET replica-read-only no",
        f"CONFIG SET primaryauth {where['password']}",
        f"REPLICAOF {where['host']} {where['port']}",
    ):
        _execute(listener, command)
    # None of these answers is to a question of this test: it asks for what a loading server tells.
    await_condition(lambda: _loading_answers(listener) >= answers + 3, "three answers to the worker")
    listener.await_words(OUTAGE, outages + 1)
    assert listener.valkey.info("persistence")["loading"] == 1
    _execute(listener, "CONFIG SET key-load-delay 0")
    await_condition(lambda: listener.valkey.info("persistence")["loading"] == 0, "the end of loading")
    _execute(listener, "REPLICAOF NO ONE")
    listener.await_message(402)
    listener.await_words(RECOVERY, recoveries + 1)
    assert listener.log.read_text().count(OUTAGE) == outages + 1
    assert "Traceback" not in listener.log.read_text()


def test_worker_stops_at_once_during_an_outage(listener: Listener) -> None:
    outages = listener.log.read_text().count(OUTAGE)
    _execute(listener, "REPLICAOF 127.0.0.1 1")
    listener.await_words(OUTAGE, outages + 1)
    listener.process.terminate()
    assert listener.process.wait(PATIENCE) == 0, listener.log.read_text()


def _execute(listener: Listener, command: str) -> None:
    password = redis.connection.parse_url(listener.redis_url)["password"]
    if "{blocked}" in command:
        await_condition(lambda: bool(_blocked(listener)), "a worker that waits in Valkey")
    blocked = _blocked(listener)
    listener.valkey.execute_command(*command.format(password=password, blocked=blocked[0] if blocked else "").split())


def _loading_answers(listener: Listener) -> int:
    """How many times the server has answered LOADING."""
    errors = listener.valkey.info("errorstats")
    return int(errors["errorstat_LOADING"]["count"]) if "errorstat_LOADING" in errors else 0


def _blocked(listener: Listener) -> list[str]:
    return [client["id"] for client in listener.valkey.client_list(_type="normal") if "b" in client["flags"]]
