"""The step that a GPU's memory is measured with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.attention.triton import TritonAttention
from engine.config import EngineConfig
from engine.device.cuda_graphs import batch_size
from engine.execution.decode_state import DecodeState
from engine.execution.memory_budget import graph_bytes, largest_decode, largest_step, state_bytes
from engine.execution.model_runner import ModelRunner
from engine.execution.multi_step import StaticBuffers
from kernels.device import interprets
from tests.parity.tiny_models import NATIVE


@pytest.mark.parametrize(
    ("tokens", "seqs", "longest"), [(8192, 2048, 1000), (2048, 256, 131_072), (64, 256, 7), (5, 1, 5), (10, 7, 4)]
)
def test_largest_step_bounds_every_step(tokens: int, seqs: int, longest: int) -> None:
    config = EngineConfig(max_num_batched_tokens=tokens, max_num_seqs=seqs, block_size=16)
    batch, num_blocks = largest_step(config, longest, num_logits=seqs)
    assert batch.num_tokens == tokens
    assert sum(entry.num_logits for entry in batch.entries) == min(seqs, tokens)
    for entry in batch.entries:
        assert 0 <= entry.num_logits <= len(entry.token_ids) <= longest
        assert len(entry.token_ids) <= len(entry.block_table) * 16
    assert max(max(entry.block_table) for entry in batch.entries) < num_blocks


def test_state_bytes_is_the_size_of_the_decode_state_and_of_the_graphs_buffers() -> None:
    state = DecodeState(100, 77, 50, torch.device("cpu"))
    buffers = StaticBuffers(state, max_steps=16)
    assert state.rows.nbytes + state.table.nbytes + buffers.nbytes == state_bytes(100, 77, 16)


@pytest.mark.parametrize("batch_slots", [1, 256, 2048, 3000])
def test_largest_decode_is_as_large_as_the_largest_graph(batch_slots: int) -> None:
    batch = largest_decode(batch_size(batch_slots), block=7)
    assert batch.num_tokens == batch_size(batch_slots) >= batch_slots
    assert all((len(entry.token_ids), entry.num_logits) == (1, 1) for entry in batch.entries)


def test_graph_bytes_are_the_largest_step_and_a_share_of_memory() -> None:
    # 2,048 rows of a vocabulary of 151,936 alone take more than the fixed part.
    logits = 2048 * 151_936 * 4
    assert graph_bytes(80 * 2**30, logits) == logits + 2**30
    assert graph_bytes(8 * 2**30, 100) == 100 + 2**28


def test_attention_buffers_are_allocated_before_the_cache_is_sized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not interprets():
        pytest.skip("Triton's interpreter is off")
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    called: list[str] = []

    def reserve(self: TritonAttention, *args: object, max_sequences: int, **options: object) -> None:
        called.append(f"reserve {max_sequences}")

    def choose(config: EngineConfig, *args: object, **options: object) -> int:
        called.append("choose")
        assert config.num_kv_blocks is not None
        return config.num_kv_blocks

    monkeypatch.setattr(TritonAttention, "reserve", reserve)
    monkeypatch.setattr("engine.execution.model_runner.choose_num_blocks", choose)
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        attention="triton",
        num_kv_blocks=8,
        max_num_seqs=2000,
        max_num_batched_tokens=4096,
    )
    ModelRunner.from_pretrained(tmp_path, config)
    assert called == ["reserve 2048", "choose"]
