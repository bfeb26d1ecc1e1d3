"""A small HTTP server beside a worker or a courier: Prometheus reads `/metrics`, health checks read the rest."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

logger = logging.getLogger(__name__)

READ_TIMEOUT = 5.0  # seconds that a client may take to send its request


def new_registry() -> CollectorRegistry:
    """A registry with the process's own memory, CPU time and file descriptors in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class MetricsServer:
    """Serves a registry from daemon threads.

    GET /metrics   the registry, as Prometheus or OpenMetrics text
    GET /healthz   200 while the process lives
    GET /readyz    200 while `is_ready()`, else 503
    """

    def __init__(self, registry: CollectorRegistry, is_ready: Callable[[], bool]) -> None:
        self._registry = registry
        self._is_ready = is_ready
        self._server: ThreadingHTTPServer | None = None

    def start(self, host: str, port: int) -> int:
        """Listen, and return the port: `port`, or a free one where that is 0. Raises OSError where it is taken."""
        server = self._server = _Server((host, port), self._handler())
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        listening = int(server.server_address[1])
        logger.info("metrics on http://%s:%d/metrics", host, listening)
        return listening

    def close(self) -> None:
        """Listen no more. Safe to call twice, and before `start`."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry, is_ready = self._registry, self._is_ready

        class Handler(BaseHTTPRequestHandler):
            timeout = READ_TIMEOUT

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        encode, content_type = choose_encoder(self.headers.get("accept", ""))
                        self._answer(HTTPStatus.OK, encode(registry), content_type)
                    case "/healthz":
                        self._answer(HTTPStatus.OK, b"ok\n")
                    case "/readyz":
                        if is_ready():
                            self._answer(HTTPStatus.OK, b"ready\n")
                        else:
                            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n")
                    case _:
                        self._answer(HTTPStatus.NOT_FOUND, b"not found\n")

            def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain") -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log no request: a scrape comes every few seconds."""

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        logger.debug("a client of the metrics went away", exc_info=True)
