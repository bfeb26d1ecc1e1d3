"""What Prometheus reads of the API, over real HTTP and Postgres."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from jobs.queries.backlog import TOKENS_UNKNOWN, read_backlog
from jobs.settings import Settings
from tests.support.api_server import anonymous, running_api, served
from tests.support.proxies import proxied
from tests.support.rows import Rows

TOKEN = "a-token-for-prometheus"


def watched(settings: Settings, token: str | None = TOKEN) -> Settings:
    return settings.model_copy(update={"metrics_token": None if token is None else SecretStr(token)})


def samples(url: str) -> dict[tuple[str, tuple[str, ...]], float]:
    with anonymous(url, TOKEN) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "version=" in answer.headers["content-type"]
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_requests_by_route_and_never_by_path(api_settings: Settings) -> None:
    with running_api(watched(api_settings)) as api:
        api.client.get("/v1/jobs")
        api.client.get("/v1/jobs/job_00000000000000000000000000000001")
        api.client.get("/v1/no-such-secret-path")
        api.client.request("FUNNY", "/v1/jobs")
        read = samples(api.url)
        text = str(read)
    assert read["pagemill:http_requests_total", ("GET", "/v1/jobs", "200")] == 1
    assert read["pagemill:http_requests_total", ("GET", "/v1/jobs/{job_id}", "404")] == 1
    assert read["pagemill:http_requests_total", ("GET", "other", "404")] == 1
    assert ("pagemill:http_request_seconds_count", ("/v1/jobs",)) in read
    assert "secret" not in text
    assert "job_0000" not in text
    assert "FUNNY" not in text


@pytest.mark.parametrize(("configured", "given"), [(None, None), (None, TOKEN), (TOKEN, None), (TOKEN, "x")])
def test_metrics_are_closed_without_the_token(
    api_settings: Settings, configured: str | None, given: str | None
) -> None:
    with running_api(watched(api_settings, configured)) as api, anonymous(api.url, given) as client:
        assert client.get("/metrics").status_code == 401


def test_metrics_answer_without_postgres(api_settings: Settings) -> None:
    assert api_settings.database_url is not None
    with (
        proxied(api_settings.database_url) as (proxy, url),
        served(watched(api_settings).model_copy(update={"database_url": url})) as (server, address),
    ):
        assert samples(address)["pagemill:database_up", ()] == 1
        proxy.down()
        assert samples(address)["pagemill:database_up", ()] == 0
        assert server.started


def test_backlog_counts_lines_and_estimates_their_tokens(rows: Rows) -> None:
    worker_id = rows.worker()
    first, _ = rows.job(10), rows.job(4)
    claimed = rows.claim(worker_id, limit=5).requests
    rows.settle(claimed[:2])
    rows.execute("UPDATE jobs SET prompt_tokens = 60, completion_tokens = 40 WHERE id = :id", id=first)
    rows.execute("UPDATE jobs SET in_progress_at = in_progress_at - interval '1 hour' WHERE id = :id", id=first)
    with rows.database.begin() as connection:
        (model,) = read_backlog(connection).models
    assert (model.jobs, model.pending, model.running, model.live_workers) == (2, 9, 3, 1)
    # 5 lines of the first job at its own mean of 50, 4 of the other at the constant: no job has ended yet.
    assert model.pending_tokens == pytest.approx(5 * 50 + 4 * TOKENS_UNKNOWN)
    assert 3600 <= model.oldest_seconds < 3700


def test_backlog_takes_the_mean_of_the_model_s_ended_jobs(rows: Rows) -> None:
    rows.finish(ended := rows.job(2))
    rows.execute("UPDATE jobs SET prompt_tokens = 30, completion_tokens = 10 WHERE id = :id", id=ended)
    rows.job(3)
    with rows.database.begin() as connection:
        (model,) = read_backlog(connection).models
    assert model.pending_tokens == pytest.approx(3 * 20)
