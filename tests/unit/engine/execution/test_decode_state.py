"""The device's rows of running sequences: what the host sends, and what padding may touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import SamplingParams
from engine.batch import NO_TOKEN, DecodeEntry, MultiStepBatch, in_flight_token
from engine.execution.decode_state import NUM_COLUMNS, DecodeState
from engine.sampling.state import SamplingState
from tests.unit.engine.fake_runner import FakeRunner


class TestDeviceState:
    def entry(self, position: int, blocks: Sequence[int], *, batch_slot: int = 0, admission_id: int = 1) -> DecodeEntry:
        sampling = SamplingState(SamplingParams(), seed=1, index=0, position=position + 1)
        return DecodeEntry(batch_slot, admission_id, 7, position, 30, blocks, 0, sampling)

    def test_decode_state_sends_only_changed_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = DecodeState(4, 8, 50, torch.device("cpu"))
        sent: list[int] = []

        def spy(packed: np.ndarray, device: torch.device) -> torch.Tensor:
            sent.append(len(packed))
            return torch.from_numpy(packed)

        monkeypatch.setattr("engine.execution.decode_state.to_device", spy)
        whole_row = 1 + NUM_COLUMNS
        state.update([self.entry(5, [3, 4])], 1, 4)
        assert sent.pop() == 1 + whole_row + 2 * 2
        state.update([self.entry(9, [3, 4, 6])], 1, 1)  # as the device left it, and one more block
        assert sent.pop() == 1 + 2
        state.update([self.entry(10, [3, 4, 6])], 1, 2)
        assert sent.pop() == 1
        state.update([replace(self.entry(12, [3, 4, 6]), token_id=None)], 1, 1)  # as the device will leave it
        assert sent.pop() == 1
        state.update([self.entry(16, [3, 4, 6])], 1, 1)  # it went on elsewhere
        assert sent.pop() == 1 + whole_row
        state.update([self.entry(12, [1], admission_id=2)], 1, 0)  # another sequence has the slot now
        assert sent.pop() == 1 + whole_row + 2
        assert state.table[0, :3].tolist() == [1, 4, 6]
        state.invalidate([0])
        state.update([self.entry(12, [1], admission_id=2)], 4, 1)
        assert sent.pop() == 4 + whole_row + 2

    def test_token_in_flight_is_read_from_its_row(self) -> None:
        state = DecodeState(4, 8, 50, torch.device("cpu"))
        state.update([replace(self.entry(5, [3], batch_slot=slot), token_id=40 + slot) for slot in range(4)], 4, 1)
        tokens = state.tokens(torch.tensor([0, in_flight_token(0), 7, in_flight_token(3), in_flight_token(2)]))
        assert tokens.tolist() == [0, 40, 7, 43, 42]

    def test_padding_rows_count_as_ended(self) -> None:
        state = DecodeState(4, 8, 50, torch.device("cpu"))
        rows = state.update([self.entry(5, [3, 4], batch_slot=2)], 4, 1)
        assert rows.tolist() == [2, state.padding_row, state.padding_row, state.padding_row]


def test_padding_and_ended_rows_write_only_to_the_padding_block() -> None:
    """Three sequences in a batch of four, of which two end early: what they may not touch stays as it was."""
    runner = FakeRunner(num_blocks=12, is_static=True, eos_token_ids=frozenset())
    marked = 41
    for block in range(12):
        runner._cache[block] = [marked] * runner.block_size
    sampling = SamplingState(SamplingParams(temperature=0), seed=1, index=0, position=2)
    entries = [
        DecodeEntry(slot, slot, 5, 1, tokens, [3 * slot, 3 * slot + 1, 3 * slot + 2], 0, sampling)
        for slot, tokens in enumerate((8, 2, 1))
    ]
    sampled = runner.decode(MultiStepBatch(entries, 8)).wait()
    assert (sampled != NO_TOKEN).sum(axis=1).tolist() == [8, 2, 1]
    written = [
        sum(slot != marked for block in range(3 * s, 3 * s + 3) for slot in runner._cache[block]) for s in range(3)
    ]
    assert written == [8, 2, 1]
    assert all(slot == marked for block in range(9, 12) for slot in runner._cache[block])
    assert runner._cache[12][0] != -1
