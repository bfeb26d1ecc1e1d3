"""Chain two jobs by webhook: `chain_by_webhook.py FILE [MODEL]`.

The first drafts a text for each line of FILE. Its webhook, once its signature is verified, starts the second, which
works on the drafts. Prints each line with draft and review.

The state of the chain is the service's: the handler reads the first job's results by the id in the event, and its
Idempotency-Key makes a webhook that comes twice start one second job.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
from standardwebhooks import Webhook, WebhookVerificationError


def submit(client: httpx.Client, prompts: list[str], model: str, webhook: str, key: str) -> str:
    """Submit a job that calls `webhook` at its end, once for each idempotency `key`. Returns its id."""
    body = {
        "model": model,
        "prompts": [{"custom_id": str(number), "prompt": prompt} for number, prompt in enumerate(prompts)],
        "params": {"max_tokens": 12, "temperature": 0},
        "webhook": {"url": webhook, "events": ["job.completed"]},
    }
    answer = client.post("/v1/jobs", json=body, headers={"idempotency-key": key}).raise_for_status()
    return str(answer.json()["id"])


def texts(client: httpx.Client, job_id: str) -> list[str]:
    """A job's answers in the order of its prompts."""
    found: dict[int, str] = {}
    after = 0
    while (
        lines := client.get(f"/v1/jobs/{job_id}/results", params={"after": after}).raise_for_status().text.splitlines()
    ):
        for result in map(json.loads, lines):
            after = result["seq"]
            found[int(result["custom_id"])] = result["response"]["body"]["choices"][0]["text"]
    return [found[number] for number in sorted(found)]


class Chain(HTTPServer):
    """Receives the webhooks of both jobs, one after the other."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.client = client
        self.model = model
        self.verifier = Webhook(client.get("/v1/webhook_secret").raise_for_status().json()["secret"])
        self.url = f"http://127.0.0.1:{self.server_port}/webhook"
        self.first: str = ""
        self.second: str | None = None
        self.ended = threading.Event()

    def take(self, event: dict[str, Any]) -> None:
        """Go on with the chain: the first job's end starts the second, whose end ends the chain."""
        job_id = event["data"]["id"]
        if job_id == self.first:
            drafts = [f"reverse {draft} =" for draft in texts(self.client, job_id)]
            self.second = submit(self.client, drafts, self.model, self.url, f"review of {job_id}")
        elif job_id == self.second:
            self.ended.set()


class Receiver(BaseHTTPRequestHandler):
    server: Chain

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            event = self.server.verifier.verify(body.decode(), dict(self.headers.items()))
        except WebhookVerificationError:
            self.send_response(401)
        else:
            # A failure here is answered 500 by closing the connection, and the courier comes again.
            self.server.take(event)
            self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """The service's own delivery log is enough."""


def main(file: str, model: str = "demo") -> None:
    lines = Path(file).read_text().splitlines()
    with httpx.Client(
        base_url=os.environ["PAGEMILL_URL"],
        headers={"authorization": f"Bearer {os.environ['PAGEMILL_API_KEY']}"},
        timeout=60,
    ) as client:
        chain = Chain(client, model)
        chain.first = submit(client, [f"reverse {line} =" for line in lines], model, chain.url, os.urandom(8).hex())
        threading.Thread(target=chain.serve_forever, daemon=True).start()
        chain.ended.wait()
        chain.shutdown()
        assert chain.second is not None
        for line, draft, review in zip(lines, texts(client, chain.first), texts(client, chain.second), strict=True):
            sys.stdout.write(json.dumps({"line": line, "draft": draft, "review": review}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
