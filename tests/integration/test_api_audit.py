"""The audit log: every change by a key is in it, in the change's own transaction, and its readers see their own."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text

from api.wrong_keys import MOST
from cli.first_key import store_key
from jobs.ids import public_id
from jobs.queries import audit, batches, changing, tenants
from jobs.queries.audit import MOST_CHARACTERS, Actor, AuditAction
from jobs.roles import Role
from jobs.settings import Settings
from tests.support.api_server import Api, anonymous, error_of, running_api
from tests.support.rows import Rows


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(api_rows: Rows) -> None:
    api_rows.clear_jobs()
    api_rows.execute("DELETE FROM audit")


@pytest.fixture
def operator(api: Api) -> Iterator[httpx.Client]:
    with api.client_of("operations", Role.OPERATOR) as client:
        yield client


def job_of(rows: Rows, *, tenant: str = "default") -> str:
    return public_id("job_", rows.job(1, tenant=tenant))


def changed(client: httpx.Client) -> list[tuple[str, str]]:
    """`(action, target)` of what this client sees, oldest first."""
    answer = client.get("/v1/audit")
    assert answer.status_code == 200, answer.text
    return [(entry["action"], entry["target"]) for entry in reversed(answer.json()["data"])]


def test_changes_of_a_job_are_seen_by_its_tenant_and_by_operators(
    api: Api, api_rows: Rows, operator: httpx.Client
) -> None:
    job = job_of(api_rows)
    for action in ("pause", "pause", "resume"):  # the second pause changes nothing
        assert api.client.post(f"/v1/jobs/{job}/{action}").status_code == 200
    for change in ({"priority": 7}, {"priority": 7}):
        assert api.client.patch(f"/v1/jobs/{job}", json=change).status_code == 200
    for _ in range(2):
        assert api.client.post(f"/v1/jobs/{job}/cancel").status_code == 200
    retried = api.client.post(f"/v1/jobs/{job}/retry").json()["id"]
    assert api.client.delete(f"/v1/jobs/{job}").status_code == 200
    names = ("paused", "resumed", "changed", "cancelled", "retried", "deleted")
    assert changed(api.client) == changed(operator) == [(f"job.{name}", job) for name in names]
    details = [entry["detail"] for entry in reversed(api.client.get("/v1/audit").json()["data"])]
    assert details == [{}, {}, {"priority": 7}, {}, {"job": retried, "lines": 1}, {}]
    with api.client_of("another") as another:
        assert changed(another) == []


def test_operator_of_another_tenant_is_named_to_operators_alone(
    api: Api, api_rows: Rows, operator: httpx.Client
) -> None:
    job = job_of(api_rows)
    assert operator.post(f"/v1/jobs/{job}/pause").status_code == 200
    assert api.client.post(f"/v1/jobs/{job}/resume").status_code == 200
    own, foreign = api.client.get("/v1/audit").json()["data"]
    assert (own["by"], own["key"]["name"], own["tenant"]) == ("key", "test", "default")
    assert (foreign["by"], foreign["key"]) == ("operator", None)
    _, seen = operator.get("/v1/audit").json()["data"]
    assert (seen["by"], seen["key"]["id"]) == ("key", operator.get("/session").json()["key_id"])


def test_each_job_of_a_bulk_action_has_an_entry(api: Api, api_rows: Rows) -> None:
    jobs = {job_of(api_rows) for _ in range(3)}
    answer = api.client.post("/v1/bulk", json={"action": "priority", "priority": 5, "ids": sorted(jobs), "expect": 3})
    assert len(answer.json()["done"]) == 3
    assert {target for _, target in changed(api.client)} == jobs
    assert all(entry["detail"] == {"priority": 5, "bulk": True} for entry in api.client.get("/v1/audit").json()["data"])


def test_changes_of_keys_and_endpoints_are_entries_that_show_no_secret(api: Api) -> None:
    made = api.client.post("/v1/keys", json={"name": "nightly"}).json()
    for _ in range(2):
        assert api.client.delete(f"/v1/keys/{made['id']}").status_code == 200
    asked = {"name": "hook", "url": "https://example.com/hook", "event_types": ["job.completed"]}
    endpoint = api.client.post("/v1/webhook_endpoints", json=asked).json()
    path = f"/v1/webhook_endpoints/{endpoint['id']}"
    assert api.client.post(path, json={"name": "another name"}).status_code == 200
    rotated = api.client.post(f"{path}/rotate_secret", json={}).json()
    assert api.client.delete(path).status_code == 200
    names = ("created", "changed", "rotated", "removed")
    assert changed(api.client) == [
        ("key.created", made["id"]),
        ("key.revoked", made["id"]),
        *((f"webhook_endpoint.{name}", endpoint["id"]) for name in names),
    ]
    shown = api.client.get("/v1/audit").text
    assert not [
        secret for secret in (made["key"], endpoint["signing_secret"], rotated["signing_secret"]) if secret in shown
    ]


def test_changes_of_workers_are_seen_by_operators_alone(api: Api, api_rows: Rows, operator: httpx.Client) -> None:
    worker = public_id("worker_", api_rows.worker())
    for action in ("drain", "undrain", "stop"):
        assert operator.post(f"/v1/workers/{worker}/{action}").status_code == 200
    assert changed(operator) == [(f"worker.{name}", worker) for name in ("drained", "undrained", "stopped")]
    with api.client_of("operations") as same_tenant:
        assert changed(same_tenant) == []


def test_command_line_is_named(api: Api, api_rows: Rows) -> None:
    store_key(api.settings, api_rows.database_url, "a key of an operator's own", name="first")
    with api_rows.database.begin() as connection:
        assert tenants.revoke_key(connection, "a key of an operator's own") == 1
        assert tenants.set_weight(connection, "default", 1)
    entries = api.client.get("/v1/audit").json()["data"]
    assert [entry["action"] for entry in entries] == ["tenant.weighted", "key.revoked", "key.created"]
    assert {(entry["by"], entry["key"]) for entry in entries} == {("command_line", None)}


def test_address_that_is_blocked_is_an_entry(api: Api, operator: httpx.Client) -> None:
    own_page = {"sec-fetch-site": "same-origin", "x-pagemill-page": "1"}
    with anonymous(api.url) as page:
        for _ in range(MOST):
            assert page.post("/session", json={"key": "x" * 20}, headers=own_page).status_code == 401
        assert page.post("/session", json={"key": "x" * 20}, headers=own_page).status_code == 429
    [entry] = operator.get("/v1/audit").json()["data"]
    assert (entry["action"], entry["target"], entry["by"]) == ("session.blocked", "127.0.0.1", "stranger")
    assert changed(api.client) == []


def test_pages_follow_each_other(api: Api, api_rows: Rows) -> None:
    jobs = [job_of(api_rows) for _ in range(5)]
    for job in jobs:
        api.client.post(f"/v1/jobs/{job}/pause")
    found: list[str] = []
    query: dict[str, str | int] = {"limit": 2}
    while True:
        page = api.client.get("/v1/audit", params=query).json()
        found += [entry["target"] for entry in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert found == jobs[::-1]
    assert error_of(api.client.get("/v1/audit", params={"after": "job_1"}), 400)["param"] == "after"


def test_entry_is_gone_with_a_change_that_is_taken_back(api_rows: Rows) -> None:
    job_id = api_rows.job(1)
    owner = api_rows.tenant()
    with api_rows.database.connect() as connection, connection.begin() as transaction:
        assert changing.pause(connection, owner.id, job_id, by=Actor(owner.id, None))
        [entry] = audit.list_entries(connection, owner.id, after=None, limit=2)
        assert entry.action is AuditAction.JOB_PAUSED
        transaction.rollback()
    assert not api_rows.query("SELECT 1 FROM audit")


def test_text_of_callers_is_cut(api_rows: Rows) -> None:
    with api_rows.database.begin() as connection:
        audit.record(
            connection, Actor(None, None), AuditAction.KEY_CREATED, "t" * 10_000, tenant_id=None,
            detail={"name": "x" * 10_000},
        )  # fmt: skip
    [row] = api_rows.query("SELECT length(target) AS target, length(detail ->> 'name') AS name FROM audit")
    assert (row.target, row.name) == (MOST_CHARACTERS, MOST_CHARACTERS)


def test_cancelled_batch_without_a_job_is_an_entry(api_rows: Rows) -> None:
    owner = api_rows.tenant().id
    batch_id = UUID(int=7)
    with api_rows.database.connect() as connection, connection.begin() as transaction:
        connection.execute(
            text("""
                INSERT INTO batches (id, tenant_id, endpoint, input_file_id, completion_window, expires_at)
                VALUES (:id, :owner, '/v1/completions', :id, '24h', clock_timestamp() + interval '1 day')
            """),
            {"id": batch_id, "owner": owner},
        )
        assert batches.cancel_validating(connection, owner, batch_id, by=Actor(owner, None))
        assert not batches.cancel_validating(connection, owner, batch_id, by=Actor(owner, None))
        [entry] = audit.list_entries(connection, owner, after=None, limit=2)
        transaction.rollback()
    assert (entry.action, entry.target) == (AuditAction.BATCH_CANCELLED, public_id("batch_", batch_id))
