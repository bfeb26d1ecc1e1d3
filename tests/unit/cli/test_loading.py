"""`generate` and `up` say what a load waits for."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.loading import SOURCES, loading_shown
from cli.main import app
from engine.loading import progress
from kernels.cpu import library


@pytest.mark.parametrize("is_terminal", [True, False])
def test_loading_shows_compilation_and_weights(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    shown = io.StringIO()
    with loading_shown(Console(file=shown, force_terminal=is_terminal, width=100), "a-model"):
        logging.getLogger("kernels.cpu.library").info("compiling the CPU kernels")
        if not is_terminal:
            assert "compiling the CPU kernels" in shown.getvalue()
        half = progress.LoadProgress(4_000_000_000)
        half.advance(2_000_000_000)
    assert "weights: 50% of 4.0 GB" in shown.getvalue()
    assert "loading a-model" in shown.getvalue() or is_terminal
    assert all(not logging.getLogger(name).handlers for name in SOURCES)


def test_loading_prints_a_progress_line_every_few_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    told = progress.LoadProgress(100)
    with caplog.at_level(logging.INFO, logger="engine.loading.progress"):
        for clock[0] in (1.0, 4.9, 5.0, 6.0, 9.9, 10.0):
            told.advance(10)
    assert [record.getMessage() for record in caplog.records] == ["weights: 30% of 0.0 GB", "weights: 60% of 0.0 GB"]


def test_compilation_of_kernels_is_announced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_compile", lambda flags, path: path.touch())
    with caplog.at_level(logging.INFO, logger="kernels.cpu.library"):
        for _ in range(2):
            library.build("generic", tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"compiling the CPU kernels, once for this machine; this takes up to a minute (into {tmp_path})"
    ]


def test_generate_says_what_it_loads_and_prints_completions_alone() -> None:
    result = CliRunner().invoke(app, ["generate", "--model", "demo", "--prompt", "17 + 58 ="])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "17 + 58 =75\n"
    assert result.stderr.startswith("loading demo\n")
