"""The events of a job: in their order, to its end, resumed by `Last-Event-ID` without a gap or a repeat."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from uuid import UUID

import httpx
import pytest

from jobs.ids import public_id
from jobs.settings import Settings
from tests.support.api_server import Api, error_of, running_api
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import Rows

Event = tuple[str, str, dict[str, object]]


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    """Claims take what waits, also what an earlier test left."""
    api_rows.clear_jobs()


def events_of(response: httpx.Response) -> Iterator[Event]:
    """The name, id and data of each event."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield fields["event"], fields["id"], json.loads(fields["data"])
            fields = {}


def read(api: Api, job_id: UUID, last: str | None = None) -> list[Event]:
    headers = {} if last is None else {"last-event-id": last}
    path = f"/v1/jobs/{public_id('job_', job_id)}/events"
    with api.client.stream("GET", path, headers=headers, timeout=PATIENCE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events_of(response))


def a_life(api: Api, rows: Rows) -> UUID:
    """A job of ten lines that was paused in the middle, and ended."""
    job_id = rows.job(10)
    worker_id = rows.worker()
    rows.settle(rows.claim(worker_id, limit=5).requests)
    for action in ("pause", "resume"):
        assert api.client.post(f"/v1/jobs/{public_id('job_', job_id)}/{action}").status_code == 200
    rows.settle(rows.claim(worker_id).requests)
    return job_id


def test_stream_of_an_ended_job_holds_all_and_ends(api: Api, api_rows: Rows) -> None:
    events = read(api, a_life(api, api_rows))
    assert [name for name, _, _ in events] == ["claimed", "paused", "resumed", "progress", "ended"]
    assert events[1][2]["text"] == "It was paused; no line of it is started."
    assert events[-1][2]["status"] == "completed"


def test_stream_resumes_after_any_event(api: Api, api_rows: Rows) -> None:
    job_id = a_life(api, api_rows)
    events = read(api, job_id)
    for count, (_, last, _) in enumerate(events[:-1], 1):
        assert read(api, job_id, last) == events[count:]


def test_first_claim_that_comes_to_light_late_is_sent(api: Api, api_rows: Rows) -> None:
    # It takes no lock on the job, so a pause after it may be seen first.
    job_id = a_life(api, api_rows)
    api_rows.execute("UPDATE job_events SET number = number + 500 WHERE number = 1")
    (paused, *_) = read(api, job_id)
    assert paused[0] == "paused"
    api_rows.execute("UPDATE job_events SET number = 1 WHERE number = 501")
    assert [name for name, _, _ in read(api, job_id, paused[1])][:2] == ["claimed", "resumed"]


def test_stream_follows_a_running_job_to_its_end(api: Api, api_rows: Rows) -> None:
    job_id, worker_id = api_rows.job(2), api_rows.worker()
    names: list[str] = []

    def follow() -> None:
        with api.client.stream("GET", f"/v1/jobs/{public_id('job_', job_id)}/events", timeout=PATIENCE) as response:
            names.extend(name for name, _, _ in events_of(response))

    reader = threading.Thread(target=follow)
    reader.start()
    api_rows.settle(api_rows.claim(worker_id, limit=1).requests)
    await_condition(lambda: "progress" in names, "the first half of the job")
    api_rows.settle(api_rows.claim(worker_id).requests)
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert names == ["claimed", "progress", "progress", "ended"]


def test_stream_refuses_an_id_that_is_none_of_its_own(api: Api, api_rows: Rows) -> None:
    job_id = public_id("job_", api_rows.job(1))
    error_of(api.client.get(f"/v1/jobs/{job_id}/events", headers={"last-event-id": "17"}), 400)


def test_events_of_another_tenants_job_are_404(api: Api, api_rows: Rows) -> None:
    job_id = public_id("job_", api_rows.job(1))
    with api.client_of("another") as stranger:
        assert error_of(stranger.get(f"/v1/jobs/{job_id}/events"), 404)["code"] == "job_not_found"
