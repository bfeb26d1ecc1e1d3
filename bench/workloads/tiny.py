"""Seconds on any machine: whether the harness works, not how fast anything is."""

from bench.workload import Workload

WORKLOAD = Workload(
    "tiny",
    "a model of two layers, 6 × (4…12 + 4)",
    "tiny",
    lambda lengths: [(lengths.randint(4, 12), 4) for _ in range(6)],
)
