"""A long prefix that all requests share, as a system prompt is."""

from bench.workload import Workload

WORKLOAD = Workload(
    "W3",
    "gpt2, shared prefix: 64 × (384 + 32 + 32)",
    "gpt2",
    lambda lengths: [(384 + 32, 32)] * 64,
    shared_prefix=384,
)
