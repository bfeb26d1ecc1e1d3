"""webhooks listen, as typed at a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import httpx
from standardwebhooks import Webhook

from jobs.keys import new_webhook_secret
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE


@contextmanager
def listening(secret: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process that ends after one event, and its URL."""
    command = [sys.executable, "-m", "cli", "webhooks", "listen", "--secret", secret, "--count", "1"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline().split()[2].rstrip(";")
        finally:
            process.kill()


def test_listen_prints_what_is_signed_and_refuses_the_rest() -> None:
    secret, body = new_webhook_secret(), json.dumps({"type": "job.completed", "data": {"id": "job_1"}})
    now = datetime.now(UTC)

    def headers(by: str) -> dict[str, str]:
        stamp = str(int(now.timestamp()))
        signature = Webhook(by).sign("evt_1", now, body)
        return {"webhook-id": "evt_1", "webhook-timestamp": stamp, "webhook-signature": signature}

    with listening(secret) as (process, url), httpx.Client(trust_env=False) as client:
        assert client.post(url, content=body, headers=headers(new_webhook_secret())).status_code == 401
        assert client.post(url, content=body, headers=headers(secret)).status_code == 204
        shown, told = process.communicate(timeout=PATIENCE)
    assert json.loads(shown) == json.loads(body)
    assert "refused: No matching signature found" in told
    assert process.returncode == 0
