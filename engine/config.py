"""How an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; they hold for its life."""

    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    """Positions a sequence may have, prompt and output together. None: as many as the model was made for."""

    max_num_seqs: int = 256
    """Sequences in one step."""

    max_num_batched_tokens: int = 2048
    """Tokens in one step, prompt chunks and decodes together."""

    block_size: int = 16
    """Positions in one block of the KV cache."""

    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    seed: int = 0
    """From which requests without a seed of their own get one."""

    deterministic: bool = False
    attention: str = "auto"
