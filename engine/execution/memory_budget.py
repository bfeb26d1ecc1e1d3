"""How much memory of a GPU is left for the KV cache: all that may be used, less what a step and its graphs take.

gpu_memory_utilization × all  =  weights  +  the largest step  +  graphs             +  device state  +  KV cache
                                 loaded      run, measured        the largest decode     set aside       the rest
                                                                  step, run, measured,
                                                                  and something for each

All graphs share one pool, which grows to what the largest of them needs. It is no part of what other steps may use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.batch import Batch, BatchEntry
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.execution.decode_state import NUM_COLUMNS
from engine.sampling.sampler import Sampler
from engine.sampling.state import SamplingState
from engine.sampling_params import SamplingParams

_GRAPH_SHARE = 1 / 32
_MOST_GRAPH_BYTES = 2**30


def graph_bytes(total: int, decode_step: int) -> int:
    """What CUDA graphs may take of `total` bytes, where a decode step of the largest batch takes `decode_step`."""
    return decode_step + min(_MOST_GRAPH_BYTES, int(total * _GRAPH_SHARE))


def state_bytes(batch_slots: int, max_blocks: int) -> int:
    """What `DecodeState` takes."""
    return (batch_slots + 1) * (8 * NUM_COLUMNS + 4 * max_blocks)


def largest_step(config: EngineConfig, max_model_len: int) -> tuple[Batch, int]:
    """A step with as many tokens, and as many rows of logits, as any can have; and how many blocks it needs.

    Its sequences overwrite each other's blocks: only the memory matters.
    """
    num_tokens = config.max_num_batched_tokens
    lengths = [max_model_len] * (num_tokens // max_model_len)
    lengths += [rest] if (rest := num_tokens % max_model_len) else []
    lengths.sort()
    num_blocks = -(-lengths[-1] // config.block_size)
    missing = min(config.max_num_seqs, num_tokens)
    entries = []
    for place, length in enumerate(lengths):
        rows = min(length, -(-missing // (len(lengths) - place)))
        missing -= rows
        entries.append(BatchEntry([0] * length, 0, range(num_blocks), rows))
    return Batch(entries), num_blocks


def largest_decode(batch_slots: int, block: int) -> Batch:
    """A step in which as many sequences as there can be decode, all in one block: only the memory matters."""
    return Batch([BatchEntry([0], 0, [block], 1)] * batch_slots)


def step_bytes(run: Callable[[Batch], Tensor], batch: Batch, device: torch.device) -> int:
    """What a step takes on the GPU beyond what is there before it, by running it and sampling from its logits.

    Raises `ModelError` when it does not fit.
    """
    params = SamplingParams(top_p=0.9, top_k=50, min_p=0.01)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        logits = run(batch)
        states = [SamplingState(params, seed=row, index=0, position=1) for row in range(len(logits))]
        Sampler(logits.shape[-1]).sample(logits, states)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a step of {batch.num_tokens} tokens does not fit into the GPU's memory beside the weights: "
            "lower max_num_batched_tokens or max_num_seqs"
        ) from error
    taken: int = torch.cuda.max_memory_allocated(device) - before
    return taken
