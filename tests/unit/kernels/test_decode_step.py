"""Rows before and after a decode step: the kernels beside plain torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.decode_step import NO_TOKEN, Column, advance_decode, prepare_decode, sampling_of

NUM_ROWS, NUM_STOP, BLOCK_SIZE, PADDING_SLOT = 140, 8, 4, 4000


def make_state(device: torch.device) -> Tensor:
    """Rows that live, have one token left, may not stop yet, and have ended; the last is padding."""
    generator = torch.Generator().manual_seed(0)

    def ints(least: int, most: int, *shape: int) -> Tensor:
        return torch.randint(least, most, shape or (NUM_ROWS + 1,), generator=generator)

    state = torch.zeros(NUM_ROWS + 1, Column.STOP + NUM_STOP, dtype=torch.int64)
    state[:, Column.TOKEN] = ints(0, 50)
    state[:, Column.POSITION] = ints(0, 20)
    state[:, Column.TOKENS_LEFT] = ints(0, 4)
    state[:, Column.MIN_TOKENS_LEFT] = ints(0, 3)
    state[:, Column.ROPE_LENGTH] = ints(0, 40)
    state[:, Column.SEED] = ints(-(2**62), 2**62)
    state[:, Column.INDEX] = ints(0, 3)
    state[:, Column.TOP_K] = ints(1, 50)
    for column in (Column.TEMPERATURE, Column.TOP_P, Column.MIN_P):
        state[:, column] = torch.rand(NUM_ROWS + 1, generator=generator, dtype=torch.float64).view(torch.int64)
    state[:, Column.STOP :] = ints(-1, 6, NUM_ROWS + 1, NUM_STOP)
    state[NUM_ROWS, : Column.SEED] = 0
    return state.to(device)


def make_rows(device: torch.device, count: int) -> Tensor:
    """`count` rows in another order, filled up with the padding row."""
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1))[:count]
    return torch.cat([order, torch.full((5,), NUM_ROWS)]).to(device)


def both(monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Any, Any]:
    """What the kernel and what plain torch give."""
    kernel = call()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "use_triton", lambda tensor: False)
        return kernel, call()


def assert_same(kernel: Any, reference: Any) -> None:
    for field in fields(reference):
        torch.testing.assert_close(getattr(kernel, field.name), getattr(reference, field.name), rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 128, NUM_ROWS])
def test_prepare_decode_equals_its_reference(count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    state, rows = make_state(device), make_rows(device, count)
    tables = torch.randint(0, 900, (len(rows), 16), dtype=torch.int32, device=device)
    step = torch.tensor([6], device=device)

    def call() -> Any:
        return prepare_decode(
            state, rows, tables, block_size=BLOCK_SIZE, padding_slot=PADDING_SLOT, samples=True, step=step
        )

    (inputs, sampling), (expected_inputs, expected_sampling) = both(monkeypatch, call)
    assert_same(inputs, expected_inputs)
    assert_same(sampling, expected_sampling)
    assert_same(sampling_of(state, rows), expected_sampling)
    assert int(step) == 8
    assert (inputs.seq_lens[-5:] == 0).all()
    assert (inputs.slots[-5:] == PADDING_SLOT).all()


def test_prepare_decode_gives_no_sampling_to_greedy_batches(device: torch.device) -> None:
    state, rows = make_state(device), make_rows(device, 3)
    tables = torch.zeros(len(rows), 16, dtype=torch.int32, device=device)
    _, sampling = prepare_decode(state, rows, tables, block_size=4, padding_slot=0, samples=False)
    assert sampling is None


@pytest.mark.parametrize("count", [1, 128, NUM_ROWS])
def test_advance_decode_equals_its_reference(count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(device, count)
    chosen = torch.randint(-4, 6, (len(rows),), generator=torch.Generator().manual_seed(2)).to(device)

    def call() -> Any:
        state = make_state(device)
        return state, *advance_decode(state, rows, chosen)

    kernel, reference = both(monkeypatch, call)
    for ours, expected in zip(kernel, reference, strict=True):
        assert torch.equal(ours, expected)
    assert (kernel[1][-5:] == NO_TOKEN).all()
    if count == NUM_ROWS:
        # Each way to go on or end is there.
        assert set(kernel[2].tolist()) == {False, True}
        assert set(kernel[1].tolist()) >= {NO_TOKEN, -4, -3, -2, 0, 1}


def test_advance_decode_writes_tokens_at_their_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(device, 7)
    chosen = torch.arange(len(rows), device=device)

    def call() -> Tensor:
        into = torch.full((4, 20), 77, dtype=torch.int64, device=device)
        advance_decode(make_state(device), rows, chosen, into=into, step=torch.tensor([2], device=device))
        return into

    kernel, reference = both(monkeypatch, call)
    assert torch.equal(kernel, reference)
    assert (kernel[[0, 1, 3]] == 77).all()
    assert (kernel[2, len(rows) :] == 77).all()
    assert (kernel[2, : len(rows)] != 77).all()
