"""Every benchmark in turn: `python -m bench`, which is `make bench`. Results go to `bench/results/`."""

from __future__ import annotations

import subprocess
import sys

# Each in a process of its own: what one leaves in memory is not the next one's.
BENCHMARKS = ("bench.engine", "bench.submission", "bench.wakeup")

for benchmark in BENCHMARKS:
    subprocess.run([sys.executable, "-m", benchmark], check=True)
