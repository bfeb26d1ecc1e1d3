"""A run's lines become a record and tables, failures included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.record import DOCS, publish, read

MACHINE = {
    "what": "machine",
    "commit": None,
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "memory_mib": 81559, "cuda": "13.0"},
}


def line(step: str, status: str = "done", *data: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"step": step, "title": step, "status": status, "seconds": 1.0, "data": list(data), **values}


def write(path: Path, *lines: dict[str, Any], is_dry: bool = False) -> Path:
    begin = {"begin": "2026-11-28T02:00:00Z", "is_dry": is_dry, "commit": "abc"}
    path.write_text("".join(json.dumps(one) + "\n" for one in (begin, *lines)))
    return path


def test_record_is_published_with_its_failures(tmp_path: Path) -> None:
    (tmp_path / "gpu.md").write_text("# A\n<!-- gpu kernels -->\nold\n<!-- end gpu kernels -->\nafter\n")
    (tmp_path / "benchmarks.md").write_text("<!-- gpu cases -->\n<!-- end gpu cases -->\n")
    run = write(
        tmp_path / "run.jsonl",
        line("limits", "done", MACHINE),
        line("decode", "done", {"what": "best", "seconds": 2e-6, "share": 0.9, "limit": "copy"}),
        line("kernels", "failed", {"what": "test_x", "failure": "wrong"}, stderr="it broke"),
        line("ragged", "ended at its limit", {"what": "ours", "seconds": 3.0}),
    )
    file = publish(read(run), tmp_path / "results", tmp_path)
    assert file.name == "gpu-nvidia-h100-80gb-hbm3-2026-11-28.json"
    assert [step["step"] for step in json.loads(file.read_text())["steps"]] == ["limits", "decode", "kernels", "ragged"]
    kernels, cases = (tmp_path / "gpu.md").read_text(), (tmp_path / "benchmarks.md").read_text()
    assert "old" not in kernels
    assert kernels.endswith("after\n")
    assert "| decode | best | 2.0 | 90% copy |  |" in kernels
    assert "| kernels | failed | 1 | it broke |" in kernels
    assert "| kernels | test_x |  |  | wrong |" in kernels
    assert "commit abc" in kernels
    assert "| ragged | ended at its limit | 1 |  |" in cases
    assert "decode" not in cases


def test_record_keeps_the_last_run_of_a_step_that_was_not_skipped(tmp_path: Path) -> None:
    lines = (line("limits", "done", MACHINE), line("decode", "failed"), line("decode"), line("decode", "skipped"))
    assert [step["status"] for step in read(write(tmp_path / "run", *lines))["steps"]] == ["done", "done"]


@pytest.mark.parametrize("lines", [(), (line("limits", "done", MACHINE | {"gpu": None}),)])
def test_run_without_a_card_is_refused(tmp_path: Path, lines: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(ValueError, match="which card"):
        read(write(tmp_path / "run", *lines))


def test_dry_run_is_refused_as_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dry run"):
        read(write(tmp_path / "run", line("limits", "done", MACHINE), is_dry=True))


def test_gpu_pages_have_a_place_for_the_tables() -> None:
    assert "<!-- gpu kernels -->" in (DOCS / "gpu.md").read_text()
    assert "<!-- gpu cases -->" in (DOCS / "benchmarks.md").read_text()
