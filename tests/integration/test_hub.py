"""Models from a hub: a small server speaks the hub's protocol, and each download is a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": os.urandom(24_000_000),
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the same weights once more",
    "onnx/model.safetensors": b"of another kind",
    "evil.py": b"raise SystemExit",
}


@dataclass
class Hub:
    """What the server was asked for, and how it should fail."""

    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of each."""

    cut_after: int | None = None
    """Break the next transfer of weights off after so many bytes."""

    def downloads(self) -> set[str]:
        return {
            path.rpartition(f"{COMMIT}/")[2]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        }


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            state.requests.append((self.command, self.path, self.headers.get("Range")))
            if self.path.startswith("/api/models/maker/model/revision/"):
                siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
                about = {"id": "maker/model", "sha": COMMIT, "siblings": siblings}
                self.send(200, json.dumps(about).encode(), with_body=with_body)
                return
            if self.path.startswith(f"/api/models/maker/model/tree/{COMMIT}"):
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in FILES.items()
                ]
                self.send(200, json.dumps(tree).encode(), with_body=with_body)
                return
            match = re.fullmatch(rf"/maker/model/resolve/{COMMIT}/(.+)", self.path)
            if match is None or match[1] not in FILES:
                code = "EntryNotFound" if match else "RepoNotFound"
                self.send(404, b"{}", {"X-Error-Code": code}, with_body=with_body)
                return
            content = FILES[match[1]]
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if (wanted := self.headers.get("Range")) is not None:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send(206, content[start:], headers, with_body=with_body)
                return
            self.send(200, content, headers, with_body=with_body, cut=match[1] == "model.safetensors")

        def send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, *, with_body: bool, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if not with_body:
                return
            if cut and state.cut_after is not None:
                body, state.cut_after = body[: state.cut_after], None
                self.close_connection = True
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(model: str, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`resolve_model` in a fresh process, since the hub's client reads its settings when it is imported."""
    program = "import sys; from engine.loading.hub import resolve_model; print(resolve_model(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", program, model],
        cwd=REPOSITORY,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_hub_downloads_only_needed_files_once(hub: Hub, tmp_path: Path) -> None:
    done = resolve("maker/model", hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    wanted = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in directory.iterdir()} == wanted == hub.downloads()
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]

    hub.requests.clear()
    again = resolve("maker/model", hub.url, tmp_path)
    assert again.stdout == done.stdout
    assert hub.downloads() == set()


def test_broken_download_resumes_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    # The client keeps whole pieces of 10 MiB.
    hub.cut_after = 15_000_000
    done = resolve("maker/model", hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [wanted for _, path, wanted in hub.requests if path.endswith("/model.safetensors") and wanted]
    assert len(ranges) == 1
    assert 0 < int(ranges[0].removeprefix("bytes=").partition("-")[0]) <= 15_000_000


def test_unknown_model_name_is_named(hub: Hub, tmp_path: Path) -> None:
    done = resolve("maker/nothing", hub.url, tmp_path)
    assert done.returncode != 0
    assert "ModelNotFound: the hub has no model maker/nothing" in done.stderr


def test_offline_mode_uses_only_the_cache(hub: Hub, tmp_path: Path) -> None:
    done = resolve("maker/model", hub.url, tmp_path)
    hub.requests.clear()
    assert resolve("maker/model", hub.url, tmp_path, HF_HUB_OFFLINE="1").stdout == done.stdout
    assert hub.requests == []
    lacking = resolve("maker/model", hub.url, tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert "ModelNotFound: maker/model is no local path" in lacking.stderr


def test_unreachable_hub_is_named(tmp_path: Path) -> None:
    done = resolve("maker/model", "http://127.0.0.1:9", tmp_path)
    assert done.returncode != 0
    assert "ModelNotFound: maker/model is no local path" in done.stderr
    assert "cannot be reached" in done.stderr
