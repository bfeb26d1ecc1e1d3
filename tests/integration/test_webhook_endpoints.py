"""Webhook endpoints as OpenAI's client keeps them: subscriptions, secrets, tests, the log and its replays."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import openai
import pytest
from openai.types.webhooks import BatchFailedWebhookEvent

from jobs.queries import batches
from jobs.settings import Settings
from tests.integration.test_courier_dispatch import dispatching
from tests.support.api_server import Api, error_of, running_api
from tests.support.processes import await_condition
from tests.support.receivers import Reply, receiver
from tests.support.rows import Rows


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[Api]:
    with running_api(api_settings.model_copy(update={"poll_interval": 0.05})) as running:
        yield running


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    key = api.client.headers["authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing(api_rows: Rows) -> None:
    api_rows.execute("DELETE FROM events")
    api_rows.execute("DELETE FROM batches")
    api_rows.clear_jobs()
    api_rows.execute("DELETE FROM webhook_endpoints")


def batch(api: Api, content: str = "no JSON\n") -> str:
    """A batch that fails in its validation, unless its content is better."""
    form = {"file": ("in.jsonl", content), "purpose": (None, "batch")}
    file = api.client.post("/v1/files", files=form).json()["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    made: str = api.client.post("/v1/batches", json=asked).json()["id"]
    return made


def subscribe(api: Api, url: str, *event_types: str) -> None:
    """To types that the official client does not know, too."""
    asked = {"name": "mine", "url": url, "event_types": event_types}
    assert api.client.post("/v1/webhook_endpoints", json=asked).status_code == 200


def deliveries(api: Api, **query: str) -> list[dict[str, object]]:
    data: list[dict[str, object]] = api.client.get("/v1/webhooks/deliveries", params=query).json()["data"]
    return data


def test_endpoint_is_kept_and_shows_its_secret_once(api: Api, client: openai.OpenAI) -> None:
    made = client.webhooks.create(name="mine", url="https://you.example/hook", event_types=["batch.completed"])
    assert made.signing_secret.startswith("whsec_")
    shown = client.webhooks.retrieve(made.id)
    assert (shown.name, shown.url, shown.event_types) == ("mine", "https://you.example/hook", ["batch.completed"])
    assert made.signing_secret not in api.client.get(f"/v1/webhook_endpoints/{made.id}").text
    changed = client.webhooks.update(made.id, name="ours", url=made.url, event_types=["batch.failed"])
    assert (changed.name, changed.event_types) == ("ours", ["batch.failed"])
    second = client.webhooks.create(name="more", url="https://you.example/hook", event_types=["batch.completed"])
    assert [endpoint.id for endpoint in client.webhooks.list(limit=1)] == [second.id, made.id]
    with api.client_of("other") as other:
        assert other.get("/v1/webhook_endpoints").json()["data"] == []
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rotate_secret"), ("POST", "")):
            foreign = other.request(method, f"/v1/webhook_endpoints/{made.id}{path}")
            assert error_of(foreign, 404)["code"] == "webhook_endpoint_not_found"
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)
    assert "batch.completed" in client.webhooks.event_types.list().data


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"url": "ftp://you.example"}, "url"),
        ({"url": "https://"}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["response.completed"]}, "event_types[0]"),
        ({"name": ""}, "name"),
        ({"more": 1}, "more"),
    ],
)
def test_wrong_endpoint_is_refused_by_name(api: Api, change: dict[str, object], param: str) -> None:
    asked = {"name": "x", "url": "https://you.example", "event_types": ["batch.failed"]} | change
    assert error_of(api.client.post("/v1/webhook_endpoints", json=asked), 400)["param"] == param


def test_end_of_a_batch_reaches_those_who_subscribed(api: Api, client: openai.OpenAI, api_rows: Rows) -> None:
    with receiver() as wanted, receiver() as other, dispatching(api_rows.database_url):
        endpoint = client.webhooks.create(name="x", url=wanted.url, event_types=["batch.failed"])
        subscribe(api, other.url, "batch.completed", "job.completed")
        failed = batch(api)
        api_rows.finish(api_rows.job(1))
        wanted.await_requests(1)
        other.await_requests(1)
    (request,) = wanted.received
    event = client.webhooks.unwrap(request.body.decode(), request.headers, secret=endpoint.signing_secret)
    assert isinstance(event, BatchFailedWebhookEvent)
    assert (event.type, event.data.id) == ("batch.failed", failed)
    (request,) = other.received
    assert b'"job.completed"' in request.body
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(request.body.decode(), request.headers, secret=endpoint.signing_secret)
    api_rows.check()


def test_batch_that_is_cancelled_before_it_has_a_job_says_so(api: Api, client: openai.OpenAI, api_rows: Rows) -> None:
    client.webhooks.create(name="x", url="https://you.example", event_types=["batch.cancelled"])
    made = UUID(hex=batch(api).removeprefix("batch_"))
    await_condition(lambda: bool(api_rows.query("SELECT 1 FROM batches WHERE failed_at IS NOT NULL")), "validation")
    api_rows.execute("UPDATE batches SET failed_at = NULL, held_until = clock_timestamp() + interval '1 hour'")
    with api_rows.database.begin() as connection:
        assert batches.cancel_validating(connection, api_rows.tenant().id, made)
    (delivery,) = deliveries(api)
    assert (delivery["event"]["type"], delivery["batch_id"]) == ("batch.cancelled", f"batch_{made.hex}")  # type: ignore[index]


def test_live_requests_send_nothing(api: Api, client: openai.OpenAI, api_rows: Rows) -> None:
    subscribe(api, "https://you.example", "job.completed")
    job_id = api_rows.job(1)
    api_rows.execute("UPDATE jobs SET is_live = true WHERE id = :id", id=job_id)
    api_rows.finish(job_id)
    assert deliveries(api) == []


def test_both_secrets_sign_until_the_old_one_ends(api: Api, client: openai.OpenAI, api_rows: Rows) -> None:
    with receiver() as server, dispatching(api_rows.database_url):
        made = client.webhooks.create(name="x", url=server.url, event_types=["batch.failed"])
        rotated = api.client.post(
            f"/v1/webhook_endpoints/{made.id}/rotate_secret", json={"keep_old_secret_active_for_24_hours": True}
        ).json()
        batch(api)
        server.await_requests(1)
        api_rows.execute("UPDATE webhook_endpoints SET old_secret_until = clock_timestamp()")
        batch(api)
        server.await_requests(2)
        last = client.webhooks.rotate_secret(made.id)
        batch(api)
        server.await_requests(3)
    secrets = (made.signing_secret, rotated["signing_secret"], last.signing_secret)
    valid = [[_is_valid(client, request, secret) for secret in secrets] for request in server.received]
    assert valid == [[True, True, False], [False, True, False], [False, False, True]]


def _is_valid(client: openai.OpenAI, request: object, secret: str) -> bool:
    try:
        client.webhooks.verify_signature(request.body.decode(), request.headers, secret=secret)  # type: ignore[attr-defined]
    except openai.InvalidWebhookSignatureError:
        return False
    return True


@pytest.mark.parametrize("reply", [(204, {}), (500, {})])
def test_test_says_what_the_receiver_answers_and_is_sent_once(
    client: openai.OpenAI, api_rows: Rows, reply: Reply
) -> None:
    with receiver(reply) as server, dispatching(api_rows.database_url):
        made = client.webhooks.create(name="x", url=server.url, event_types=["batch.failed"])
        tested = client.webhooks.test(made.id, event_type="batch.completed")
    assert (tested.status_code, tested.success, tested.event_type) == (reply[0], True, "batch.completed")
    (request,) = server.received
    event = client.webhooks.unwrap(request.body.decode(), request.headers, secret=made.signing_secret)
    assert event.type == "batch.completed"
    assert api_rows.query("SELECT 1 FROM deliveries WHERE due_at IS NOT NULL") == []


def test_test_of_a_receiver_that_is_away_is_a_400(api: Api, client: openai.OpenAI, api_rows: Rows) -> None:
    with dispatching(api_rows.database_url):
        made = client.webhooks.create(name="x", url="http://127.0.0.1:9/", event_types=["batch.failed"])
        with pytest.raises(openai.BadRequestError, match="no answer came"):
            client.webhooks.test(made.id, event_type="batch.completed")


def test_log_has_each_attempt_and_a_replay_adds_one(api: Api, client: openai.OpenAI, api_rows: Rows) -> None:
    with receiver((500, {}), (500, {}), (500, {}), (204, {})) as server, dispatching(api_rows.database_url):
        server.answer = "é".encode() * 200
        client.webhooks.create(name="x", url=server.url, event_types=["batch.failed"])
        failed = batch(api)
        await_condition(lambda: [one["status"] for one in deliveries(api)] == ["given_up"], "the last attempt")
        (delivery,) = deliveries(api, status="given_up")
        assert [one["status_code"] for one in delivery["attempts"]] == [500] * 3  # type: ignore[attr-defined]
        assert delivery["attempts"][0]["answer"] == "é" * 128  # type: ignore[index]
        assert delivery["attempts"][0]["error"] == "the receiver answered 500"  # type: ignore[index]
        assert (delivery["batch_id"], delivery["last_status_code"]) == (failed, 500)
        with api.client_of("other") as other:
            assert other.get("/v1/webhooks/deliveries").json()["data"] == []
            foreign = other.post(f"/v1/webhooks/deliveries/{delivery['id']}/replay")
            assert error_of(foreign, 404)["code"] == "webhook_delivery_not_found"
        assert api.client.post(f"/v1/webhooks/deliveries/{delivery['id']}/replay").json()["status"] == "pending"
        await_condition(lambda: [one["status"] for one in deliveries(api)] == ["delivered"], "the replay")
    (delivered,) = deliveries(api)
    assert delivered["num_attempts"] == 4
    assert len({request.headers["webhook-id"] for request in server.received}) == 1
    api_rows.check()


def test_log_is_paged_and_filtered_by_job(api: Api, api_rows: Rows) -> None:
    job_ids = [api_rows.job(1, webhook="https://you.example/hook") for _ in range(3)]
    for job_id in job_ids:
        api_rows.finish(job_id)
    ids = [one["id"] for one in deliveries(api)]
    first = api.client.get("/v1/webhooks/deliveries", params={"limit": 2}).json()
    assert (first["has_more"], [one["id"] for one in first["data"]]) == (True, ids[:2])
    assert [one["id"] for one in deliveries(api, after=first["last_id"])] == ids[2:]
    (one,) = deliveries(api, job=f"job_{job_ids[0].hex}")
    assert one["job_id"] == f"job_{job_ids[0].hex}"
    for query in ({"job": "x"}, {"after": "dlv_x"}, {"status": "x"}):
        assert error_of(api.client.get("/v1/webhooks/deliveries", params=query), 400)["param"] == next(iter(query))
