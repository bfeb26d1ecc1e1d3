"""Token choice against its reference, and against what it promises."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sampling_rows
from kernels.device import Device
from kernels.launch import Launch
from kernels.philox import uniform
from kernels.sampling import argmax, sample
from kernels.sampling_fallback import NONE_ALLOWED, NOT_FINITE, TOO_LARGE, Filters
from kernels.sampling_splits import parts_of_row, split_launches
from tests.unit.kernels.references import sample_reference

VOCAB = 5003
ALL_FILTERS = Filters(top_k=VOCAB, top_p=True, min_p=True)


def parameters(rows: int, device: torch.device, **given: float) -> dict[str, Tensor]:
    values = {"temperature": 1.0, "top_k": VOCAB, "top_p": 1.0, "min_p": 0.0} | given
    made = {
        name: torch.full((rows,), value, device=device, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, value in values.items()
    }
    made["seeds"] = torch.arange(rows, device=device) * 0x9E3779B97F4A7C1 - 2**62
    made["positions"] = torch.arange(rows, device=device) + 17
    made["indices"] = torch.arange(rows, device=device) % 3
    return made


def reference(logits: Tensor, given: dict[str, Tensor]) -> list[int]:
    draws = uniform(given["seeds"], given["positions"], given["indices"])
    filters = {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    tokens: list[int] = sample_reference(logits, **filters, draws=draws).tolist()
    return tokens


def both(logits: Tensor, given: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    return sample(logits, **given, filters=ALL_FILTERS).tolist(), reference(logits, given)


@triton.jit
def _uniform_kernel(seeds, positions, indices, out, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    seed, position, index = tl.load(seeds + row), tl.load(positions + row), tl.load(indices + row)
    tl.store(out + row, sampling_rows.uniform(seed, position, index))


def test_triton_uniforms_are_the_bits_of_the_engine(device: torch.device) -> None:
    seeds = torch.tensor([0, 1, -1, 2**40 + 3, -(2**63), 12345, 2**63 - 1, 7], device=device)
    positions = torch.tensor([0, 1, 5, 2**31 + 5, 100, 3, 2**20, 7], device=device)
    indices = torch.tensor([0, 0, 1, 2, 3, 100, 0, 7], device=device)
    out = torch.empty(8, device=device)
    _uniform_kernel[(1,)](seeds, positions, indices, out, ROWS=8)
    assert out.double().tolist() == uniform(seeds, positions, indices).tolist()


FILTERS = {
    "none": {},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 20},
    "top-1": {"top_k": 1},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "large-k": {"top_k": 900},
    "flat-top-p": {"temperature": 50.0, "top_p": 0.97},
    "flat-min-p": {"temperature": 50.0, "min_p": 0.9},
    "large-k-and-p": {"top_k": 900, "top_p": 0.9999, "temperature": 5.0},
}


NOT_AMONG_CANDIDATES = ("large-k", "flat-top-p", "flat-min-p", "large-k-and-p")


@pytest.mark.parametrize("name", list(FILTERS))
def test_sample_equals_its_reference(name: str, device: torch.device) -> None:
    rows = 1 if name in NOT_AMONG_CANDIDATES else 2
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)).mul(3).to(device)
    ours, theirs = both(logits, parameters(rows, device, **FILTERS[name]))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FILTERS))
@pytest.mark.parametrize("vocab", [1, 2, 1003, 2048, 2049, 40000])
def test_sample_equals_its_reference_over_many_rows(vocab: int, name: str, device: torch.device) -> None:
    rows = 24
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)).mul(3).to(device)
    given = parameters(rows, device, **FILTERS[name])
    given["top_k"] = given["top_k"].clamp(max=vocab)
    if "top_k" not in FILTERS[name]:
        given["top_k"].fill_(vocab)
    ours, theirs = both(logits, given)
    assert ours == theirs


def test_rows_are_sampled_independently(device: torch.device) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2)).mul(2).to(device)
    given = parameters(4, device)
    given["temperature"] = torch.tensor([0.0, 1.0, 0.5, 1.0], device=device)
    given["top_k"] = torch.tensor([VOCAB, 3, VOCAB, VOCAB], device=device)
    given["top_p"] = torch.tensor([0.5, 1.0, 0.9, 1.0], device=device)
    ours, theirs = both(logits, given)
    assert ours == theirs
    # Its neighbours change nothing.
    alone = {name: tensor[3:4].contiguous() for name, tensor in given.items()}
    assert sample(logits[3:4], **alone, filters=ALL_FILTERS).tolist() == ours[3:4]


def test_sample_keeps_tokens_that_tie_with_the_last_kept(device: torch.device) -> None:
    logits = torch.full((1, 100), -5.0, device=device)
    logits[0, [10, 20, 30, 40]] = 2.0
    given = parameters(1, device, top_k=2)
    # A draw that only the last of four tokens covers.
    given["positions"] += next(
        step for step in range(100) if uniform(given["seeds"], given["positions"] + step, given["indices"]) > 0.8
    )
    assert sample(logits, **given, filters=ALL_FILTERS).tolist() == [40]


def test_top_p_excludes_tokens_after_those_that_hold_exactly_p(device: torch.device) -> None:
    logits = torch.full((2, 100), float("-inf"), device=device)
    logits[:, [70, 10, 40]] = torch.tensor([0.5, 0.25, 0.25], device=device).log()
    # Draws of 0.32 and 0.96; tokens are laid out in the order of their numbers.
    assert sample(logits, **parameters(2, device, top_p=0.5, top_k=100), filters=ALL_FILTERS).tolist() == [70, 70]
    assert sample(logits, **parameters(2, device, top_p=0.51, top_k=100), filters=ALL_FILTERS).tolist() == [40, 70]


def test_sample_reports_rows_without_a_choice(device: torch.device) -> None:
    logits = torch.randn(4, 300, device=device)
    logits[0, 7] = float("nan")
    logits[1, 7] = float("inf")
    logits[2] = float("-inf")
    expected = [NOT_FINITE, NOT_FINITE, NONE_ALLOWED]
    assert sample(logits, **parameters(4, device, top_p=0.9), filters=ALL_FILTERS).tolist()[:3] == expected
    assert argmax(logits).tolist() == [*expected, int(logits[3].argmax())]


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # NumPy's, in the interpreter
@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.1}], ids=["all tokens", "filtered"])
def test_sample_reports_too_large_when_the_temperature_overflows_logits(
    filters: dict[str, float], device: torch.device
) -> None:
    logits = torch.zeros(4, 300, device=device)
    logits[0, 7] = 1e35
    logits[1] = -1e35
    given = parameters(4, device, temperature=2e-5, **filters)
    given["temperature"][2] = 0.0
    logits[2, 9] = 1e35
    found = sample(logits, **given, filters=ALL_FILTERS).tolist()
    assert found[:3] == [TOO_LARGE, TOO_LARGE, 9]
    assert found[3] >= 0


def test_argmax_is_the_first_of_equals(device: torch.device) -> None:
    logits = torch.zeros(2, VOCAB, device=device)
    logits[0, [3000, 4900, 77]] = 1.0
    assert argmax(logits).tolist() == [77, 0]
    assert argmax(logits.bfloat16()).tolist() == [77, 0]


def test_banned_tokens_are_never_drawn(device: torch.device) -> None:
    logits = torch.full((2, VOCAB), float("-inf"), device=device)
    logits[:, [4001, 4002]] = 0.0
    for filters in ({}, {"top_k": 20, "top_p": 0.99}):
        drawn = sample(logits, **parameters(2, device, **filters), filters=ALL_FILTERS)
        assert set(drawn.tolist()) <= {4001, 4002}


def by_parts(logits: Tensor, given: dict[str, Tensor] | None, parts: int, *, filtered: bool | None = None) -> list[int]:
    """Tokens by so many programs a row; greedy without parameters, else as where rows may be filtered."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    parameters = None if given is None else tuple(given.values())
    if filtered is None:
        filtered = given is not None
    for launch in split_launches(logits, parameters, tokens, filtered=filtered, parts=parts):
        launch.run()
    chosen: list[int] = tokens.tolist()
    return chosen


@pytest.mark.parametrize(
    ("name", "parts"),
    # With four parts of three tiles the last has none; candidates that do not suffice are one kernel's affair.
    [(name, 4) for name in FILTERS if name not in NOT_AMONG_CANDIDATES] + [("none", 2), ("all", 2), ("large-k", 2)],
)
def test_split_row_gets_the_token_of_its_reference(name: str, parts: int, device: torch.device) -> None:
    rows = 1 if name in NOT_AMONG_CANDIDATES else 2
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)).mul(3).to(device)
    given = parameters(rows, device, **FILTERS[name])
    assert by_parts(logits, given, parts) == reference(logits, given)


def test_split_rows_are_drawn_from_by_their_own_parameters(device: torch.device) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4)).mul(2).to(device)
    given = parameters(4, device)
    given["temperature"] = torch.tensor([0.0, 1.0, 0.5, 1.0], device=device)
    given["top_k"] = torch.tensor([VOCAB, 3, VOCAB, VOCAB], device=device)
    given["top_p"] = torch.tensor([0.5, 1.0, 0.9, 1.0], device=device)
    whole, expected = both(logits, given)
    assert by_parts(logits, given, 4) == whole == expected


def test_split_row_without_filters_is_drawn_from_in_every_tile(device: torch.device) -> None:
    """Three tiles of different mass, of which the last is not full."""
    rows = 8
    logits = torch.zeros(rows, VOCAB, device=device)
    logits[:, 2048:] = 1.0
    given = parameters(rows, device)
    found = by_parts(logits, given, 2, filtered=False)
    assert found == reference(logits, given)
    assert {token // 2048 for token in found} == {0, 1, 2}


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # NumPy's, in the interpreter
def test_split_rows_without_a_choice_are_reported(device: torch.device) -> None:
    logits = torch.zeros(5, VOCAB, device=device)
    logits[0, 4900] = float("nan")
    logits[1, 2500] = float("inf")
    logits[2] = float("-inf")
    logits[3, 7] = 1e35
    expected = [NOT_FINITE, NOT_FINITE, NONE_ALLOWED]
    assert by_parts(logits, parameters(5, device, top_p=0.9, temperature=2e-5), 4)[:4] == [*expected, TOO_LARGE]
    assert by_parts(logits, None, 4) == [*expected, 7, 0]


def test_split_argmax_is_the_first_of_equals_in_any_part(device: torch.device) -> None:
    logits = torch.full((3, VOCAB), -1.0, device=device)
    logits[0, [4900, 2100, 3000]] = 1.0
    logits[1, VOCAB - 1] = 1.0
    logits[2, :2048] = float("-inf")
    for dtype in (torch.float32, torch.bfloat16):
        assert by_parts(logits.to(dtype), None, 4) == [2100, VOCAB - 1, 2048]


def test_rows_are_split_only_where_they_are_few_and_long() -> None:
    hopper = Device("cuda", 90, num_sms=132)
    assert [parts_of_row(rows, 151_936, hopper) for rows in (1, 16, 17, 33, 66, 132, 133, 4096)] == [
        16, 16, 8, 8, 4, 2, 1, 1,
    ]  # fmt: skip
    assert [parts_of_row(1, vocab, hopper) for vocab in (1, 8192, 8193, 50_257)] == [1, 2, 2, 8]


def test_sample_and_argmax_split_a_single_row(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    names, run = [], Launch.run

    def noting(launch: Launch) -> None:
        names.append(launch.kernel.fn.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", noting)
    logits = torch.randn(1, 4 * 2048, generator=torch.Generator().manual_seed(5)).to(device)
    given = parameters(1, device, top_k=logits.shape[1])
    assert sample(logits, **given, filters=Filters(0, top_p=False, min_p=False)).tolist() == by_parts(logits, given, 4)
    assert names[:3] == ["_maxima_of_parts_kernel", "_masses_of_tiles_kernel", "_choose_from_parts_kernel"]
    names.clear()
    assert argmax(logits).tolist() == [int(logits.argmax())]
    assert names == ["_maxima_of_parts_kernel", "_choose_from_parts_kernel"]
