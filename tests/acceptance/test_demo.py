"""What a newcomer types first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.paths import REPOSITORY


def test_demo_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    demo = subprocess.run(
        [sys.executable, "-m", "cli", "demo"], cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "signature verified" in demo.stdout
    exact = int(next(line for line in demo.stdout.splitlines() if "answers are exact" in line).split()[0])
    assert exact >= 297
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid not in before and "pagemill-demo" in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []
