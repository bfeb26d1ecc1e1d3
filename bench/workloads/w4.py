"""A newer, larger model: grouped queries, a head of 152 k tokens."""

from bench.workload import Workload

WORKLOAD = Workload("W4", "Qwen3-0.6B, 32 × (128 + 64)", "qwen3-0.6b", lambda lengths: [(128, 64)] * 32)
