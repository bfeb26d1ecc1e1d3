"""Attention over the paged cache: one interface (`interface.py`), one file for each implementation."""

from engine.attention.choice import make_backend
from engine.attention.interface import (
    AttentionBackend,
    CapturableAttention,
    DecodeMetadata,
    RotaryAttention,
    StepAttention,
)
from engine.attention.layer import AttentionLayer
from engine.attention.plain import TorchAttention
from kernels.paged_layout import AttentionMetadata

__all__ = [
    "AttentionBackend",
    "AttentionLayer",
    "AttentionMetadata",
    "CapturableAttention",
    "DecodeMetadata",
    "RotaryAttention",
    "StepAttention",
    "TorchAttention",
    "make_backend",
]
