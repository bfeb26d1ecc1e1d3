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
from worker.app import make_app, run_solo

logs.configure("info")
app = make_app(Settings(), "test")

@app.task(name="note")
def note(number):
    print("note", number, flush=True)

raise SystemExit(run_solo(app, queue="{QUEUE}", name="test", end_within=60))
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

    def await_message(self, number: int) -> None:
        make_app(Settings(redis_url=self.redis_url), "test").send_task("note", args=[number], queue=QUEUE)
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
    (directory / os.fsdecode(listener.valkey.config_get("dbfilename")["dbfilename"]) / "in the way").mkdir(parents=True)
    listener.valkey.config_set("save", "3600 1")
    _execute(listener, "BGSAVE")
    listener.await_words(OUTAGE, outages + 1)
    _execute(listener, "CONFIG SET stop-writes-on-bgsave-error no")
    listener.await_message(202)
    listener.await_words(RECOVERY, recoveries + 1)
    listener.valkey.config_set("save", "")  # or it would not end


def test_worker_survives_a_redis_without_memory(listener: Listener) -> None:
    """OOM answers only what takes memory, such as Celery's note of a message that it just got."""
    listener.await_message(301)
    outages, recoveries = (listener.log.read_text().count(words) for words in (OUTAGE, RECOVERY))
    make_app(Settings(redis_url=listener.redis_url), "test").send_task("note", args=[302], queue="aside")
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


def _blocked(listener: Listener) -> list[str]:
    return [client["id"] for client in listener.valkey.client_list(_type="normal") if "b" in client["flags"]]
