"""A webhook receiver of the demo's own: a real HTTP server on loopback that verifies what it is sent."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

MAX_BODY = 1 << 20  # bytes


class WebhookReceiver:
    """`url` is where it listens; `events` gets each delivery whose signature holds."""

    def __init__(self, server: ThreadingHTTPServer, events: Queue[dict[str, Any]]) -> None:
        self.url = f"http://127.0.0.1:{server.server_port}/webhook"
        self.events = events


@contextlib.contextmanager
def webhook_receiver(secret: str) -> Iterator[WebhookReceiver]:
    """Receive on a free port until the block is left. A delivery that `secret` did not sign is answered 401."""
    events: Queue[dict[str, Any]] = Queue()
    verifier = Webhook(secret)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(min(int(self.headers.get("content-length", 0)), MAX_BODY))
            try:
                verifier.verify(body.decode(), dict(self.headers.items()))
            except WebhookVerificationError:
                self.send_response(401)
            else:
                events.put(json.loads(body))
                self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Deliveries are the caller's to report."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="webhook-receiver", daemon=True)
        thread.start()
        try:
            yield WebhookReceiver(server, events)
        finally:
            server.shutdown()
            thread.join()
