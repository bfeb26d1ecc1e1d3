"""`pagemill results -o`: a file is replaced whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.client import Client, OnOutage, ServiceError
from cli.commands import jobs
from jobs.settings import Settings


class Lines(Client):
    """A service that sends some lines, and may break off."""

    def __init__(self, *, breaks_off: bool) -> None:
        super().__init__("http://127.0.0.1:9", "key")
        self._breaks_off = breaks_off

    def results(self, job_id: str, *, after: int = 0, on_outage: OnOutage | None = None) -> Iterator[bytes]:
        yield b"one"
        if self._breaks_off:
            raise ServiceError("gone")
        yield b"two"


def test_results_file_keeps_its_old_content_until_every_line_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("precious\n")
    for breaks_off, expected in ((True, "precious\n"), (False, "one\ntwo\n")):
        monkeypatch.setattr(Client, "from_settings", lambda settings, b=breaks_off: Lines(breaks_off=b))
        assert jobs.results("job_1", after=0, output=target) == int(breaks_off)
        assert target.read_text() == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_data_directory_may_be_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_DATA_DIR", "~/pages")
    assert Settings().data_dir == Path.home() / "pages"
