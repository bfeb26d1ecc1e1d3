"""How many sequences and tokens a step has, and how large a block is, where the caller leaves it to the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """For `EngineConfig`, in its words."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int


CPU = DeviceLimits(max_num_seqs=256, max_num_batched_tokens=2048, block_size=16)


def limits_of(device: str) -> DeviceLimits:
    """The limits for a device of `EngineConfig.device`: "auto" is a GPU where there is one."""
    if device == "cpu" or not torch.cuda.is_available():
        return CPU
    properties = torch.cuda.get_device_properties(0)
    limits = limits_of_gpu(properties.total_memory)
    logger.info(
        "%s, %.0f GiB: %d sequences and %d tokens a step, blocks of %d, unless set otherwise",
        properties.name,
        properties.total_memory / GIB,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        limits.block_size,
    )
    return limits


def limits_of_gpu(memory: int) -> DeviceLimits:
    """For a GPU with so many bytes: more of both needs memory for activations and logits that a small one lacks.

    In blocks of 64 a tile of the attention kernels reads one block number instead of four.
    """
    if memory >= 60 * GIB:
        return DeviceLimits(max_num_seqs=1024, max_num_batched_tokens=8192, block_size=64)
    if memory >= 20 * GIB:
        return DeviceLimits(max_num_seqs=512, max_num_batched_tokens=4096, block_size=64)
    return DeviceLimits(max_num_seqs=256, max_num_batched_tokens=2048, block_size=64)
