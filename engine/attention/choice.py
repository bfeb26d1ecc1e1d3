"""Which implementation of attention an engine uses."""

from __future__ import annotations

import logging

import torch

from engine.attention.cpu import CpuAttention
from engine.attention.deterministic import DeterministicAttention
from engine.attention.interface import AttentionBackend
from engine.attention.plain import TorchAttention
from engine.attention.triton import TritonAttention
from engine.config import EngineConfig
from engine.device.threads import Threads
from engine.errors import ModelError
from kernels.cpu.library import CpuKernelsUnavailable, library

logger = logging.getLogger(__name__)


def make_backend(config: EngineConfig, device: torch.device, threads: Threads | None = None) -> AttentionBackend:
    """The implementation that the configuration asks for; "auto" takes the best there is for the device.

    `threads` are those of the model's passes. Raises `ModelError` where what was asked for by name cannot run here.
    """
    backend = _make(config, device, threads)
    if config.kv_cache_dtype != "auto" and not isinstance(backend, TritonAttention):
        raise ModelError(
            f"kv_cache_dtype {config.kv_cache_dtype!r} is there with the Triton attention only, not on {device.type}"
        )
    return backend


def _make(config: EngineConfig, device: torch.device, threads: Threads | None) -> AttentionBackend:
    if config.deterministic:
        return DeterministicAttention(threads or Threads())
    wanted = config.attention
    if wanted == "auto":
        wanted = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
    if wanted == "triton":
        return TritonAttention(device, shares_prefixes=config.shared_prefix_attention)
    if wanted == "cpu":
        if device.type != "cpu":
            raise ModelError(f"attention 'cpu' does not run on {device.type}")
        try:
            return CpuAttention(library())
        except CpuKernelsUnavailable as error:
            if config.attention == "cpu":
                raise ModelError(f"attention 'cpu' is not available: {error}") from error
            logger.warning("attention runs in plain torch, which is slower: %s", error)
    return TorchAttention()
