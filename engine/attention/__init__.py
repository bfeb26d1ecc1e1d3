"""Attention over the paged cache: one interface (`interface.py`), one file for each implementation."""

from engine.attention.choice import make_backend
from engine.attention.interface import (
    AttentionBackend,
    AttentionLayer,
    CapturableAttention,
    DecodeLayout,
    StepAttention,
    StepLayout,
    TurningAttention,
)
from engine.attention.plain import TorchAttention

__all__ = [
    "AttentionBackend",
    "AttentionLayer",
    "CapturableAttention",
    "DecodeLayout",
    "StepAttention",
    "StepLayout",
    "TorchAttention",
    "TurningAttention",
    "make_backend",
]
