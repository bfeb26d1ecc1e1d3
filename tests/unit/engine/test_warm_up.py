"""The step that a GPU's memory is measured with."""

from __future__ import annotations

import pytest
import torch

from engine.config import EngineConfig
from engine.device_state import DeviceState
from engine.warm_up import largest_step, state_bytes


@pytest.mark.parametrize(
    ("tokens", "seqs", "longest"), [(8192, 2048, 1000), (2048, 256, 131_072), (64, 256, 7), (5, 1, 5), (10, 7, 4)]
)
def test_no_step_is_larger(tokens: int, seqs: int, longest: int) -> None:
    config = EngineConfig(max_num_batched_tokens=tokens, max_num_seqs=seqs, block_size=16)
    batch, num_blocks = largest_step(config, longest)
    assert batch.num_tokens == tokens
    assert sum(entry.num_logits for entry in batch.entries) == min(seqs, tokens)
    for entry in batch.entries:
        assert 0 <= entry.num_logits <= len(entry.token_ids) <= longest
        assert len(entry.token_ids) <= len(entry.block_table) * 16
    assert max(max(entry.block_table) for entry in batch.entries) < num_blocks


def test_the_device_s_state_takes_what_is_set_aside() -> None:
    state = DeviceState(100, 77, 50, torch.device("cpu"))
    assert state.numbers.nbytes + state.table.nbytes == state_bytes(100, 77)
