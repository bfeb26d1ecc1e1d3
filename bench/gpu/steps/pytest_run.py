"""Running tests in a step: each one that fails is reported while the others still run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

from bench.gpu.reporting import report

_OUTCOME = "(PASSED|FAILED|ERROR|SKIPPED)"
# "[gw3] [ 12%] PASSED file::test" with xdist, "file::test PASSED [ 12%]" without.
_RESULT = re.compile(rf"^\[gw\d+\].* {_OUTCOME} (\S+::.*\S)|^(\S+::.*\S) {_OUTCOME}")
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?) - (.*)")


def run_tests(what: str, *arguments: str, processes: int) -> None:
    """Report how many tests of `arguments` passed, failed and were skipped, and each failure by name.

    Raises RuntimeError where pytest itself breaks.
    """
    parallel = ["-n", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", *parallel]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    counts: Counter[str] = Counter()
    for line in process.stdout:
        print(line, end="", flush=True)
        if summary := _SUMMARY.match(line):
            report(f"{what}: {summary[1]}", failure=summary[2])
        elif result := _RESULT.search(line):
            outcome = result[1] or result[4]
            counts[outcome.lower()] += 1
            if outcome in ("FAILED", "ERROR"):
                report(f"{what}: {result[2] or result[3]}", failure=outcome, is_detail=True)
    rc = process.wait()
    report(what, **counts)
    if rc not in (0, 1):
        raise RuntimeError(f"pytest ended with code {rc}")
