"""Tokens sampled from the device's rows are those of the host's sampler, in torch and in the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engine import SamplingParams
from engine.batch import NONE_ALLOWED, NOT_FINITE, TOO_LARGE, DecodeEntry
from engine.execution.decode_state import DecodeState
from engine.execution.multi_step import SamplingMode, sample_tokens
from engine.sampling.sampler import LOGITS_TOO_LARGE, Sampler
from engine.sampling.state import SamplingState
from kernels import dispatch
from kernels.device import interprets

MANY = [
    SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        min_tokens=min_tokens,
        stop_token_ids=[0, 5, 9],
        max_tokens=50,
    )
    for temperature in (0.0, 0.6, 1.0)
    for top_k in (0, 1, 17)
    for top_p in (1.0, 0.9, 0.3)
    for min_p in (0.0, 0.05)
    for min_tokens in (0, 40)
]


def states_and_rows(params: Sequence[SamplingParams]) -> tuple[list[SamplingState], list[DecodeEntry], torch.Tensor]:
    """The parameters as the sampler has them, and as the device does; of a vocabulary of 700."""
    states = [
        SamplingState(
            p, seed=2**64 - 1 - n, index=n % 3, position=10 + n, num_output=5, stop_tokens_banned_until_min=[0, 5, 9]
        )
        for n, p in enumerate(params)
    ]
    entries = [DecodeEntry(n, n, 1, 9 + n, 40, [n], 0, state) for n, state in enumerate(states)]
    device_state = DecodeState(len(states), 4, 700, torch.device("cpu"))
    rows = device_state.update(entries, len(entries), 1)
    return states, entries, device_state.rows[rows]


def test_device_sampling_gives_the_tokens_of_the_sampler() -> None:
    """The same logits, parameters and draws: through the sampler, and from the device's rows."""
    generator = torch.Generator().manual_seed(3)
    states, entries, state = states_and_rows(MANY)
    for _ in range(4):
        logits = torch.randn(len(states), 700, generator=generator) * 4
        logits[:, 5] += 8  # what must not stop would often be chosen
        expected = [one.token_id for one in Sampler(700).sample(logits.clone(), states)]
        assert len(set(expected)) > 20
        for is_static in (False, True):
            chosen = sample_tokens(
                logits.clone(), state, torch.arange(len(state)), SamplingMode.of(entries, 700), is_static=is_static
            )
            assert chosen.tolist() == expected


@pytest.mark.parametrize("is_static", [False, True])
def test_device_sampling_reports_overflow_as_the_sampler_does(is_static: bool) -> None:
    params = SamplingParams(temperature=2e-5, min_tokens=40, stop_token_ids=[0, 5, 9], max_tokens=50)
    states, entries, state = states_and_rows([params] * 4)
    logits = torch.zeros(4, 700)
    logits[0, 7] = 1e35
    logits[1] = -1e35
    logits[2, 5] = 1e35  # banned: it is not drawn from
    errors = [str(one.error) for one in Sampler(700).sample(logits.clone(), states)]
    assert errors == [LOGITS_TOO_LARGE, LOGITS_TOO_LARGE, "None", "None"]
    chosen = sample_tokens(
        logits.clone(), state, torch.arange(len(state)), SamplingMode.of(entries, 700), is_static=is_static
    ).tolist()
    assert chosen[:2] == [TOO_LARGE, TOO_LARGE]
    assert min(chosen[2:]) >= 0


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["all", "greedy", "held"])
def test_sampling_kernel_gives_the_same_tokens(part: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the device's rows; in Triton's interpreter where there is no GPU."""
    every = MANY if part != "held" else [p for p in MANY if p.min_tokens]
    params = [p for p in every if p.greedy] if part == "greedy" else every[:: 5 if part == "all" else 4]
    states, entries, state = states_and_rows(params)
    mode = SamplingMode.of(entries, 700)
    assert mode.random == (part != "greedy")
    logits = (torch.randn(len(states), 700, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    logits[:, 5] += 8
    expected = [one.token_id for one in Sampler(700).sample(logits.float(), states)]
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    chosen = sample_tokens(
        logits.to(DEVICE), state.to(DEVICE), torch.arange(len(state), device=DEVICE), mode, is_static=True
    )
    assert chosen.tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 40])
def test_sampling_kernel_reports_rows_without_a_token(
    temperature: float, min_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinities and NaNs, at the tokens that may be held back (0, 5, 9) and elsewhere."""
    inf, nan = float("inf"), float("nan")
    rows = []
    for held, others in (
        (1.0, -inf),
        (-inf, -inf),
        (nan, 1.0),
        (inf, 1.0),
        (-inf, 1.0),
        (1.0, nan),
        (1.0, inf),
        (nan, -inf),
    ):
        row = torch.full((700,), others)
        row[[0, 5, 9]] = held
        rows.append(row)
    rows.append(torch.full((700,), -inf).index_fill_(0, torch.tensor([9]), 2.0))
    logits = torch.stack(rows)
    params = SamplingParams(
        temperature=temperature, min_tokens=min_tokens, stop_token_ids=[0, 5, 9], max_tokens=50, seed=1
    )
    _, entries, state = states_and_rows([params] * len(rows))
    mode = SamplingMode.of(entries, 700)
    expected = sample_tokens(logits.clone(), state, torch.arange(len(state)), mode, is_static=False)
    assert {NOT_FINITE} < set(expected.tolist())
    assert (NONE_ALLOWED in expected.tolist()) == bool(min_tokens)
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    chosen = sample_tokens(
        logits.to(DEVICE), state.to(DEVICE), torch.arange(len(state), device=DEVICE), mode, is_static=True
    )
    assert chosen.tolist() == expected.tolist()


def test_sampler_gives_the_same_tokens_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and random rows of single steps, in Triton's interpreter."""
    if not interprets():
        pytest.skip("on a GPU this is what all tests of the sampler run")
    states, _, _ = states_and_rows(MANY[::7])
    logits = torch.randn(len(states), 700, generator=torch.Generator().manual_seed(5)) * 4
    expected = Sampler(700).sample(logits.clone(), states)
    greedy = Sampler(700).sample(logits[:3].clone(), [state for state in states if state.params.greedy][:3])
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    assert Sampler(700).sample(logits.clone(), states) == expected
    assert Sampler(700).sample(logits[:3].clone(), [state for state in states if state.params.greedy][:3]) == greedy
