"""Many jobs at once, and suggestions for a search, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from api.native import bulk
from jobs.ids import public_id
from jobs.roles import Role
from jobs.settings import Settings
from jobs.states import RequestState
from tests.support.api_server import Api, error_of, running_api
from tests.support.rows import Rows


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs(api_rows: Rows) -> None:
    api_rows.clear_jobs()


def shown(*ids: UUID) -> list[str]:
    return [public_id("job_", job_id) for job_id in ids]


def post(api: Api, **body: Any) -> dict[str, Any]:
    answer = api.client.post("/v1/bulk", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_without_an_expected_count_nothing_is_done_but_counting(api: Api, api_rows: Rows) -> None:
    small, large, ended = api_rows.job(2), api_rows.job(30), api_rows.job(1)
    api_rows.execute("UPDATE jobs SET name = 'large' WHERE id = :id", id=large)
    api_rows.settle_due()
    api_rows.cancel(ended)
    api_rows.settle_due()
    counted = post(api, action="cancel", q="")
    assert (counted["jobs"], counted["lines"], counted["done"], counted["after"]) == (2, 32, [], None)
    assert counted["largest"][0] == {"id": shown(large)[0], "name": "large", "lines": 30}
    assert {api_rows.job_row(job_id).state for job_id in (small, large)} == {"in_progress"}


def test_action_is_done_to_the_jobs_of_the_search_part_by_part(
    api: Api, api_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PART", 2)
    chosen = [api_rows.job(5) for _ in range(5)]
    other = api_rows.job(1)
    done: list[str] = []
    body: dict[str, Any] = {"action": "pause", "q": "lines:5", "expect": 5}
    while True:
        answer = post(api, **body)
        done += answer["done"]
        if answer["after"] is None:
            break
        body["after"] = answer["after"]
    assert done == shown(*reversed(chosen))
    assert all(api_rows.job_row(job_id).paused_at for job_id in chosen)
    assert api_rows.job_row(other).paused_at is None
    assert len(post(api, action="resume", ids=done, expect=5)["done"]) == 2
    assert post(api, action="resume", ids=done)["jobs"] == 3


@pytest.mark.parametrize(("action", "answer"), [("cancel", 409), ("pause", 200)])
def test_count_that_differs_a_little_stops_what_cannot_be_undone(
    api: Api, api_rows: Rows, action: str, answer: int
) -> None:
    job_id, *_ = (api_rows.job(1) for _ in range(100))
    response = api.client.post("/v1/bulk", json={"action": action, "q": "", "expect": 101})
    assert response.status_code == answer
    if answer == 409:
        assert "100 match now" in str(error_of(response, 409)["message"])
        assert api_rows.job_row(job_id).state == "in_progress"
    assert error_of(api.client.post("/v1/bulk", json={"action": action, "q": "", "expect": 50}), 409)


def test_each_action_reaches_its_jobs(api: Api, api_rows: Rows) -> None:
    failed = api_rows.job(3)
    api_rows.settle(api_rows.claim(api_rows.worker()).requests, RequestState.FAILED)
    waiting = api_rows.job(2)
    assert post(api, action="priority", q="", priority=7, expect=1)["done"] == shown(waiting)
    assert api_rows.job_row(waiting).priority == 7
    retried = post(api, action="retry", q="failed:>0", expect=1)
    assert retried["lines"] == 3
    assert api.client.get(f"/v1/jobs/{retried['done'][0]}").json()["retry_of"] == shown(failed)[0]
    assert post(api, action="cancel", ids=shown(waiting), expect=1)["done"] == shown(waiting)
    assert api_rows.job_row(waiting).state == "cancelled"
    assert post(api, action="delete", q="status:cancelled", expect=1)["done"] == shown(waiting)
    assert api.client.get(f"/v1/jobs/{shown(waiting)[0]}").status_code == 404


def test_jobs_of_another_tenant_are_an_operators_alone(api: Api, api_rows: Rows) -> None:
    foreign = api_rows.job(1, tenant="another")
    assert post(api, action="cancel", ids=shown(foreign))["jobs"] == 0
    assert post(api, action="cancel", ids=shown(foreign), expect=0)["done"] == []
    with api.client_of("default", Role.READ_ONLY) as reader:
        error_of(reader.post("/v1/bulk", json={"action": "cancel", "q": "", "expect": 0}), 403)
    with api.client_of("default", Role.OPERATOR) as operator:
        done = operator.post("/v1/bulk", json={"action": "cancel", "q": "", "expect": 1}).json()["done"]
        assert done == shown(foreign)
        assert operator.delete(f"/v1/jobs/{shown(foreign)[0]}").status_code == 200


def test_operator_cancels_a_job_of_another_tenant(api: Api, api_rows: Rows) -> None:
    foreign = api_rows.job(1, tenant="another")
    with api.client_of("default", Role.OPERATOR) as operator:
        assert operator.post(f"/v1/jobs/{shown(foreign)[0]}/cancel").json()["status"] == "cancelled"


@pytest.mark.parametrize(
    "body", [{}, {"q": "", "ids": []}, {"action": "priority"}, {"action": "pause", "priority": 1}, {"q": "stauts:x"}]
)
def test_bulk_that_is_not_whole_is_a_400(api: Api, body: dict[str, Any]) -> None:
    error_of(api.client.post("/v1/bulk", json={"action": "pause"} | body), 400)


def suggested(api: Api, field: str, prefix: str = "") -> dict[str, int]:
    answer = api.client.get("/v1/suggest", params={"field": field, "prefix": prefix})
    assert answer.status_code == 200, answer.text
    return {one["value"]: one["jobs"] for one in answer.json()["data"]}


def test_suggestions_are_values_of_the_newest_jobs(api: Api, api_rows: Rows) -> None:
    failed = api_rows.job(1)
    api_rows.settle(api_rows.claim(api_rows.worker()).requests, RequestState.FAILED)
    api_rows.execute("INSERT INTO failure_groups VALUES (:id, 1, 'too_long', 'x', 1, 1, now(), now())", id=failed)
    named = [api_rows.job(2), api_rows.job(2)]
    api_rows.job(1, tenant="another")
    api_rows.execute("UPDATE jobs SET name = 'Nightly' WHERE id = ANY(:ids)", ids=named)
    api_rows.execute('UPDATE jobs SET metadata = \'{"team": "search"}\' WHERE id = :id', id=named[0])
    assert suggested(api, "model") == {"demo": 3}
    assert suggested(api, "name", "nigh") == {"Nightly": 2}
    assert suggested(api, "status", "comp") == {"completed": 1}
    assert suggested(api, "status", "wait") == {"waiting": 2}
    assert suggested(api, "code") == {"too_long": 1}
    assert suggested(api, "metadata.") == {"made": 2, "team": 1}
    assert suggested(api, "metadata.team", "SE") == {"search": 1}
    assert suggested(api, "tenant") == {"default": 3}
    assert suggested(api, "lines") == {}
