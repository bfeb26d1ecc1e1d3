"""The feed over real HTTP: everything at first, then what changes; resumed by id, bounded, and shut to strangers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import event

from api import feed_hub
from api.feed_items import Wanted
from api.native import feed_look
from jobs.ids import public_id
from jobs.roles import Role
from jobs.settings import Settings
from tests.support.api_server import Api, error_of, new_key, running_api
from tests.support.processes import PATIENCE
from tests.support.rows import Rows

Event = tuple[str, Any]


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_hub, "INTERVAL", 0.05)
        patch.setattr(feed_hub, "LEAST_PAUSE", 0.01)
        patch.setattr(feed_hub, "COMMENT_AFTER", 0.2)
        with running_api(api_settings) as running:
            yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    api_rows.clear_jobs()


class Stream:
    """Events of a feed as they come; `last_id` is what a browser would send to go on."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.last_id = ""
        self._lines = response.iter_lines()

    def next(self) -> Event:
        fields: dict[str, str] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line and name == "id":
                self.last_id = value
            elif line:
                fields[name] = value
            elif "event" in fields:
                return fields["event"], json.loads(fields["data"])
            else:
                fields = {}
        return "end", None

    def batch(self) -> list[Event]:
        """The events up to the next id: all that one tick sent."""
        before, events = self.last_id, []
        while self.last_id == before:
            events.append(self.next())
        return events

    def await_event(self, kind: str, **values: object) -> Any:
        """The data of the next event of this kind with these values."""
        while True:
            name, data = self.next()
            assert name != "end"
            if name == kind and all(data[key] == value for key, value in values.items()):
                return data


@contextmanager
def feed(client: httpx.Client, last: str | None = None, **query: str) -> Iterator[Stream]:
    headers = {} if last is None else {"last-event-id": last}
    with client.stream("GET", "/v1/events", params=query, headers=headers, timeout=PATIENCE) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


def shown(job_id: UUID) -> str:
    return public_id("job_", job_id)


def test_feed_sends_all_at_first_and_then_what_changes(api: Api, api_rows: Rows) -> None:
    job_id, worker_id = api_rows.job(4), api_rows.worker()
    with feed(api.client, topics="overview,queue,workers", jobs=shown(job_id)) as stream:
        assert stream.next()[0] == "hello"
        first = dict(stream.next() for _ in range(4))
        assert first["job"] == api.client.get("/v1/jobs").json()["data"][0]
        assert [tenant["lines"] for tenant in first["queue"]["data"][0]["tenants"]] == [4]
        assert first["workers"] == api.client.get("/v1/workers").json()
        assert first["overview"]["jobs"]["open"] == 1
        api_rows.claim(worker_id, 1)
        now = first
        while now["job"]["running"] != 1 or now["overview"]["jobs"]["waiting"] != 0:
            name, data = stream.next()
            now[name] = data
        assert now["job"]["held_back"] is not None


def test_row_of_a_deleted_job_is_gone(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(1)
    api_rows.finish(job_id)
    with feed(api.client, jobs=shown(job_id)) as stream:
        stream.await_event("job", status="completed")
        assert api.client.delete(f"/v1/jobs/{shown(job_id)}").status_code == 200
        stream.await_event("gone", id=shown(job_id))


def test_open_job_brings_its_timeline_failures_and_minutes(api: Api, api_rows: Rows) -> None:
    job_id = api_rows.job(4)
    with feed(api.client, open=shown(job_id)) as stream:
        stream.await_event("timeline", job=shown(job_id))
        api.client.post(f"/v1/jobs/{shown(job_id)}/pause")
        while [entry["kind"] for entry in stream.await_event("timeline")["data"]][-1] != "paused":
            pass
        api.client.post(f"/v1/jobs/{shown(job_id)}/resume")
        api_rows.finish(job_id)
        while sum(point["lines"] for point in stream.await_event("minute")["data"]) < 4:
            pass


def test_newer_jobs_that_match_are_counted(api: Api, api_rows: Rows) -> None:
    known = shown(api_rows.job(1))
    api_rows.job(5)
    newest = shown(api_rows.job(50))
    with feed(api.client, q="lines:>2", newest=known) as stream:
        assert stream.await_event("jobs.new") == {"count": 2, "newest": newest}
    with feed(api.client, q="lines:50", newest=known) as stream:
        assert stream.await_event("jobs.new")["count"] == 1


def test_stream_that_comes_back_gets_only_what_changed_since(api: Api, api_rows: Rows) -> None:
    still, moving = api_rows.job(1), api_rows.job(2)
    both = f"{shown(still)},{shown(moving)}"
    with feed(api.client, jobs=both) as stream:
        stream.batch()
        last = stream.last_id
    api_rows.execute("UPDATE jobs SET name = 'moved' WHERE id = :id", id=moving)
    with feed(api.client, last, jobs=both) as stream:
        assert stream.next()[0] == "hello"
        name, job = stream.next()
        assert (name, job["name"]) == ("job", "moved")
        # The other one comes when it changes, and not before.
        api_rows.execute("UPDATE jobs SET name = 'now' WHERE id = :id", id=still)
        name, job = stream.next()
        assert (name, job["id"], job["name"]) == ("job", shown(still), "now")


def test_id_of_another_process_is_reset_and_gets_everything(api: Api, api_rows: Rows) -> None:
    job_id = shown(api_rows.job(1))
    with feed(api.client, "0badcafe-7", jobs=job_id) as stream:
        assert [stream.next()[0] for _ in range(3)] == ["hello", "reset", "job"]


def test_jobs_of_another_tenant_are_not_in_the_feed(api: Api, api_rows: Rows) -> None:
    foreign, own = api_rows.job(1, tenant="another"), api_rows.job(1)
    both = f"{shown(foreign)},{shown(own)}"
    with feed(api.client, jobs=both, open=shown(foreign)) as stream:
        seen = [event for _ in range(3) for event in stream.batch()]
        api_rows.execute("UPDATE jobs SET name = 'new'")
        seen += [event for _ in range(3) for event in stream.batch()]
    assert {name for name, _ in seen} == {"hello", "job", "beat"}
    assert {data["id"] for name, data in seen if name == "job"} == {shown(own)}
    with api.client_of("default", Role.OPERATOR) as operator, feed(operator, jobs=both) as stream:
        assert {data["id"] for name, data in stream.batch() if name == "job"} == {shown(foreign), shown(own)}


def test_silent_feed_says_that_it_lives(api: Api) -> None:
    with feed(api.client) as stream:
        assert [stream.next()[0] for _ in range(3)] == ["hello", "beat", "beat"]


def test_fifth_stream_of_a_session_is_turned_away(api: Api) -> None:
    with httpx.Client(base_url=api.url, trust_env=False, timeout=PATIENCE) as page:
        key = new_key(api.settings, "default")
        page.post("/session", json={"key": key}, headers={"origin": api.url, "x-pagemill-page": "1"}).raise_for_status()
        with feed(page), feed(page), feed(page), feed(page) as fourth:
            fourth.batch()
            assert page.get("/v1/events").status_code == 204
        with feed(page) as again:
            again.batch()


def test_stream_ends_when_its_key_is_revoked(api: Api) -> None:
    with api.client_of("default") as client:
        key_id = client.get("/v1/keys").json()["data"][-1]["id"]
        with feed(client) as stream:
            stream.batch()
            for key in client.get("/v1/keys").json()["data"]:
                if key["revoked_at"] is None and key["last_used_at"]:
                    key_id = key["id"]
            api.client.delete(f"/v1/keys/{key_id}")
            while stream.next()[0] != "end":
                pass


@pytest.mark.parametrize(
    "query", [{"topics": "weather"}, {"q": "stauts:x"}, {"jobs": ",".join(["job_" + "0" * 32] * 111)}]
)
def test_feed_of_what_is_not_there_is_refused(api: Api, query: dict[str, str]) -> None:
    error_of(api.client.get("/v1/events", params=query), 400)


def test_stop_of_the_service_ends_its_streams(api_settings: Settings) -> None:
    with running_api(api_settings) as stopping, feed(stopping.client, topics="overview") as stream:
        stream.batch()
        stopping.server.should_exit = True
        stream.await_event("bye")
        assert stream.next()[0] == "end"


def test_look_takes_as_few_statements_for_many_jobs_as_for_one(api_rows: Rows) -> None:
    worker_id, tenant_id = api_rows.worker(), api_rows.tenant().id
    job_ids = [api_rows.job(2) for _ in range(12)]
    api_rows.settle(api_rows.claim(worker_id, limit=18).requests)

    def statements(shown: list[UUID]) -> list[str]:
        wanted = Wanted(jobs=[(tenant_id, job_id) for job_id in shown], overviews=[tenant_id])
        taken: list[str] = []
        with api_rows.database.begin() as connection:
            event.listen(
                connection, "before_cursor_execute", lambda c, cursor, statement, *rest: taken.append(statement)
            )
            found = feed_look.look(connection, wanted, limit=64, solo_after_deaths=2)
        assert len(found) == 1 + len(shown)
        return taken

    one = statements(job_ids[:1])
    assert statements(job_ids) == one
    assert len(one) <= 10
