"""From settings to an engine."""

from __future__ import annotations

from engine import EngineConfig
from engine.device.limits import CPU, limits_of
from jobs.settings import Settings


def engine_config(settings: Settings) -> EngineConfig:
    """The engine's part of the settings; what they leave open fits the device. Raises `InvalidConfig`."""
    limits = limits_of(settings.device)
    return EngineConfig(
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        quantization=settings.quantization,
        deterministic=settings.deterministic,
        device=settings.device,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs or limits.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens or limits.max_num_batched_tokens,
        block_size=settings.block_size or limits.block_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        tensor_parallel_size=settings.tensor_parallel_size,
        cpu_kv_cache_bytes=settings.kv_cache_bytes,
        weight_cache_bytes=settings.weight_cache_bytes,
        weight_cache_dir=settings.weight_cache_dir,
    )


def is_in_main_memory(settings: Settings) -> bool:
    """Whether a model lies in the main memory of the worker's own process, whole."""
    return settings.tensor_parallel_size == 1 and limits_of(settings.device) is CPU
