"""What a step of a run says: lines of JSON on its output, each written as soon as it is known.

A step that is ended at its limit keeps what it has reported. Everything else on its output is a log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "@report "


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What a step is told by `bench.gpu.first_run`."""

    is_dry: bool
    """Tiny sizes, on the CPU; Triton's kernels run in its interpreter."""

    kit: Path
    """A folder with vLLM in parts; it may be absent."""

    seconds: float
    """The step's limit."""

    names: tuple[str, ...]


def step_options() -> StepOptions:
    """From the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--kit", type=Path, default=Path(".gpu-kit"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("names", nargs="*")
    parsed = parser.parse_args()
    return StepOptions(parsed.dry_run, parsed.kit, parsed.seconds, tuple(parsed.names))


def report(what: str, **values: Any) -> None:
    """Keep a result of this step. The table knows seconds, share, limit, failure, is_detail (not in the table)."""
    print(MARK + json.dumps({"what": what, **values}), flush=True)


def skip(reason: str) -> None:
    """Say that this step has nothing to do here."""
    print(MARK + json.dumps({"skip": reason}), flush=True)


@contextlib.contextmanager
def attempt(what: str, *, is_detail: bool = False) -> Iterator[None]:
    """Report a block that raises as a failure, and go on after it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - any error is this measurement's result
        reason = " ".join(str(error).split())[:300]
        report(what, failure=f"{type(error).__name__}: {reason}", is_detail=is_detail)


def reports(output: str) -> list[dict[str, Any]]:
    """What a step's output holds. A last line that was cut off is left out."""
    found = []
    for line in output.splitlines():
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line.removeprefix(MARK)))
    return found
