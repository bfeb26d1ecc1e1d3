"""W1 on a model a sixth of the size."""

from bench.workload import Workload

WORKLOAD = Workload("W1s", "gpt2, 50 × (8 + 50)", "gpt2", lambda lengths: [(8, 50)] * 50)
