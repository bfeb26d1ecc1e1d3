"""What a benchmark found, printed and kept beside the versions and the machine that it was found on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("celery", "fastapi", "psycopg", "sqlalchemy", "torch", "transformers")


def save(name: str, found: Mapping[str, Any]) -> None:
    """Print `found`, and write it to `bench/results/NAME.json` with where and when it was measured."""
    record = {"benchmark": name, "found": dict(found), "measured": _circumstances()}
    text = json.dumps(record, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def _circumstances() -> dict[str, Any]:
    return {
        "at": time.strftime("%FT%TZ", time.gmtime()),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _commit() -> str | None:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy without its history
    return described.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
