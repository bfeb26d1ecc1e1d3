"""Ragged prompts and outputs, where padding wastes most."""

from bench.workload import Workload

WORKLOAD = Workload(
    "W2",
    "gpt2, ragged: 64 × (16…512 + 16…128)",
    "gpt2",
    lambda lengths: [(lengths.randint(16, 512), lengths.randint(16, 128)) for _ in range(64)],
)
