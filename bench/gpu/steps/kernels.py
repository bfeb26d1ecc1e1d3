"""Step 2: every kernel beside plain torch; those that are wrong or do not run are named."""

from __future__ import annotations

from bench.gpu.reporting import step_options
from bench.gpu.steps.pytest_run import run_tests

ALL = (
    "--timeout=60",
    "tests/unit/kernels",
    "--ignore=tests/unit/kernels/test_cpu_library.py",
    "--ignore=tests/unit/kernels/test_cpu_linear.py",
    "--ignore=tests/unit/kernels/test_ahead_of_time.py",
)
DRY = ("tests/unit/kernels/test_small_kernels.py", "-k", "rms_norm")


def main() -> None:
    is_dry = step_options().is_dry
    run_tests("kernels", *(DRY if is_dry else ALL), processes=1 if is_dry else 12)


if __name__ == "__main__":
    main()
