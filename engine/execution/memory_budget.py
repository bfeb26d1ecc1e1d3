"""How much memory of a GPU is left for the KV cache: all that may be used, less what a step and its graphs take.

gpu_memory_utilization × all  =  weights  +  the largest step  +  graphs             +  device state  +  KV cache
                                 loaded      run, measured        the largest decode     set aside       the rest
                                                                  step, run, measured,
                                                                  and something for each

All graphs share one pool as large as the largest needs, apart from other steps' memory. Steps that the host samples
need more for each row; they are measured with few rows, and `MemoryBackoff` halves a step that has too many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.attention import AttentionLayer
from engine.attention.kv_cache import block_bytes
from engine.batch import Batch, BatchEntry
from engine.config import EngineConfig
from engine.device.cuda_graphs import batch_size
from engine.errors import ModelError
from engine.execution.decode_state import NUM_COLUMNS
from kernels.integers import ceil_div

# Share of the CPU's free memory that is left to activations and to everything else.
_CPU_SHARE = 0.5

_GRAPH_SHARE = 1 / 32
_MOST_GRAPH_BYTES = 2**30

HOST_SAMPLED_ROWS = 256
"""Rows of logits in the largest step that is measured with sampling on the host."""


def graph_bytes(total: int, decode_step: int) -> int:
    """What CUDA graphs may take of `total` bytes, where a decode step of the largest batch takes `decode_step`."""
    return decode_step + min(_MOST_GRAPH_BYTES, int(total * _GRAPH_SHARE))


def state_bytes(batch_slots: int, max_blocks: int, max_steps: int) -> int:
    """What `DecodeState` takes, and the buffers of graphs."""
    state = (batch_slots + 1) * (8 * NUM_COLUMNS + 4 * max_blocks)
    return state + batch_size(batch_slots) * (8 + 4 * max_blocks + 8 * max_steps) + 8


def largest_step(config: EngineConfig, max_model_len: int, *, num_logits: int) -> tuple[Batch, int]:
    """A step with as many tokens as any can have, of which `num_logits` rows of logits are wanted, or as many as it has
    tokens; and how many blocks it needs.

    Its sequences overwrite each other's blocks: only the memory matters.
    """
    num_tokens = config.max_num_batched_tokens
    lengths = [max_model_len] * (num_tokens // max_model_len)
    lengths += [rest] if (rest := num_tokens % max_model_len) else []
    lengths.sort()
    num_blocks = ceil_div(lengths[-1], config.block_size)
    missing = min(num_logits, num_tokens)
    entries = []
    for place, length in enumerate(lengths):
        rows = min(length, ceil_div(missing, len(lengths) - place))
        missing -= rows
        entries.append(BatchEntry([0] * length, 0, range(num_blocks), rows))
    return Batch(entries), num_blocks


def largest_decode(batch_slots: int, block: int) -> Batch:
    """A step in which as many sequences as there can be decode, all in one block: only the memory matters."""
    return Batch([BatchEntry([0], 0, [block], 1)] * batch_slots)


def step_bytes(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> int:
    """What a step takes on the GPU beyond what is there before it, by running it.

    Raises `ModelError` when it does not fit.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        step(batch)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a step of {batch.num_tokens} tokens does not fit into the GPU's memory beside the weights: "
            "lower max_num_batched_tokens or max_num_seqs"
        ) from error
    taken: int = torch.cuda.max_memory_allocated(device) - before
    return taken


def choose_num_blocks(
    config: EngineConfig,
    layers: Sequence[AttentionLayer],
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    reserved_bytes: int,
) -> int:
    """How many blocks the cache gets; the weights are loaded already.

    As many as memory allows (`gpu_memory_utilization` of the GPU, or half of the CPU's free memory), but no more than
    `max_num_seqs` sequences of full length could fill. `reserved_bytes` are kept free. Raises `ModelError`
    when not even one block fits.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What torch has reserved and not used is free for us, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = int(free - (1 - config.gpu_memory_utilization) * total) - reserved_bytes
    elif config.cpu_kv_cache_bytes is not None:
        budget = config.cpu_kv_cache_bytes
    else:
        budget = int(_CPU_SHARE * free_memory())
    each = block_bytes(layers, config.block_size, dtype)
    most = config.max_num_seqs * ceil_div(max_model_len, config.block_size)
    num_blocks = min(most, budget // each - 1)  # the spare one
    if num_blocks < 1:
        raise ModelError(
            f"no memory is left for the KV cache: a block takes {each / 2**20:.1f} MiB, "
            f"and {max(0, budget) / 2**20:.1f} MiB may be used"
        )
    return num_blocks


def free_memory() -> int:
    """Bytes of main memory that this process could still take: of the machine, or of its control group."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        reclaimable = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, KeyError):
        return available  # no version 2 control group with a memory controller here
    return available if limit == "max" else min(available, int(limit) - used + int(reclaimable))
