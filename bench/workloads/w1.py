"""The case of the article that started this: gpt2-large, 50 requests of 50 tokens each."""

from bench.workload import Workload

WORKLOAD = Workload("W1", "gpt2-large, 50 × (8 + 50)", "gpt2-large", lambda lengths: [(8, 50)] * 50)
