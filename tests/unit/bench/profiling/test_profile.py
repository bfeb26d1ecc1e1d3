"""The profile's parts make up the whole, count what was computed, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from bench.profiling.cost_model import positions_seen
from bench.profiling.profile import ATTENTION, LINEARS, LOOP, MODEL, SAMPLING, SCHEDULER, TEXT, profiled
from engine import Engine, EngineConfig, SamplingParams
from engine.attention.triton import TritonAttention
from engine.execution.model_runner import ModelRunner
from kernels.device import interprets
from tests.parity.tiny_models import NATIVE
from tests.unit.engine.fake_runner import FakeRunner

HIDDEN, LAYERS, VOCABULARY = 32, 2, 64
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
NEW_TOKENS = 4


@pytest.fixture
def engine(tmp_path: object) -> Engine:
    GPT2Config(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=0
    ).save_pretrained(tmp_path)
    return Engine.from_pretrained(
        str(tmp_path), EngineConfig(device="cpu", dtype="float32", random_weights=True, enable_prefix_caching=False)
    )


def _generate(engine: Engine) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return [list(output.token_ids) for output in engine.generate(PROMPTS, params)]


def test_profile_parts_make_up_the_steps(engine: Engine) -> None:
    with profiled(engine) as profile:
        _generate(engine)
    steps = engine.stats().steps
    assert profile.steps == steps == profile.parts[SCHEDULER].calls == profile.parts[MODEL].calls
    for part in (LOOP, SCHEDULER, MODEL, LINEARS, ATTENTION, SAMPLING):
        assert profile.parts[part].seconds > 0
    assert profile.elapsed >= profile.seconds * 0.999
    assert profile.parts[TEXT].calls == 0  # this model has no tokenizer
    # Query-key-value, out, up and down, and the head.
    assert profile.parts[LINEARS].calls == steps * (4 * LAYERS + 1)
    assert profile.parts[ATTENTION].calls == steps * (LAYERS + 1)


def test_profile_counts_no_moment_twice(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1_000_000))
    monkeypatch.setattr("bench.profiling.profile.perf_counter", lambda: float(next(clock)))
    with profiled(engine) as profile:
        _generate(engine)
    # Each reading of the clock is a second after the last. A part is one at its beginning and one at its end, and
    # nothing is open between the steps.
    calls = sum(part.calls for part in profile.parts.values())
    assert profile.seconds == 2 * calls - profile.steps


def test_profile_counts_the_work_of_the_shapes(engine: Engine) -> None:
    with profiled(engine) as profile:
        _generate(engine)
    tokens = sum(len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS)
    outputs = len(PROMPTS) * NEW_TOKENS
    # Of prompts, only the last token goes on from the attention of the last layer.
    unwanted = sum(len(prompt) - 1 for prompt in PROMPTS)
    layers = 12 * HIDDEN**2 * LAYERS * tokens - 9 * HIDDEN**2 * unwanted
    assert profile.parts[LINEARS].flops == 2 * (layers + HIDDEN * VOCABULARY * outputs)
    looks = sum(position + 1 for prompt in PROMPTS for position in range(len(prompt) + NEW_TOKENS - 1))
    assert profile.parts[ATTENTION].flops == LAYERS * 4 * HIDDEN * looks
    weights = 4 * profile.steps * (12 * HIDDEN**2 * LAYERS + HIDDEN * VOCABULARY)
    assert profile.parts[LINEARS].bytes > weights
    part, limits = profile.parts[LINEARS], profile.limits
    assert profile.of_flops(part) * limits.flops_per_second == pytest.approx(part.flops / part.seconds)
    assert profile.of_bandwidth(part) * limits.bytes_per_second == pytest.approx(part.bytes / part.seconds)
    assert limits.flops_per_second > 1e6
    assert limits.bytes_per_second > 1e6
    assert profile.kernels == {}
    assert profile.device_share == 0


def test_profile_leaves_the_engine_unchanged(engine: Engine) -> None:
    expected = _generate(engine)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    owners = [engine, engine.scheduler, engine.sampler, runner, runner.backend, *runner.model.modules()]
    before = [set(vars(owner)) for owner in owners]
    with profiled(engine):
        assert _generate(engine) == expected
    assert [set(vars(owner)) for owner in owners] == before
    assert _generate(engine) == expected


@pytest.fixture
def turning(tmp_path: Path) -> Callable[..., Engine]:
    """Engines whose attention turns queries and keys itself."""
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)

    def make(kv_cache_dtype: str = "auto") -> Engine:
        return Engine.from_pretrained(
            tmp_path,
            EngineConfig(
                device="cpu",
                dtype="float32",
                attention="triton",
                kv_cache_dtype=kv_cache_dtype,
                num_kv_blocks=8,
                enable_prefix_caching=False,
            ),
        )

    return make


@pytest.mark.skipif(not interprets(), reason="Triton's interpreter is off")
def test_profile_runs_what_the_engine_runs(turning: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    made = turning()
    monkeypatch.setattr("engine.models.rotary.rotate", None)  # nothing turns by itself, in a profile or outside
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    expected = made.generate([[3, 4, 5]], params)[0].token_ids
    with profiled(made) as profile:
        assert made.generate([[3, 4, 5]], params)[0].token_ids == expected
    runner = made.runner
    assert isinstance(runner, ModelRunner)
    assert isinstance(runner.backend, TritonAttention)
    assert profile.parts[ATTENTION].calls == 2 * (len(runner.model.attention_layers) + 1)


@pytest.mark.skipif(not interprets(), reason="Triton's interpreter is off")
def test_profile_counts_a_float8_cache_by_its_bytes(turning: Callable[..., Engine]) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    counted = []
    for kv_cache_dtype in ("auto", "float8_e4m3"):
        made = turning(kv_cache_dtype)
        with profiled(made) as profile:
            made.generate([[3, 4, 5]], params)
        counted.append(profile.parts[ATTENTION].bytes)
    assert isinstance(made.runner, ModelRunner)
    # A step over three positions and one over four, in which a number takes one byte instead of four, and a scale one.
    fewer = sum(
        (3 + 4) * layer.num_kv_heads * ((4 - 1) * (layer.head_dim + layer.value_dim) - 2)
        for layer in made.runner.model.attention_layers
    )
    assert counted[0] - counted[1] == fewer


def test_profile_is_refused_without_a_model() -> None:
    engine = Engine(FakeRunner(), None, EngineConfig())
    with pytest.raises(TypeError, match="runs a model"), profiled(engine):
        pass


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_attended_positions_are_those_of_a_brute_force_count(window: int | None) -> None:
    starts, lengths = [0, 5, 2, 9], [4, 1, 7, 3]
    looks = seen = 0
    for start, length in zip(starts, lengths, strict=True):
        spans = [
            range(max(0, position - (window or 10**9) + 1), position + 1) for position in range(start, start + length)
        ]
        looks += sum(len(span) for span in spans)
        seen += len({position for span in spans for position in span})
    assert positions_seen(starts, lengths, window) == (looks, seen)
