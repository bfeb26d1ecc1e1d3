"""Log lines as people and as collectors read them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from cli import logs


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs.QUIET}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, quiet in levels.items():
        logging.getLogger(name).setLevel(quiet)


def test_json_log_has_a_field_for_each_id(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("worker.courier").warning("%s was\nended", "job_1", extra={"job_id": "job_1"})
    entry = json.loads(capsys.readouterr().err)
    assert entry.pop("time")
    assert entry.pop("process")
    assert entry == {"level": "WARNING", "logger": "worker.courier", "message": "job_1 was\nended", "job_id": "job_1"}


def test_json_log_of_an_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("api").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: no" in json.loads(line)["exc_info"]


def test_text_log_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logging.getLogger("api").info("ready")
    assert capsys.readouterr().err.endswith(" INFO    api: ready\n")
