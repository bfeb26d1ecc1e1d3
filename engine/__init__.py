"""A library that turns token ids into token ids: continuous batching over a paged KV cache.

    from engine import Engine, EngineConfig, SamplingParams

Importing the package is cheap: torch is loaded when `Engine` is first looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.outputs import Completion, CompletionProgress, EngineStats, RequestOutput
from engine.sampling_params import SamplingParams
from engine.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = [
    "Completion",
    "CompletionProgress",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
