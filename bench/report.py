"""What a benchmark found, printed and kept beside the versions and the machine that it was found on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.machine import circumstances

RESULTS = Path(__file__).parent / "results"


def save(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Print `found`, write it to `bench/results/NAME.json` with where and when it was measured, and return both."""
    record = {"benchmark": name, "found": dict(found), "measured": circumstances()}
    text = json.dumps(record, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
    return record
