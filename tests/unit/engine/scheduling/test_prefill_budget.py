"""The size of steps that read prompts, chosen from made-up times, and on the real engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from engine import Engine, EngineConfig, SamplingParams
from engine.batch import Batch
from engine.scheduling.prefill_budget import PrefillBudgetTuner, candidate_budgets
from tests.unit.engine.fake_runner import FakeRunner

REST = 128
"""Steps before the first comparison."""

Cost = Callable[[int], float]
"""Seconds of a step, from its tokens."""


def overhead(seconds: float) -> Cost:
    """Steps that take so long, and a millisecond for each token."""
    return lambda tokens: seconds + tokens * 1e-3


def bowl(best: int) -> Cost:
    """Cheapest, per token, at `best`: twice and half as large are a quarter dearer."""
    return lambda tokens: tokens * 1e-4 * (tokens / best + best / tokens)


def settle(
    chooser: PrefillBudgetTuner, cost: Cost, steps: int = 400, *, noise: float = 0.0, seed: int = 0
) -> list[int]:
    """Run full steps; returns the sizes that they had."""
    chance = random.Random(seed)
    ran = []
    for _ in range(steps):
        ran.append(chooser.tokens)
        chooser.record(ran[-1], 0, cost(ran[-1]) * chance.lognormvariate(0, noise))
    return ran


def chooser(most: int = 2048) -> PrefillBudgetTuner:
    return PrefillBudgetTuner(candidate_budgets(most))


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (2048, (128, 256, 512, 1024, 2048)),
        (1000, (250, 500, 1000)),
        (256, (128, 256)),
        (255, (255,)),
        (1, (1,)),
    ],
)
def test_candidate_budgets_are_halves_of_the_largest(most: int, sizes: tuple[int, ...]) -> None:
    assert candidate_budgets(most) == sizes


@pytest.mark.parametrize(
    ("cost", "best"),
    [(overhead(0.0), 2048), (overhead(0.4), 2048), *((bowl(size), size) for size in (128, 256, 512, 1024, 2048))],
    ids=["flat", "overhead", "128", "256", "512", "1024", "2048"],
)
def test_tuner_finds_the_fastest_budget_and_prefers_larger_ones(cost: Cost, best: int) -> None:
    found = chooser()
    settle(found, cost)
    assert found.chosen == best


def test_budget_doubles_each_step_at_first() -> None:
    assert settle(chooser(), overhead(0.1), steps=10) == [256, 512, 1024, *[2048] * 7]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_change_the_chosen_budget(seed: int) -> None:
    found = chooser()
    ran = settle(found, bowl(1024), steps=3000, noise=0.1, seed=seed)[500:]
    assert sum(size in (512, 1024, 2048) for size in ran) > 0.95 * len(ran)
    assert ran.count(1024) > 0.6 * len(ran)


def test_pause_counts_as_one_bad_pair() -> None:
    found = chooser()
    ran = settle(found, bowl(512), steps=3 + REST + 1)
    assert ran[-1] == 2048
    for step in range(12):
        found.record(found.tokens, 0, bowl(512)(found.tokens) * (5 if step == 5 else 1))
    assert found.chosen == 1024


@pytest.mark.parametrize(
    ("gains", "size"),
    [([1.02] * 6, 2048), ([1.04] * 6, 1024), ([1.04] * 5 + [0.5], 1024), ([1.04] * 4 + [0.9] * 2, 2048)],
    ids=["too little", "clearly", "but for one pair", "but for two"],
)
def test_smaller_budget_wins_only_when_clearly_faster_in_nearly_all_pairs(gains: list[float], size: int) -> None:
    found = chooser()
    settle(found, overhead(0.0), steps=4 + REST)
    for step in range(12):
        found.record(found.tokens, 0, found.tokens * (1.0 if found.tokens == 2048 else 1 / gains[step // 2]) * 1e-3)
    assert found.chosen == size


def test_growing_load_affects_both_candidates_equally() -> None:
    """Each step is slower than the last one, as contexts grow: neither size must look worse for it."""
    found, slower = chooser(), 1.0
    settle(found, overhead(0.0), steps=4 + REST)
    assert found.tokens == 1024
    for _ in range(12):
        slower *= 1.05
        found.record(found.tokens, 0, slower * overhead(0.0)(found.tokens))
    assert found.chosen == 2048


def test_budget_is_tuned_again_when_costs_change() -> None:
    found = chooser()
    for cost, best in ((overhead(0.0), 2048), (bowl(256), 256), (overhead(0.4), 2048)):
        settle(found, cost, steps=1500)
        assert found.chosen == best


def test_most_steps_have_the_chosen_budget() -> None:
    found = chooser()
    settle(found, bowl(512), steps=500)
    ran = settle(found, bowl(512), steps=1000)
    assert 0.9 < ran.count(512) / len(ran) < 1  # it goes on looking, rarely


def test_tuner_tries_no_step_that_takes_too_long() -> None:
    found = chooser()
    # Larger steps are faster, token by token, but one of 512 tokens takes 10.8 seconds.
    ran = settle(found, lambda tokens: 4.0 + tokens / 75)
    assert max(ran) == 256
    assert found.chosen == 256
    settle(found, lambda tokens: 8.0 + tokens / 75, steps=1)
    assert found.chosen == 128


def test_budget_is_the_smallest_when_the_first_step_is_too_slow() -> None:
    found = chooser()
    assert settle(found, lambda tokens: tokens / 9, steps=20) == [256, 256, *[128] * 18]


def test_tuner_counts_only_full_prefill_steps() -> None:
    found = chooser()
    for _ in range(100):
        found.record(found.tokens - 1, 0, 1.0)  # the last of the prompts
    assert found.tokens == 256
    settle(found, bowl(512), steps=4 + REST)
    for _ in range(100):
        found.record(found.tokens + 400, 400, bowl(512)(found.tokens))  # too many decodes
    assert found.chosen == 2048
    settle(found, bowl(512))
    assert found.chosen == 512


def test_budget_stays_when_there_is_one_candidate() -> None:
    found = PrefillBudgetTuner([2048])
    assert set(settle(found, overhead(9.0))) == {2048}


def test_decodes_come_on_top_of_the_budget_within_the_limit() -> None:
    runner = FakeRunner(num_blocks=400, max_model_len=1000)
    config = EngineConfig(block_size=4, max_num_seqs=64, max_num_batched_tokens=20, decode_steps=1)
    engine = Engine(runner, None, config, prefill_budget=PrefillBudgetTuner([12]))
    many = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for number in range(5):
        engine.add(f"decodes {number}", [1, number], many)
    engine.step()
    for number in range(5):
        engine.add(f"reads {number}", [2] * 6 + [number], many)
    engine.step()
    assert runner.batches[-1].num_tokens == 12 + 5
    for number in range(5):
        engine.add(f"more {number}", [3] * 6 + [number], many)
    engine.step()
    assert runner.batches[-1].num_tokens == 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    ).save_pretrained(directory)
    return directory


def load(model: Path, *, deterministic: bool = False) -> tuple[Engine, list[int]]:
    """An engine on the CPU, and a list that fills up with the tokens of each step."""
    config = EngineConfig(
        device="cpu", dtype="float32", random_weights=True, num_kv_blocks=600, deterministic=deterministic
    )
    engine = Engine.from_pretrained(model, config)
    ran: list[int] = []
    run = engine.runner.run

    def spy(batch: Batch) -> torch.Tensor:
        ran.append(batch.num_tokens)
        return run(batch)

    engine.runner.run = spy  # type: ignore[method-assign]
    return engine, ran


def pretend(tuner: PrefillBudgetTuner, cost: Cost) -> list[float]:
    """Let the steps of an engine take what they are said to; the list fills up with what they did take."""
    took: list[float] = []
    record = tuner.record

    def made_up(tokens: int, num_decodes: int, seconds: float) -> None:
        took.append(seconds)
        record(tokens, num_decodes, cost(tokens))

    tuner.record = made_up  # type: ignore[method-assign]
    return took


def test_real_steps_are_measured_and_give_the_same_tokens(model: Path) -> None:
    chance = random.Random(0)
    prompts = [[chance.randrange(300) for _ in range(700)] for _ in range(8)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    measured, ran = load(model)
    took = pretend(measured.scheduler.prefill_budget, lambda tokens: tokens / 100)
    fixed, ran_in_large_steps = load(model)
    fixed.scheduler.prefill_budget = PrefillBudgetTuner([2048])
    found, expected = (
        [output.token_ids for output in engine.generate(prompts, params)] for engine in (measured, fixed)
    )
    assert found == expected
    # Each step also takes a token from each sequence that decodes.
    assert [size // 256 for size in ran[:3]] == [1, 2, 2]
    assert measured.scheduler.prefill_budget.chosen == 512
    assert all(seconds > 0 for seconds in took)
    assert ran_in_large_steps[0] == 2048


def test_deterministic_engine_does_not_tune_its_budget(model: Path) -> None:
    engine, _ = load(model, deterministic=True)
    assert engine.scheduler.prefill_budget.tokens == 2048
