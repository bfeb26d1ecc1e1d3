"""What a newcomer types first."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from kernels.cpu.library import library
from tests.support.paths import REPOSITORY


@pytest.mark.slow
def test_demo_without_the_real_model_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = tmp_path / ".cache" / "pagemill"
    cache.mkdir(mode=0o700, parents=True)
    shutil.copy(library().path, cache)  # compiled anew it would take most of this test's time
    before = {process.pid for process in psutil.process_iter()}
    demo = subprocess.run(
        [sys.executable, "-m", "cli", "demo"],
        cwd=REPOSITORY,
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "The demo goes on without a real model" in demo.stdout
    assert "signature verified" in demo.stdout
    exact = int(next(line for line in demo.stdout.splitlines() if "answers are exact" in line).split()[0])
    assert exact >= 297
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid not in before and "pagemill-demo" in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []


@pytest.mark.slow
def test_demo_chats_with_the_real_model_and_goes_on_serving_its_page() -> None:
    command = [sys.executable, "-m", "cli", "demo", "--keep"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            said = []
            for line in demo.stdout:
                said.append(line)
                if line.startswith("It goes on serving"):
                    break
            link = demo.stdout.readline().split()[-1]
            assert "signature verified" in "".join(said)
            assert "24 of 24 chats answered" in "".join(said)
            page, _, code = link.partition("#")
            assert httpx.get(page).text.startswith("<!doctype html>")
            login = httpx.post(
                page.replace("/login", "/session"),
                json={"code": code},
                headers={"sec-fetch-site": "same-origin", "x-pagemill-page": "1"},
            )
            assert login.json()["role"] == "operator"
            demo.send_signal(signal.SIGINT)
            assert demo.wait(60) == 0
        finally:
            demo.kill()
