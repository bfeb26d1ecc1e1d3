"""The API as a process of its own: what it imports, logs and holds in memory, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from jobs.queries.submission import upload_lock
from jobs.settings import Settings
from tests.support.api_server import NDJSON, address_in, anonymous, error_of, new_key, running_api
from tests.support.processes import PATIENCE, await_condition
from tests.support.rows import rows_in

CANARY = "canary-51c0"


@dataclass(frozen=True)
class Process:
    process: subprocess.Popen[bytes]
    url: str
    key: str
    client: httpx.Client
    log: Path


@contextmanager
def api_process(database_url: str, redis_url: str, directory: Path, **environment: str) -> Iterator[Process]:
    """`pagemill api` on a free port."""
    settings = Settings(database_url=database_url, redis_url=redis_url, data_dir=directory)
    with rows_in(database_url) as rows:
        rows.clear()
    key = new_key(settings, "default")
    log = directory / "log"
    variables = {
        "PAGEMILL_DATABASE_URL": database_url,
        "PAGEMILL_REDIS_URL": redis_url,
        "PAGEMILL_DATA_DIR": str(directory),
        "PAGEMILL_PORT": "0",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "api"], env=os.environ | variables | environment, stderr=file, stdout=file
        )

    def address() -> str | None:
        return address_in(log.read_text())

    try:
        await_condition(lambda: process.poll() is not None or address() is not None, "start of the API")
        url = address() or "http://nowhere.invalid"
        with closing(anonymous(url, key)) as client:
            yield Process(process, url, key, client, log)
    finally:
        process.kill()
        process.wait()


def test_api_imports_no_torch() -> None:
    """The image of the API has none of these; here they are installed, so importing them is made to fail."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'triton', 'tokenizers', 'safetensors', 'engine', 'kernels', 'worker'):\n"
        "    sys.modules[name] = None\n"
        "from api.app import create_app\n"
        "from api.server import serve\n"
        "from jobs.settings import Settings\n"
        "app = create_app(Settings(database_url='postgresql://x', redis_url='redis://x'))\n"
        "assert '/v1/jobs' in app.openapi()['paths']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_api_logs_no_secrets_and_stops_before_long_polls_end(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with api_process(database_url, redis_url, tmp_path, PAGEMILL_LOG_LEVEL="debug", PAGEMILL_MAX_WAIT="120") as api:
        good = api.client.post(
            "/v1/jobs",
            params={"model": "demo", "metadata": json.dumps({"a": CANARY}), "stop": CANARY},
            content=json.dumps({"custom_id": CANARY, "prompt": CANARY}).encode(),
            headers=NDJSON | {"idempotency-key": CANARY},
        )
        assert good.status_code == 202
        for content in (
            f'{{"{CANARY}": 1}}',
            f'{{"prompt": "{CANARY}"',
            f'{{"prompt": "{CANARY}", "custom_id": "{CANARY}\\n"}}',
        ):
            assert api.client.post("/v1/jobs?model=demo", content=content, headers=NDJSON).status_code == 400
        inline = {"model": CANARY, "prompts": [CANARY]}
        assert api.client.post("/v1/jobs", json=inline).status_code == 404
        with rows_in(database_url) as rows:
            rows.execute("UPDATE bodies SET body = convert_to(:body, 'UTF8')", body=f'{{"prompt":"{CANARY}"}}')
            [job_id] = [row.id for row in rows.query("SELECT id FROM jobs WHERE state = 'in_progress'")]
        secret = api.client.get("/v1/webhook_secret").json()["secret"]
        polled: list[httpx.Response] = []
        patience = 60

        def poll() -> None:
            with closing(anonymous(api.url, api.key)) as client:
                polled.append(client.get(f"/v1/jobs/job_{job_id.hex}", params={"wait": 2 * patience}))

        thread = threading.Thread(target=poll)
        thread.start()
        begun = f"GET /v1/jobs/job_{job_id.hex} begins"
        await_condition(lambda: begun in api.log.read_text(), "the poll")
        api.process.send_signal(signal.SIGTERM)
        assert api.process.wait(patience) == 0
        thread.join()
        assert polled[0].json()["status"] == "in_progress"
        log = api.log.read_text()
        assert good.headers["x-request-id"] in log
        assert "POST /v1/jobs 202" in log
        for hidden in (CANARY, api.key, secret, "metadata"):
            assert hidden not in log


def test_api_exits_when_its_port_is_taken(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        api_process(database_url, redis_url, tmp_path, PAGEMILL_PORT=str(taken.getsockname()[1])) as api,
    ):
        assert api.process.wait(PATIENCE) != 0
        assert "address already in use" in api.log.read_text()


def test_upload_holds_its_key_until_its_process_dies(
    database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.submission.DEAD_AFTER", 0.5)
    # Long enough to take over what looks dead.
    settings = Settings(database_url=database_url, redis_url=redis_url, data_dir=tmp_path, max_wait=1.0)
    key = {"idempotency-key": "killed"}
    with (
        api_process(database_url, redis_url, tmp_path, PAGEMILL_STAGE_CHUNK_LINES="1") as first,
        running_api(settings) as second,
        rows_in(database_url) as rows,
        socket.create_connection(("127.0.0.1", int(first.url.rpartition(":")[2]))) as upload,
    ):
        upload.sendall(
            b"POST /v1/jobs?model=demo HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
            b"authorization: Bearer %s\r\nidempotency-key: killed\r\ncontent-length: 1000\r\n\r\n"
            b'"one"\n"two"\n' % first.key.encode()
        )
        await_condition(lambda: bool(rows.query("SELECT 1 FROM bodies")), "a stored group")
        [job_id] = [row.id for row in rows.query("SELECT id FROM jobs")]

        def holders() -> list[int]:
            found = rows.query(
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted "
                "AND (classid::bigint << 32 | objid::bigint) = :lock",
                lock=upload_lock(job_id),
            )
            return [row.pid for row in found]

        # Postgres may end the session that proves the upload's life: the process has another one soon.
        [before] = holders()
        rows.query("SELECT pg_terminate_backend(:pid)", pid=before)
        await_condition(lambda: holders() not in ([], [before]), "the lock in another session")
        # Nothing is slower than a process that does nothing.
        first.process.send_signal(signal.SIGSTOP)
        assert error_of(second.upload(b'"again"', key), 409)["code"] == "idempotency_key_in_use"
        first.process.kill()
        first.process.wait()
        answer = second.upload(b'"again"', key)
        assert answer.status_code == 202, answer.text
        assert rows.query("SELECT id FROM jobs WHERE deleted_at IS NOT NULL") == [(job_id,)]
        assert [job["id"] for job in second.client.get("/v1/jobs").json()["data"]] == [answer.json()["id"]]
        assert second.upload(b'"again"', key).json()["id"] == answer.json()["id"]


@pytest.mark.slow
def test_upload_memory_is_flat(database_url: str, redis_url: str, tmp_path: Path) -> None:
    """20,000 lines of 1 kB beside 200: the peak may differ by what a few groups of lines take, no more."""

    def upload(count: int) -> float:
        def body() -> Iterator[bytes]:
            for number in range(count):
                yield json.dumps({"custom_id": f"line-{number}", "prompt": f"{number} " + "x" * 960}).encode() + b"\n"

        began = time.monotonic()
        response = api.client.post("/v1/jobs?model=demo&max_tokens=5", content=body(), headers=NDJSON)
        assert response.json()["request_counts"]["total"] == count, response.text
        return count / (time.monotonic() - began)

    def peak() -> int:
        status = Path(f"/proc/{api.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    with api_process(database_url, redis_url, tmp_path) as api:
        upload(200)
        few = peak()
        rate = upload(20_000)
        many = peak()
        upload(60_000)
        most = peak()
    sys.stdout.write(
        f"{rate:.0f} lines/s; peak MiB: {few >> 20} after 200 lines, {many >> 20} after 20,000, "
        f"{most >> 20} after 60,000 more\n"
    )
    assert many - few < 20 << 20
    assert most - many < 4 << 20
