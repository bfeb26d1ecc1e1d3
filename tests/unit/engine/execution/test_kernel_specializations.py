"""How often Triton would compile each kernel: once a mode, whatever a step has of sequences, tokens and blocks.

Launches are noted instead of run, and Triton's own binder says what each would be compiled for on Hopper.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import EngineConfig, SamplingParams
from engine.batch import BatchEntry
from engine.execution.decode_state import NUM_COLUMNS
from engine.execution.inputs import prepare_inputs
from engine.execution.model_runner import ModelRunner
from engine.execution.multi_step import SamplingMode, sample_tokens
from engine.sampling.sampler import Sampler
from engine.sampling.state import SamplingState
from engine.sampling.token_counts import TokenCounts
from kernels import dispatch
from kernels.device import interprets
from kernels.launch import Launch
from kernels.sampling_fallback import Filters
from kernels.sampling_splits import split_launches
from tests.parity.tiny_models import NATIVE

BATCH_SIZES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33)
MODES = [
    SamplingMode(random=random, bans_stop_tokens=False, filters=Filters(8 * filtered, filtered, filtered))
    for random, filtered in ((False, False), (True, False), (True, True))
]


@cache
def _binder_of(kernel: Any) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    refused = kernel.kwargs["do_not_specialize"] if interprets() else kernel.do_not_specialize
    compiled = JITFunction(kernel.fn, do_not_specialize=refused)
    return create_function_from_signature(compiled.signature, compiled.params, CUDABackend(GPUTarget("cuda", 90, 32)))


class Launches:
    """Kernels by name: for each mode (constants, warps, stages), what Triton would compile for it."""

    def __init__(self) -> None:
        self.keys: dict[str, dict[Any, set[Any]]] = defaultdict(lambda: defaultdict(set))

    def note(self, launch: Launch) -> None:
        if 0 in launch.grid:
            return
        _, specialization, _ = _binder_of(launch.kernel)(**launch.arguments, **launch.constants)
        mode = (*launch.constants.items(), launch.num_warps, launch.num_stages)
        module = launch.kernel.fn.__module__.removeprefix("kernels.")
        self.keys[f"{module}.{launch.kernel.fn.__name__}"][mode].add(tuple(map(tuple, specialization)))

    @property
    def compiled_again(self) -> dict[str, list[list[tuple[Any, ...]]]]:
        """Kernels that one mode has several keys of, and in what these differ."""
        return {
            name: [
                sorted({places for places in zip(*keys, strict=True) if len(set(places)) > 1}, key=str)
                for keys in modes.values()
                if len(keys) > 1
            ]
            for name, modes in self.keys.items()
            if any(len(keys) > 1 for keys in modes.values())
        }


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    noted, run = Launches(), Launch.run

    def note(launch: Launch) -> None:
        noted.note(launch)
        # What a step reads of its rows finds embeddings; nothing else is needed.
        if launch.kernel.fn.__module__ == "kernels.decode_step":
            run(launch)

    monkeypatch.setattr(Launch, "run", note)
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    # On a GPU, linear layers stay torch's own.
    monkeypatch.setattr("engine.linears.LinearReplacer.replace", lambda *_: None)
    return noted


def make_runner(name: str, directory: Path) -> ModelRunner:
    next(model for model in NATIVE if model.name == name).save(directory, torch.float32)
    config = EngineConfig(device="cpu", dtype="float32", attention="triton", num_kv_blocks=64, max_model_len=64)
    return ModelRunner.from_pretrained(directory, config)


def run_step(runner: ModelRunner, new_tokens: Sequence[int], num_blocks: int) -> None:
    """One step as the loop would prepare it; its logits mean nothing."""
    size = runner.cache.block_size
    entries = [BatchEntry([1] * new, num_blocks * size - new, range(num_blocks), 1) for new in new_tokens]
    inputs, layout = prepare_inputs(entries, size, runner.device)
    logits = runner.model(inputs, runner.backend.prepare(layout, runner.cache))
    state = torch.zeros(len(entries), NUM_COLUMNS, dtype=torch.int64)
    for mode in MODES:
        sample_tokens(logits, state, torch.arange(len(entries)), mode, is_static=True)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
@torch.inference_mode()
def test_kernel_is_compiled_once_for_all_steps(name: str, launches: Launches, tmp_path: Path) -> None:
    runner = make_runner(name, tmp_path)
    num_modes: list[dict[str, int]] = []
    for place, size in enumerate(BATCH_SIZES):
        num_blocks = 1 + place % 3
        run_step(runner, [1] * size, num_blocks)
        run_step(runner, [2 + (place + row) % 7 for row in range(size)], num_blocks)
        run_step(runner, [1, 5, *[1] * size], num_blocks)
        rows = torch.full((size,), runner._state.padding_row)
        for mode in MODES:
            runner._decoder._step(rows, runner._state.table.index_select(0, rows), mode)
        # Experts' tiles depend on how many rows there are, and nothing else does.
        num_modes.append({kernel: len(modes) for kernel, modes in launches.keys.items() if "expert" not in kernel})
    assert launches.compiled_again == {}
    assert num_modes[-1] == num_modes[0]
    assert num_modes[0]["paged_decode._decode_kernel"] == num_modes[0]["paged_prefill._prefill_kernel"] == 1
    assert num_modes[0]["sampling_rows._sample_kernel"] == len(MODES)
    # Inputs with and without parameters of sampling, and these alone.
    assert num_modes[0]["decode_step._prepare_kernel"] == 3
    assert num_modes[0]["decode_step._advance_kernel"] == 1


def test_split_sampling_is_compiled_once_for_all_numbers_of_parts(launches: Launches) -> None:
    for rows, parts in itertools.product(BATCH_SIZES, (2, 4, 8, 16)):
        real, whole = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        parameters = (real, whole, real, real, whole, whole, whole)
        for given, filtered in ((None, False), (parameters, False), (parameters, True)):
            for launch in split_launches(torch.empty(rows, 1003), given, whole, filtered=filtered, parts=parts):
                launches.note(launch)
    assert launches.compiled_again == {}
    assert {name: len(modes) for name, modes in launches.keys.items()} == {
        # Greedy and random rows begin alike.
        "sampling_splits._maxima_of_parts_kernel": 2,
        "sampling_splits._masses_of_tiles_kernel": 2,
        "sampling_splits._choose_from_parts_kernel": 3,
    }


@torch.inference_mode()
def test_penalties_are_compiled_once(launches: Launches) -> None:
    params = SamplingParams(frequency_penalty=0.5)
    for size in BATCH_SIZES:
        states = [
            SamplingState(params, seed=row, index=0, position=1, counts=TokenCounts(range(size))) for row in range(size)
        ]
        Sampler(32)._penalize(torch.zeros(size, 32), states, range(size))
    assert launches.compiled_again == {}
    assert set(launches.keys) == {"penalties._penalties_kernel"}
