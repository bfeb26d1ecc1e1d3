"""Pagemill as a contender, each file offering `CONTENDERS`."""

KV_CACHE_BYTES = 2 << 30
"""Taken at the start, as vLLM does with its own."""
