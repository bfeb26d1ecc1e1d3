"""`GET /v1/jobs?q=` and `GET /v1/jobs/counts` against jobs that differ in everything that can be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest

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


@pytest.fixture(scope="module")
def jobs(api_rows: Rows) -> dict[str, UUID]:
    """Made in this order, so `foreign` is the newest."""
    done = api_rows.job(2)
    api_rows.finish(done)
    failed = api_rows.job(3)
    worker_id = api_rows.worker()
    api_rows.settle(api_rows.claim(worker_id).requests, RequestState.FAILED)
    running = api_rows.job(4, priority=5)
    api_rows.claim(worker_id, 1)
    made = {"done": done, "failed": failed, "running": running}
    made |= {"waiting": api_rows.job(50, window="30m"), "paused": api_rows.job(1, window="7d")}
    made |= {"foreign": api_rows.job(1, tenant="another")}
    set_ = "UPDATE jobs SET {} WHERE id = :id"
    api_rows.execute(set_.format("paused_at = now()"), id=made["paused"])
    api_rows.execute(set_.format("name = 'Nightly run'"), id=made["waiting"])
    api_rows.execute(set_.format("created_at = now() - interval '3 hours'"), id=made["done"])
    api_rows.execute(set_.format("metadata = jsonb_build_object('team', 'search, it')"), id=made["running"])
    return made


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", "paused waiting running failed done"),
        ("status:open", "paused waiting running"),
        ("-status:open", "failed done"),
        ("status:running", "running"),
        ("status:waiting", "waiting"),
        ("status:paused,completed", "paused failed done"),
        ("status:completed -failed:>0", "done"),
        ("failed:>0", "failed"),
        ("failed:3", "failed"),
        ("lines:>=50", "waiting"),
        ("lines:<3 status:open", "paused"),
        ("lines:>0.05k", ""),
        ("priority:>0", "running"),
        ("tokens:>0", "failed done"),
        ("model:demo,other status:paused", "paused"),
        ("model:other", ""),
        ("name:nightly", "waiting"),
        ('"NIGHTLY r"', "waiting"),
        ("-nightly status:open", "paused running"),
        ("created:>2h status:completed", "failed"),
        ("created:<2h", "done"),
        ("ended:>1h", "failed done"),
        ("-ended:>1h", "paused waiting running"),
        ("deadline:<1h", "waiting"),
        ("deadline:risk", "waiting"),
        ("deadline:>1h", "paused"),
        ('metadata.team:"search, it"', "running"),
        ("metadata.made:other", ""),
        ("tenant:another", ""),
        ("100%", ""),
        ("'; DROP", ""),
    ],
)
def test_query_finds_what_it_names(api: Api, jobs: dict[str, UUID], query: str, found: str) -> None:
    names = {public_id("job_", job_id): name for name, job_id in jobs.items()}
    answer = api.client.get("/v1/jobs", params={"q": query})
    assert answer.status_code == 200, answer.text
    assert [names[job["id"]] for job in answer.json()["data"]] == found.split()
    counts = api.client.get("/v1/jobs/counts", params={"q": query}).json()
    assert counts["matching"] == len(found.split())


def test_row_of_an_open_job_says_how_far_it_is_and_why_it_waits(api: Api, jobs: dict[str, UUID]) -> None:
    rows = {row["id"]: row for row in api.client.get("/v1/jobs").json()["data"]}
    for name in ("running", "waiting", "paused", "done"):
        row = rows[public_id("job_", jobs[name])]
        alone = api.client.get(f"/v1/jobs/{row['id']}").json()
        assert {part: row[part] for part in ("running", "eta", "held_back")} == {
            part: alone[part] for part in ("running", "eta", "held_back")
        }
        assert (row["wait"] and row["wait"]["code"]) == (alone["wait"] and alone["wait"]["code"])
        assert row["tenant"] == "default"
    assert rows[public_id("job_", jobs["running"])]["running"] == 1
    assert rows[public_id("job_", jobs["paused"])]["wait"]["code"] == "paused"


def test_beginning_of_an_id_finds_its_job(api: Api, jobs: dict[str, UUID]) -> None:
    whole = public_id("job_", jobs["running"])
    for query in (whole, f"id:{whole}", f"id:{whole[4:].upper()}", whole[4:]):
        [found] = api.client.get("/v1/jobs", params={"q": query}).json()["data"]
        assert found["id"] == whole
    assert len(api.client.get("/v1/jobs", params={"q": f"id:{whole[:8]}"}).json()["data"]) == 5
    assert api.client.get("/v1/jobs", params={"q": "id:xyz"}).json()["data"] == []


def test_pages_of_a_search_meet_without_a_gap(api: Api, jobs: dict[str, UUID]) -> None:
    found, after = [], None
    while True:
        page = api.client.get("/v1/jobs", params={"q": "status:open", "limit": 1} | ({"after": after} if after else {}))
        found += [job["id"] for job in page.json()["data"]]
        after = page.json()["last_id"]
        if not page.json()["has_more"]:
            break
    assert found == [public_id("job_", jobs[name]) for name in ("paused", "waiting", "running")]


def test_counts_are_those_of_the_saved_searches(api: Api, jobs: dict[str, UUID]) -> None:
    counts = api.client.get("/v1/jobs/counts").json()
    assert counts == {
        "object": "job_counts", "all": 5, "open": 3, "waiting": 1, "with_failures": 1, "at_risk": 1, "ended": 2,
        "matching": 5, "capped": False,
    }  # fmt: skip


def test_operator_searches_all_tenants(api: Api, jobs: dict[str, UUID]) -> None:
    with api.client_of("default", Role.OPERATOR) as operator:
        [foreign] = operator.get("/v1/jobs", params={"q": "tenant:another"}).json()["data"]
        assert (foreign["id"], foreign["tenant"]) == (public_id("job_", jobs["foreign"]), "another")
        assert operator.get("/v1/jobs/counts").json()["all"] == 6


@pytest.mark.parametrize("query", ["stauts:open", "status:opne", "lines:many", "created:2h", "model:>demo", 'name:"x'])
def test_query_that_is_not_understood_is_a_400(api: Api, query: str) -> None:
    for path in ("/v1/jobs", "/v1/jobs/counts"):
        assert error_of(api.client.get(path, params={"q": query}), 400)["param"] == "q"
