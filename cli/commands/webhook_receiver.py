"""A webhook receiver for the demo and `webhooks listen`: a real HTTP server that verifies what it is sent."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

MAX_BODY = 1 << 20  # bytes


class WebhookReceiver:
    """`url` is where it listens; `events` gets each delivery whose signature holds, `refused` why others do not."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        host = str(server.server_address[0])
        self.url = f"http://{host}:{server.server_port}/webhook"
        self.events: Queue[dict[str, Any]] = Queue()
        self.refused: deque[str] = deque()


@contextlib.contextmanager
def webhook_receiver(secret: str, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[WebhookReceiver]:
    """Receive until the block is left, on a free port where `port` is 0. What `secret` did not sign is answered 401."""
    verifier = Webhook(secret)
    made: list[WebhookReceiver] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(min(int(self.headers.get("content-length", 0)), MAX_BODY))
            try:
                verifier.verify(body.decode(), dict(self.headers.items()))
            except WebhookVerificationError as error:
                made[0].refused.append(str(error))
                self.send_response(401)
            else:
                made[0].events.put(json.loads(body))
                self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Deliveries are the caller's to report."""

    with ThreadingHTTPServer((host, port), Handler) as server:
        made.append(WebhookReceiver(server))
        thread = threading.Thread(target=server.serve_forever, name="webhook-receiver", daemon=True)
        thread.start()
        try:
            yield made[0]
        finally:
            server.shutdown()
            thread.join()
