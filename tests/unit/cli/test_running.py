"""running.json: how the other commands find what `up` runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app


@pytest.mark.parametrize(
    "content", ['{"url": "http://127.0.0.1:1", "database_url": "postgresql://:hidd', "[]", '{"a": 1}', ""]
)
def test_damaged_running_json_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("PAGEMILL_DATA_DIR", str(tmp_path))
    (tmp_path / "running.json").write_text(content)
    for command in (["status", "job_1"], ["keys", "list"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"{tmp_path}/running.json is damaged.")
        assert len(result.stderr.splitlines()) == 1
        assert "hidd" not in result.stderr
