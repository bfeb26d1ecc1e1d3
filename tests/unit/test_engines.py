"""The settings that speak of the engine reach it."""

from __future__ import annotations

from cli.engines import engine_config
from jobs.settings import Settings


def test_settings_reach_the_engine() -> None:
    settings = Settings(
        dtype="float32",
        quantization="int8",
        deterministic=True,
        device="cpu",
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        kv_cache_bytes=2**20,
        gpu_memory_utilization=0.5,
    )
    config = engine_config(settings)
    assert (config.dtype, config.device, config.max_model_len) == ("float32", "cpu", 100)
    assert (config.quantization, config.deterministic) == ("int8", True)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (3, 64)
    assert (config.cpu_kv_cache_bytes, config.gpu_memory_utilization) == (2**20, 0.5)
