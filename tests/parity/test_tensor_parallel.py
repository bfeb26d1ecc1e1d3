"""Models that several ranks share, against one rank alone: the same tokens in float32.

Ranks here are threads (`rank_threads.py`); `tests/unit/engine/parallel/` has those that are processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.errors import InvalidConfig, ModelError
from engine.execution.model_runner import ModelRunner
from engine.parallel.runner import TensorParallelRunner
from tests.parity.comparing import generate_with_preemptions, ragged_prompts
from tests.parity.tiny_models import GENERIC, NATIVE, TinyModel
from tests.support.rank_threads import parallel_runner

NUM_TOKENS = 16
TOLERANCE = 2e-4

BY_NAME = {model.name: model for model in NATIVE}
ONE_KV_HEAD = TinyModel("llama-one-kv-head", "llama", {"num_key_value_heads": 1})
# An odd vocabulary, six query heads to three key-value heads, and inner features that no power of two divides.
QUICK = [BY_NAME[name] for name in ("llama", "qwen3", "gpt2", "gemma2", "mixtral")] + [ONE_KV_HEAD]
OTHERS = [model for model in NATIVE if model not in QUICK]


@contextlib.contextmanager
def engine(directory: Path, ranks: int, **options: Any) -> Iterator[Engine]:
    config = EngineConfig(
        device="cpu", num_kv_blocks=options.pop("num_kv_blocks", 512), tensor_parallel_size=ranks, **options
    )
    runner = ModelRunner.from_pretrained(directory, config) if ranks == 1 else parallel_runner(directory, config)
    made = Engine(runner, None, config)
    try:
        yield made
    finally:
        made.close()


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **options)


ON_DEVICE = [
    greedy(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=NUM_TOKENS),
    SamplingParams(temperature=1.2, top_k=20, seed=2, min_tokens=4, max_tokens=NUM_TOKENS),
]
ON_HOST = [greedy(logprobs=3), SamplingParams(temperature=0.7, presence_penalty=0.5, seed=3, max_tokens=NUM_TOKENS)]


def spread(kinds: list[SamplingParams], count: int) -> list[SamplingParams]:
    return [kinds[place % len(kinds)] for place in range(count)]


def assert_equal(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    worst = 0.0
    for output, its in zip(outputs, expected, strict=True):
        assert output.error is None
        assert output.token_ids == its.token_ids
        for ours, theirs in zip(output.completions[0].logprobs or (), its.completions[0].logprobs or (), strict=True):
            worst = max(worst, abs(ours.logprob - theirs.logprob))
    assert worst < TOLERANCE
    assert len({token for output in outputs for token in output.token_ids}) > 30, "always the same few tokens"


def compare(directory: Path, ranks: int, **options: Any) -> None:
    prompts = ragged_prompts(lengths=(1, 5, 17, 50))
    with engine(directory, 1, **options) as alone, engine(directory, ranks, **options) as shared:
        params = spread([*ON_DEVICE, *ON_HOST], len(prompts))
        assert_equal(shared.generate(prompts, params), alone.generate(prompts, params))
        # Several steps at once, without the host; and the second time, prompts come from the prefix cache.
        params = spread(ON_DEVICE, len(prompts))
        again = shared.generate(prompts, params)
        assert sum(output.cached_tokens for output in again) > 100
        assert_equal(again, alone.generate(prompts, params))


@pytest.mark.parametrize("model", QUICK, ids=lambda model: model.name)
def test_two_ranks_give_the_tokens_of_one(model: TinyModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    compare(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", OTHERS, ids=lambda model: model.name)
def test_two_ranks_give_the_tokens_of_one_for_other_models(model: TinyModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    compare(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *(("llama", 3), ("llama", 5), ("qwen3", 4), ("gpt2", 3), ("gemma2", 3), ("mixtral", 4), ("falcon", 3)),
        *(("falcon-grouped", 3), ("falcon-grouped-one-norm", 3), ("phi3", 4), ("gptj", 3)),
    ],
)
def test_more_ranks_give_the_tokens_of_one(name: str, ranks: int, tmp_path: Path) -> None:
    BY_NAME[name].save(tmp_path)
    compare(tmp_path, ranks)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    BY_NAME["llama"].save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("params", [greedy(), greedy(logprobs=3)], ids=["device samples", "host samples"])
def test_preempted_sequences_give_the_tokens_of_one_rank(llama: Path, params: SamplingParams) -> None:
    prompts, params = ragged_prompts(lengths=(5, 17, 50)), replace(params, max_tokens=32)
    with engine(llama, 1) as alone, engine(llama, 2, max_num_batched_tokens=40, decode_steps=1) as shared:
        expected = alone.generate(prompts, params)
        assert_equal(generate_with_preemptions(shared, prompts, params), expected)


def test_many_decode_steps_are_one_message(llama: Path) -> None:
    with engine(llama, 1) as alone, engine(llama, 2, decode_steps=16) as shared:
        runner = shared.runner
        assert isinstance(runner, TensorParallelRunner)
        send = mock.Mock(wraps=runner._ranks.send)
        runner._ranks.send = send  # type: ignore[method-assign]
        prompts = ragged_prompts(lengths=(5,))
        assert_equal_tokens(shared.generate(prompts, greedy()), alone.generate(prompts, greedy()))
        assert send.call_count < NUM_TOKENS / 2


def assert_equal_tokens(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    assert [output.token_ids for output in outputs] == [its.token_ids for its in expected]


def test_rank_holds_its_share_of_weights_and_cache(llama: Path) -> None:
    def sizes(runner: ModelRunner) -> tuple[int, int]:
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in runner.cache.layers)
        return sum(parameter.numel() for parameter in runner.model.parameters()), cache

    config = {"num_attention_heads": 6, "num_key_value_heads": 2}
    TinyModel("llama", "llama", config).save(llama)
    with engine(llama, 1, attention="torch") as alone, engine(llama, 2) as shared:
        assert isinstance(alone.runner, ModelRunner)
        assert isinstance(shared.runner, TensorParallelRunner)
        shared.generate([[5]], greedy())
        ranks = [shared.runner.local, *shared.runner._ranks.runners.values()]  # type: ignore[attr-defined]
        assert [sizes(rank)[1] * 2 for rank in ranks] == [sizes(alone.runner)[1]] * 2


def test_random_weights_are_the_same_however_many_ranks_share_them(llama: Path) -> None:
    compare(llama, 2, random_weights=True)


def test_heads_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    BY_NAME["gpt2"].save(tmp_path)
    with pytest.raises(ModelError, match="3 attention heads cannot be divided among 4 ranks"):
        parallel_runner(tmp_path, EngineConfig(device="cpu", num_kv_blocks=8, tensor_parallel_size=4))


def test_model_in_transformers_own_code_is_refused(tmp_path: Path) -> None:
    next(model for model in GENERIC if model.name == "opt").save(tmp_path)
    with pytest.raises(ModelError, match="tensor_parallel_size must be 1 for this opt"):
        parallel_runner(tmp_path, EngineConfig(device="cpu", num_kv_blocks=8, tensor_parallel_size=2))


@pytest.mark.parametrize("option", [{"quantization": "int8"}, {"deterministic": True}], ids=str)
def test_option_that_needs_one_rank_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="tensor_parallel_size must be 1"):
        EngineConfig(device="cpu", tensor_parallel_size=2, **option)
