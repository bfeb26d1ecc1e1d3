"""Decode steps as a graph would hold them: recorded once, and repeated without Python looking on.

There is no GPU here, so a recorder stands for the graph. It notes a multi-step batch's tensor operations, and fails
where the work looks at a value, as capturing would; the recording is then run again and again over the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from engine import Engine, EngineConfig, SamplingParams
from engine.attention import (
    AttentionLayer,
    AttentionMetadata,
    CapturableAttention,
    DecodeMetadata,
    StepAttention,
    TorchAttention,
)
from engine.attention.kv_cache import KVCache
from engine.execution.model_runner import ModelRunner
from engine.execution.multi_step import MultiStepDecoder, SamplingMode
from tests.parity.tiny_models import NATIVE


class StaticAttention:
    """Plain torch whose decodes read all of a block table, and mask what lies beyond the length."""

    def prepare(self, layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        return TorchAttention().prepare(layout, cache)

    def reserve(self, layers: Sequence[AttentionLayer], *, kv_dtype: torch.dtype, max_sequences: int) -> None:
        """There is nothing that outlives a step."""

    def prepare_decode(self, layout: DecodeMetadata, cache: KVCache) -> StepAttention:
        size = cache.block_size
        offsets = torch.arange(layout.block_tables.shape[1] * size)
        slots = layout.block_tables.long().repeat_interleave(size, dim=1) * size + offsets % size

        def attend(
            layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
        ) -> Tensor:
            assert sinks is None
            keys, values = (
                part.view(-1, *part.shape[2:]).index_copy_(0, layout.slots, new)
                for part, new in zip(cache.layers[layer.index].tensors, (key, value), strict=True)
            )
            seen = offsets < layout.lengths.clamp(min=1)[:, None]
            if layer.sliding_window is not None:
                seen = seen & (offsets > layout.positions[:, None] - layer.sliding_window)
            grouped = query.view(len(query), layer.num_kv_heads, -1, layer.head_dim)
            scores = torch.einsum("skgd,smkd->skgm", grouped, keys[slots]) * layer.scale
            weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1)
            return torch.einsum("skgm,smkd->skgd", weights, values[slots]).flatten(1, 2)

        return attend


class Recorder(TorchDispatchMode):
    """Notes every tensor operation, and refuses those that tell the host a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a graph cannot be captured of work that looks at a value")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """The same operations on the same outer tensors; what they made is made anew."""
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, before in self.calls:
            result = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(result), strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new


class Recorded:
    """Stands for CUDA graphs: work is recorded when its key first comes up, and from then on replayed."""

    def __init__(self, state: Sequence[Tensor] = ()) -> None:
        self.state = list(state)
        """What the work changes: recording it must not."""
        self.recorders: dict[Hashable, Recorder] = {}
        self.prepared: list[tuple[int, SamplingMode]] = []
        self.replays = 0

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self.recorders:
            before = [tensor.clone() for tensor in self.state]
            self.recorders[key] = Recorder()
            with self.recorders[key]:
                work()
            for tensor, old in zip(self.state, before, strict=True):
                tensor.copy_(old)
        self.replays += 1
        self.recorders[key].replay()

    def prepare(self, key: Hashable, work: Callable[[], None]) -> bool:
        assert isinstance(key, tuple)
        self.prepared.append(key)
        self.run(key, work)
        return True


def engine(directory: Path, *, decode_steps: int) -> Engine:
    return Engine.from_pretrained(
        directory,
        EngineConfig(
            device="cpu", dtype="float32", num_kv_blocks=64, block_size=8, decode_steps=decode_steps, max_num_seqs=5
        ),
    )


def recording(made: Engine) -> Recorded:
    """Give the engine what it would have on a GPU: static attention, and multi-step batches that are recorded."""
    runner = made.runner
    assert isinstance(runner, ModelRunner)
    runner.backend = StaticAttention()
    assert isinstance(runner.backend, CapturableAttention)
    state = runner._decoder._state
    graphs = Recorded([state.rows, *(part for layer in runner.cache.layers for part in layer.tensors)])
    runner._decoder = MultiStepDecoder(
        runner._forward,
        state,
        graphs,
        block_size=8,
        padding_block=runner.cache.padding_block,
        max_steps=4,
        is_static=True,
    )
    assert runner._decoder._buffers is not None
    graphs.state.append(runner._decoder._buffers.step)
    return graphs


PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=37, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.8, top_p=0.8, top_k=20, max_tokens=33, ignore_eos=True),
    SamplingParams(seed=3, min_p=0.05, max_tokens=40, min_tokens=10, stop_token_ids=[5, 6, 7, 8]),
    SamplingParams(temperature=0, max_tokens=21, ignore_eos=True),
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recorded_decode_gives_the_tokens_of_single_steps(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU, linear layers stay torch's own; those of the CPU are no tensor operations that could be recorded.
    monkeypatch.setattr("engine.linears.LinearReplacer.replace", lambda *_: None)
    next(model for model in NATIVE if model.name == name).save(tmp_path, torch.float32)
    prompts = [[3 + n, 4, 5, 6, 7 + n] for n in range(len(PARAMS))]
    expected = engine(tmp_path, decode_steps=1).generate(prompts, PARAMS)
    made = engine(tmp_path, decode_steps=4)
    graphs = recording(made)
    outputs = made.generate(prompts, PARAMS)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert [output.finish_reason for output in outputs] == [output.finish_reason for output in expected]
    assert graphs.replays >= 4
    assert "tried one by one" not in caplog.text


@torch.inference_mode()
def test_graphs_prepared_before_the_first_request_serve_all_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.linears.LinearReplacer.replace", lambda *_: None)
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    prompts = [[3 + n, 4, 5, 6, 7 + n] for n in range(3)]
    params = [PARAMS[0], replace(PARAMS[1], seed=11), replace(PARAMS[2], top_k=0)]
    expected = engine(tmp_path, decode_steps=1).generate(prompts, params)
    made = engine(tmp_path, decode_steps=4)
    graphs = recording(made)
    runner = made.runner
    assert isinstance(runner, ModelRunner)
    cache = [part.clone() for layer in runner.cache.layers for part in layer.tensors]
    runner._decoder.capture()
    sizes = [size for size, _ in graphs.prepared]
    assert sizes == [8, 4, 2, 1] * 3
    padding = runner.cache.padding_block
    for part, before in zip((part for layer in runner.cache.layers for part in layer.tensors), cache, strict=True):
        assert torch.equal(part[:padding], before[:padding])
    outputs = made.generate(prompts, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert set(graphs.recorders) == set(graphs.prepared)


def test_recorder_detects_host_reads() -> None:
    """Or the test above would show nothing."""
    tensor = torch.ones(3)
    graphs = Recorded()

    def work() -> None:
        if tensor.sum() > 2:
            tensor.add_(1)

    with pytest.raises(RuntimeError):
        graphs.run("key", work)
