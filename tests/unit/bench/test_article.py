"""What `python -m bench article` makes of its turns, and how it posts."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.article import Address, Server, Turn, post_together, section, table
from bench.publish import write_section


def turn(number: int, requests: int, seconds: float, noise: float = 0.0) -> Turn:
    return Turn(number, requests, 50 * requests, seconds, load_seconds=1.0, noise=noise)


FOUND = {
    "command": "python -m bench article",
    "model": "gpt2-large",
    "servers": [
        asdict(Server("Flask", "float32", False, [turn(0, 10, 100.0), turn(1, 10, 50.0)], {"flask": "3.1.3"})),
        asdict(Server("Pagemill", "int8", True, [turn(0, 50, 50.0), turn(1, 50, 25.0, noise=0.2)])),
    ],
}


def test_ratios_are_those_of_one_round() -> None:
    flask, pagemill = table(FOUND).splitlines()[2:]
    assert flask == "| Flask | float32 | 0.15 (0.10 … 0.20) | 7.5 (5.0 … 10.0) |  |"
    assert pagemill == "| **Pagemill** | int8 | 1.50 (1.00 … 2.00) | 75.0 (50.0 … 100.0) | 10.0 (10.0 … 10.0) |"


def test_section_says_what_else_the_machine_did(tmp_path: Path) -> None:
    measured = {"at": "2026-11-28T00:00:00Z", "commit": "abc", "cpu": "CPU", "cores": 2, "memory_gib": 24.0}
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- bench article -->\nold\n<!-- end article -->\nafter\n")
    write_section("article", section({"found": FOUND, "measured": measured}), document)
    written = document.read_text()
    assert written.startswith("before\n<!-- bench article -->\n")
    assert written.endswith("<!-- end article -->\nafter\n")
    assert "old" not in written
    assert "50 requests a turn at Pagemill, 10 at the sequential server (flask 3.1.3)" in written
    assert "20% of the CPU in the noisiest turn." in written


def test_document_without_a_place_is_named(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("nothing here\n")
    with pytest.raises(LookupError, match=r"page\.md has no place for article"):
        write_section("article", "text", document)


def test_all_requests_are_under_way_together() -> None:
    together = threading.Barrier(5, timeout=30)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            together.wait()
            answer = json.dumps({"usage": {"completion_tokens": asked["max_tokens"]}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert post_together(Address(f"http://127.0.0.1:{server.server_port}"), {"max_tokens": 7}, 5) == [7] * 5
        finally:
            server.shutdown()
            thread.join()
