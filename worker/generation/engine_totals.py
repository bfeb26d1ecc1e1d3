"""Counters of several engines as one: those of a model over its engines, or of a worker over its models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

COUNTERS = (
    "steps",
    "preemptions",
    "prompt_tokens",
    "cached_prompt_tokens",
    "output_tokens",
    "computed_tokens",
    "busy_seconds",
    "rejected",
)
"""Fields of `engine.EngineStats` that only grow; beside them `finished` counts by reason."""

IDLE: Mapping[str, Any] = {
    "seats": 0,
    "running": 0,
    "waiting": 0,
    "compiling": 0,
    "kv_blocks": 0,
    "kv_blocks_used": 0,
    "output_tokens_per_second": 0.0,
    "computed_tokens_per_second": 0.0,
}
"""The gauges while no engine is loaded."""


def add_counters(stats: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`stats` with the counters of `other` added to its own; gauges stay as they are. Either may be empty."""
    if not other:
        return dict(stats)
    finished = Counter(stats.get("finished", {}))
    finished.update(other["finished"])
    return {**stats, **{name: stats.get(name, 0) + other[name] for name in COUNTERS}, "finished": dict(finished)}
