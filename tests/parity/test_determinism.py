"""`deterministic=True`: a request gets the same bits alone and in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Engine, EngineConfig, SamplingParams
from engine.errors import ModelError, UnsupportedModel
from engine.execution.batch_invariance import check_invariance
from engine.execution.model_runner import ModelRunner
from engine.outputs import TokenLogprobs
from tests.parity.comparing import assert_same, generate_with_preemptions, greedy
from tests.parity.conftest import NUM_TOKENS, Saved
from tests.parity.tiny_models import GENERIC, NATIVE

Save = Callable[..., Saved]
Bits = tuple[tuple[int, ...], tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]

BY_NAME = {model.name: model for model in (*NATIVE, *GENERIC)}
SOME = ("gpt2", "gemma2", "qwen3-moe", "opt")
MORE = (
    "qwen3",
    "gptj",
    "falcon-grouped",
    "llama-biased-tied",
    "mistral",
    "phi3",
    "gemma3-tied",
    "mixtral",
    "gpt-neox",
    "cohere2",
)
NUM_NEW = 12


@dataclass(frozen=True)
class Numbers:
    """What a model computes with."""

    dtype: torch.dtype = torch.float32
    quantization: str | None = None


# Each of them multiplies in other code.
KINDS = {
    "float32": Numbers(),
    "bfloat16": Numbers(torch.bfloat16),
    "int8": Numbers(quantization="int8"),
    "int8-bfloat16": Numbers(torch.bfloat16, quantization="int8"),
}

PARAMS = (
    SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, logprobs=5, prompt_logprobs=2),
    SamplingParams(temperature=1.3, seed=1, top_p=0.9, max_tokens=NUM_NEW, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0.8, seed=2, top_k=30, min_p=0.01, max_tokens=NUM_NEW, ignore_eos=True, logprobs=0),
    SamplingParams(
        seed=3, max_tokens=NUM_NEW, ignore_eos=True, logprobs=20, n=2, repetition_penalty=1.2, frequency_penalty=0.3
    ),
    SamplingParams(seed=4, max_tokens=NUM_NEW, min_p=0.2, ignore_eos=True, logprobs=3, banned_token_ids=[5, 6]),
)


@dataclass(frozen=True)
class Company:
    """A way to run requests together."""

    order: Sequence[int]
    block_size: int
    budget: int
    max_num_seqs: int
    prefix_caching: bool
    is_tight: bool
    is_preempted: bool
    threads: int


def companies(threads: Sequence[int]) -> st.SearchStrategy[Company]:
    return st.builds(
        Company,
        order=st.permutations(range(6)).map(lambda order: order[: 2 + order[0] % 5]),
        block_size=st.sampled_from([1, 16, 64]),
        budget=st.integers(1, 512) | st.sampled_from([8, 33]),
        max_num_seqs=st.integers(2, 16),
        prefix_caching=st.booleans(),
        is_tight=st.booleans(),
        is_preempted=st.booleans(),
        threads=st.sampled_from(threads),
    )


def config(**options: Any) -> EngineConfig:
    return EngineConfig(device="cpu", deterministic=True, **{"num_kv_blocks": 256, **options})


def bits(output: Any) -> list[Bits]:
    """Everything that a request's tokens and log-probabilities are, of each completion."""
    assert output.error is None
    return [
        (tuple(it.token_ids), tuple(it.logprobs or ()), tuple(output.prompt_logprobs or ()))
        for it in output.completions
    ]


def requests_of(it: Saved) -> list[tuple[list[int], SamplingParams]]:
    prompts = [it.prompts[place] for place in (0, 4, 8, 12, 13, 14)]
    return [(prompt, PARAMS[place % len(PARAMS)]) for place, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def alone(saved: Save) -> Callable[[str, Numbers], list[list[Bits]]]:
    """What each request gets when it has the engine for itself, and nothing is cached."""

    @cache
    def run(name: str, numbers: Numbers) -> list[list[Bits]]:
        it = saved(BY_NAME[name], numbers.dtype)
        engine = load(it, numbers, enable_prefix_caching=False)
        return [bits(engine.generate([prompt], params)[0]) for prompt, params in requests_of(it)]

    return run


def load(it: Saved, numbers: Numbers, **options: Any) -> Engine:
    try:
        return Engine.from_pretrained(it.directory, config(quantization=numbers.quantization, **options))
    except ModelError as error:
        if numbers.quantization is not None and "C++ kernels" in error.message:
            pytest.skip(error.message)
        raise


def run_together(it: Saved, numbers: Numbers, company: Company) -> list[list[Bits]]:
    """Requests in the company's order; the engine is warm from others when it caches prefixes."""
    requests = [requests_of(it)[place] for place in company.order]
    longest = max(len(prompt) for prompt, _ in requests) + NUM_NEW
    most = 2 * longest if company.is_tight else 2000
    engine = load(
        it,
        numbers,
        block_size=company.block_size,
        max_num_batched_tokens=company.budget,
        max_num_seqs=company.max_num_seqs,
        enable_prefix_caching=company.prefix_caching,
        num_kv_blocks=-(-most // company.block_size) + 1,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(company.threads)
    try:
        if company.prefix_caching:
            # Other chunks and another end: what it leaves behind are the first 20 tokens that the long prompts share.
            engine.generate([it.prompts[12][:33]], greedy(3))
        run = generate_with_preemptions if company.is_preempted else Engine.generate
        outputs = run(engine, [prompt for prompt, _ in requests], [params for _, params in requests])
    finally:
        torch.set_num_threads(before)
    engine.check()
    if company is CROWDED:
        assert any(output.cached_tokens for output in outputs)
    return [bits(output) for output in outputs]


def quickly(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Chunks beside decodes, blocks that others have filled and too few of them, and sequences that start again.
CROWDED = Company(
    order=(3, 0, 5, 1, 4, 2),
    block_size=4,
    budget=33,
    max_num_seqs=5,
    prefix_caching=True,
    is_tight=True,
    is_preempted=True,
    threads=1,
)


@pytest.mark.parametrize(
    ("name", "kind"), [("opt", "float32"), ("gemma2", "float32"), ("gpt2", "bfloat16"), ("qwen3-moe", "int8")]
)
def test_deterministic_outputs_do_not_depend_on_the_batch(name: str, kind: str, saved: Save, alone: Any) -> None:
    numbers = KINDS[kind]
    expected = alone(name, numbers)
    assert run_together(saved(BY_NAME[name], numbers.dtype), numbers, CROWDED) == [
        expected[place] for place in CROWDED.order
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in SOME + MORE for kind in (KINDS if name in SOME else ("float32", "bfloat16"))],
)
@quickly(6)
@given(company=companies([1, 2, 3]))
def test_deterministic_outputs_do_not_depend_on_the_batch_in_many_shapes(
    name: str, kind: str, saved: Save, alone: Any, company: Company
) -> None:
    numbers = KINDS[kind]
    expected = alone(name, numbers)
    found = run_together(saved(BY_NAME[name], numbers.dtype), numbers, company)
    assert found == [expected[place] for place in company.order]


@pytest.mark.parametrize("name", ["gemma2"])
def test_tokens_are_those_of_transformers_even_when_preempted(name: str, saved: Save) -> None:
    it = saved(BY_NAME[name])
    quiet = Engine.from_pretrained(it.directory, config()).generate(it.prompts, greedy(NUM_TOKENS))
    assert_same(quiet, it.references)
    engine = Engine.from_pretrained(it.directory, config(max_num_batched_tokens=24))
    preempted = generate_with_preemptions(engine, it.prompts, greedy(NUM_TOKENS))
    assert [bits(output) for output in preempted] == [bits(output) for output in quiet]


def test_outputs_depend_on_the_batch_without_the_deterministic_mode(saved: Save) -> None:
    """What the tests above compare does depend on the batch: a decode alone is another product than one of many."""
    it = saved(BY_NAME["qwen3"])
    engine = Engine.from_pretrained(
        it.directory, EngineConfig(device="cpu", num_kv_blocks=256, attention="torch", enable_prefix_caching=False)
    )
    requests = requests_of(it)
    apart = [bits(engine.generate([prompt], params)[0]) for prompt, params in requests]
    together = engine.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    assert [bits(output) for output in together] != apart


def test_deterministic_mode_is_refused_when_rows_of_the_model_interact(saved: Save) -> None:
    """The trial sees what depends on a row's place or on its neighbours."""
    runner = ModelRunner.from_pretrained(saved(BY_NAME["gpt2"]).directory, config())
    forward = runner.model.forward

    def trial() -> None:
        check_invariance(runner._on_trial(16), vocab_size=runner.vocab_size, max_positions=160, block_size=16)

    trial()
    for meddle in (
        lambda logits: logits + logits.mean(dim=0) * 1e-6,
        lambda logits: logits * torch.linspace(1, 1.0001, len(logits))[:, None],
    ):
        runner.model.forward = lambda *args, meddle=meddle: meddle(forward(*args))  # type: ignore[method-assign]
        with pytest.raises(UnsupportedModel, match="depend on what else is in the batch"):
            trial()


def test_deterministic_mode_is_refused_with_experts_in_foreign_code(saved: Save) -> None:
    with pytest.raises(UnsupportedModel, match="experts"):
        Engine.from_pretrained(saved(BY_NAME["qwen2-moe"]).directory, config())


def test_deterministic_mode_is_refused_on_a_gpu_and_with_other_attention() -> None:
    with pytest.raises(ValueError, match="CPU only"):
        replace(config(), device="cuda")
    with pytest.raises(ValueError, match="its own attention"):
        config(attention="triton")
