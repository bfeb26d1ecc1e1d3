"""A GPU's profile, as far as it shows without one: what steps ask for, and where events go.

Events are torch's own, made by hand with the names that kernels have on a GPU, or recorded on this machine.
"""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from bench.profiling.cost_model import TORCH_PRODUCT, Cost, Mixture, attention_work, measure_costs
from bench.profiling.device import (
    COPIES,
    DECODES,
    EXPERT_SUMS,
    EXPERTS,
    OTHERS,
    PLANS,
    PRODUCTS,
    PROMPTS,
    ROUTING,
    SAMPLING,
    RooflineMeter,
    busy_seconds,
    covered,
)
from bench.profiling.profile import ATTENTION, LINEARS, profiled
from engine import Engine, EngineConfig, SamplingParams
from engine.attention import AttentionLayer
from engine.batch import Batch, BatchEntry
from engine.execution.model_runner import ModelRunner
from kernels.device import interprets
from tests.parity.tiny_models import NATIVE

PROMPTS_IN = [[3, 4, 5, 6, 7], [8, 9], [10] * 20]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=11, ignore_eos=True),
]


def engine(directory: Path, name: str = "llama", *, attention: str = "torch", decode_steps: int = 1) -> Engine:
    next(model for model in NATIVE if model.name == name).save(directory, torch.float32)
    return Engine.from_pretrained(
        directory,
        EngineConfig(
            device="cpu",
            dtype="float32",
            num_kv_blocks=64,
            block_size=8,
            max_num_batched_tokens=16,
            decode_steps=decode_steps,
            attention=attention,
            enable_prefix_caching=False,
        ),
    )


def metered(made: Engine) -> RooflineMeter:
    """Generate while a meter counts as it does on a GPU."""
    runner = made.runner
    assert isinstance(runner, ModelRunner)
    meter = RooflineMeter(runner)
    run, decode = runner.run, runner.decode

    def run_counted(batch: Batch) -> torch.Tensor:
        meter.ran(batch)
        return run(batch)

    with (
        mock.patch.object(runner, "run", run_counted),
        mock.patch.object(runner, "decode", lambda batch: meter.watched(batch, decode(batch))),
    ):
        outputs = made.generate(PROMPTS_IN, PARAMS)
    assert [len(output.token_ids) for output in outputs] == [9, 12, 11]
    return meter


def event(name: str, start: float, end: float, *, device: DeviceType = DeviceType.CUDA) -> FunctionEvent:
    """From one microsecond to another."""
    return FunctionEvent(1, name, 0, start, end, device_type=device)


def one_of_each() -> list[FunctionEvent]:
    names = ["nvjet_tst_128x64_64x9_2x1_v_bz_TNT", "_decode_kernel", "_prefill_kernel", "_sample_kernel"]
    return [event(name, 10.0 * place, 10.0 * place + 5) for place, name in enumerate(names)]


@pytest.mark.parametrize(("name", "decode_steps"), [("llama", 4), ("gpt2", 1), ("gemma2", 1)])
def test_measured_costs_equal_those_counted_by_hooks_at_every_step(
    name: str, decode_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU, linear layers stay torch's own; those of the CPU hold packed weights.
    monkeypatch.setattr("engine.linears.LinearReplacer.replace", lambda *_: None)
    made = engine(tmp_path, name)
    with profiled(made) as hooked:
        made.generate(PROMPTS_IN, PARAMS)
    kernels = metered(engine(tmp_path, name, decode_steps=decode_steps)).kernels(one_of_each())
    assert kernels[PRODUCTS].flops == hooked.parts[LINEARS].flops
    attention = kernels[DECODES].flops + kernels[PROMPTS].flops
    assert attention == hooked.parts[ATTENTION].flops
    if decode_steps == 1:
        # Hooks do not count biases.
        assert kernels[PRODUCTS].bytes == pytest.approx(hooked.parts[LINEARS].bytes, rel=0.005)
    else:  # a step in which only some rows are left reads all weights all the same
        assert kernels[PRODUCTS].bytes == pytest.approx(hooked.parts[LINEARS].bytes, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "decode_steps"), [("mixtral", 4), ("qwen3-moe", 1)])
def test_experts_cost_nothing_when_not_chosen(
    name: str, decode_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.linears.LinearReplacer.replace", lambda *_: None)
    made = engine(tmp_path, name)
    with profiled(made) as hooked:
        made.generate(PROMPTS_IN, PARAMS)
    events = [*one_of_each(), event("_product_kernel", 50, 55), event("_arrange_kernel", 60, 61)]
    kernels = metered(engine(tmp_path, name, decode_steps=decode_steps)).kernels(events)
    # Hooks see what every expert is given, and the experts that are given nothing.
    assert kernels[PRODUCTS].flops + kernels[EXPERTS].flops == hooked.parts[LINEARS].flops
    assert kernels[EXPERTS].flops > 0
    assert kernels[PRODUCTS].bytes + kernels[EXPERTS].bytes == pytest.approx(hooked.parts[LINEARS].bytes, rel=0.2)
    assert kernels[ROUTING].bytes > 0


def test_expected_experts_read_follow_random_routing() -> None:
    mixture = Mixture(num_experts=5, per_token=2, hidden=8, inner=3, itemsize=2)
    each, per_token = 3 * 8 * 3 * 2, (8 + 2 * (3 + 3 + 8)) * 2
    for num_tokens in range(4):
        choices = list(product(combinations(range(5), 2), repeat=num_tokens))
        mean = sum(len({expert for token in choice for expert in token}) for choice in choices) / len(choices)
        found = mixture.products([num_tokens])
        assert found.bytes == pytest.approx(each * mean + per_token * num_tokens)
        assert found.flops == num_tokens * 2 * 2 * (3 * 8 * 3)
    # Each step reads its own.
    assert mixture.products([1, 2, 0]).bytes == pytest.approx(mixture.products([1]).bytes + mixture.products([2]).bytes)


@pytest.mark.slow
@pytest.mark.skipif(not interprets(), reason="Triton's interpreter is off")
def test_expert_kernels_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine(tmp_path, "mixtral").runner
    assert isinstance(runner, ModelRunner)
    meter = RooflineMeter(runner)
    monkeypatch.setattr("kernels.expert_mlp.dispatch", SimpleNamespace(use_triton=lambda tensor: True))
    ours = {name for name in measure_costs(runner, 2) if name != TORCH_PRODUCT}
    found = meter.kernels([event(name, 0, 1) for name in ours])
    assert set(found) == {EXPERTS, ROUTING, EXPERT_SUMS}


def test_sampling_reads_each_row_of_logits_once(tmp_path: Path) -> None:
    made = engine(tmp_path, decode_steps=4)
    kernels = metered(made).kernels(one_of_each())
    assert kernels[SAMPLING].bytes == (9 + 12 + 11) * made.runner.vocab_size * 4


def test_device_sampling_reads_logits_in_their_own_type(tmp_path: Path) -> None:
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    runner = ModelRunner.from_pretrained(tmp_path, EngineConfig(device="cpu", dtype="bfloat16", num_kv_blocks=8))
    read = []
    for draws in (True, False):
        meter = RooflineMeter(runner)
        meter.ran(Batch([BatchEntry([3, 4, 5], 0, [0], 1)]), draws=draws)
        read.append(meter.kernels(one_of_each())[SAMPLING].bytes)
    assert read == [2 * runner.vocab_size, 4 * runner.vocab_size]


@pytest.mark.skipif(not interprets(), reason="Triton's interpreter is off")
def test_kernel_cost_is_the_bytes_of_its_arguments(tmp_path: Path) -> None:
    runner = engine(tmp_path, attention="triton").runner
    assert isinstance(runner, ModelRunner)
    demand = measure_costs(runner, 3)["_write_kernel"]
    layers = runner.model.attention_layers
    row = sum(layer.num_kv_heads * (layer.head_dim + layer.value_dim) * 4 for layer in layers)
    turned = sum(layer.num_heads * layer.head_dim * 4 for layer in layers)
    angles = sum(layer.head_dim * 4 for layer in layers)  # half a head of cosines, and of sines
    # Keys and values are read and written, queries turned in the same launch; each layer reads a slot a token.
    assert demand.token.bytes == 2 * row + 2 * turned + angles + 8 * len(layers)
    assert demand.logits == Cost()
    assert demand.of(2, 5, 0).bytes == 2 * demand.step.bytes + 5 * demand.token.bytes


def test_measuring_costs_leaves_cache_and_model_unchanged(tmp_path: Path) -> None:
    made = engine(tmp_path)
    expected = [output.token_ids for output in made.generate(PROMPTS_IN, PARAMS)]
    runner = made.runner
    assert isinstance(runner, ModelRunner)
    before = [[part[:-1].clone() for part in layer.tensors] for layer in runner.cache.layers]
    attributes = [set(vars(module)) for module in runner.model.modules()]
    assert measure_costs(runner, 5)[TORCH_PRODUCT].token.flops > 0
    assert [set(vars(module)) for module in runner.model.modules()] == attributes
    for layer, old in zip(runner.cache.layers, before, strict=True):
        for part, its in zip(layer.tensors, old, strict=True):
            assert torch.equal(part[:-1], its)
    assert [output.token_ids for output in made.generate(PROMPTS_IN, PARAMS)] == expected


def test_decodes_read_their_context_once_a_step(tmp_path: Path) -> None:
    """Eight steps from position 100 on read 101 to 108 positions, in a multi-step batch of any size."""
    layer = AttentionLayer(0, 8, 2, 16, 16, 1.0)
    looks = sum(range(101, 109))
    work = attention_work(layer, looks, looks, 8, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    # A scale for each key and each value is a byte more.
    assert work == Cost(2 * 8 * 32 * looks, 2 * (32 + 2) * looks + 8 * 32 * 2 * 8)


def test_events_are_assigned_to_the_part_of_their_kernel(tmp_path: Path) -> None:
    runner = engine(tmp_path).runner
    assert isinstance(runner, ModelRunner)
    events = [
        event("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", 0, 50),
        event("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasSplitKParams<float>)", 50, 52),
        event("_decode_kernel", 40, 70),
        event("_combine_splits_kernel", 70, 72),
        event("_plan_kernel", 80, 81),
        event("Memcpy HtoD (Pinned -> Device)", 90, 91),
        event("Memset (Device)", 91, 92),
        event("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<long>>(int)", 95, 97),
        event("cudaGraphLaunch", 0, 900, device=DeviceType.CPU),
    ]
    kernels = RooflineMeter(runner).kernels(events)
    taken = {name: (round(kernel.seconds * 1e6), kernel.launches) for name, kernel in kernels.items()}
    assert taken == {PRODUCTS: (52, 2), DECODES: (32, 2), OTHERS: (2, 1), COPIES: (2, 2), PLANS: (1, 1)}
    assert list(kernels)[:2] == [PRODUCTS, DECODES]
    assert busy_seconds(events) == pytest.approx((72 + 1 + 2 + 2) * 1e-6)


def test_cpu_events_are_not_counted_as_the_devices(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    events = profiler.events()
    assert events is not None
    assert any(one.name == "aten::mm" for one in events)
    assert busy_seconds(events) == 0
    # The same events, had they been a device's.
    moved = [event(one.name, one.time_range.start, one.time_range.end) for one in events]
    assert busy_seconds(moved) > 0


def test_covered_counts_overlapping_intervals_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4.0
