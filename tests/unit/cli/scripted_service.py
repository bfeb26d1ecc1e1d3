"""An HTTP server on loopback that answers as a test says: for what a real service does only when it is in trouble."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """One answer. A `promised` length above the body's breaks the connection off in the middle."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    promised: int | None = None

    @classmethod
    def of(cls, document: object, status: int = 200, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(json.dumps(document).encode(), status, named)


def job(status: str = "completed", *, failed: int = 0, opened: int = 0) -> dict[str, object]:
    counts = {"total": 2, "completed": 2 - failed - opened, "failed": failed, "cancelled": 0, "expired": 0}
    return {"id": "job_1", "status": status, "model": "demo", "request_counts": counts | {"open": opened}}


UNAVAILABLE = Reply.of({"error": {"message": "Postgres is away", "code": "unavailable"}}, 503, retry_after="0")


@dataclass
class Received:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class ScriptedService:
    """Gives its replies in order, the last one for ever, and keeps what it was asked."""

    def __init__(self, port: int = 0) -> None:
        self.replies: deque[Reply] = deque()
        self.received: list[Received] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                service.received.append(Received(self.command, self.path, dict(self.headers), self._body()))
                reply = service.replies.popleft() if len(service.replies) > 1 else service.replies[0]
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(reply.promised or len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

            def _body(self) -> bytes:
                if self.headers.get("transfer-encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("content-length", 0)))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            do_GET = do_POST = answer

            def log_message(self, format: str, *args: object) -> None:
                """The test looks at `received`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    @classmethod
    @contextlib.contextmanager
    def serving(cls, replies: Sequence[Reply], port: int = 0) -> Iterator[ScriptedService]:
        service = cls(port)
        service.replies.extend(replies)
        with service._server as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            try:
                yield service
            finally:
                server.shutdown()
                thread.join()
