"""Step 3b: the engine's device loop: steps that start ahead, several decode steps, graphs, attention and float8."""

from __future__ import annotations

from bench.gpu.reporting import step_options
from bench.gpu.steps.pytest_run import run_tests

ALL = (
    "--timeout=40",
    "tests/unit/engine/loop",
    "tests/unit/engine/execution",
    "tests/parity/test_triton_attention.py",
    "tests/parity/test_float8_cache.py",
)
DRY = ("tests/unit/engine/loop/test_host_reads.py::test_starting_a_step_reads_nothing_on_the_host",)


def main() -> None:
    is_dry = step_options().is_dry
    run_tests("engine", *(DRY if is_dry else ALL), processes=1 if is_dry else 12)


if __name__ == "__main__":
    main()
