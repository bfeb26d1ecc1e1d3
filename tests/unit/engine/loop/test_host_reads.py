"""Starting a step reads nothing on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine import Engine, EngineConfig
from engine.execution.model_runner import ModelRunner
from engine.execution.multi_step import StaticBuffers
from engine.loop.in_flight import InFlightStep
from tests.parity.comparing import ragged_prompts
from tests.parity.tiny_models import NATIVE
from tests.unit.engine.execution.test_captured_decode import StaticAttention
from tests.unit.engine.fake_engine import finish
from tests.unit.engine.loop.test_in_flight import REAL


class NoLook(TorchDispatchMode):
    """Fails where a tensor's value goes to the host by way of torch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        if looks or (
            func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1])
        ):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it lasts, every wait for a device fails."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("this waits for the device")

    with monkeypatch.context() as patch, NoLook():
        for method in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__"):
            patch.setattr(Tensor, method, refused)
        yield


def test_starting_a_step_reads_nothing_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scheduling and starting steps with prompts and decodes, as they run on a GPU, with attention that never looks."""
    monkeypatch.setattr("engine.linears.LinearReplacer.replace", lambda *_: None)
    monkeypatch.setattr(ModelRunner, "supports_overlap", property(lambda self: True))
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    engine = Engine.from_pretrained(
        tmp_path, EngineConfig(device="cpu", dtype="float32", num_kv_blocks=64, block_size=8, decode_steps=1)
    )
    assert isinstance(engine.runner, ModelRunner)
    engine.runner.backend = StaticAttention()
    decoder = engine.runner._decoder
    decoder._is_static, decoder._buffers = True, StaticBuffers(decoder._state, max_steps=1)
    kinds: list[tuple[bool, bool]] = []
    start: Callable[..., InFlightStep] = InFlightStep.start

    def guarded(runner: ModelRunner, step: Any) -> InFlightStep:
        items = step.multi_step or step.scheduled
        kinds.append((any(item.is_in_flight for item in items), any(not item.decodes for item in items)))
        with no_host_reads(monkeypatch):
            return start(runner, step)

    monkeypatch.setattr(InFlightStep, "start", guarded)
    for number, prompt in enumerate(ragged_prompts(lengths=(5, 30))):
        engine.add(f"r{number}", prompt, REAL[number % 4])
        engine.step()
    outputs = finish(engine)
    assert all(output.error is None for output in outputs.values())
    assert kinds.count((True, True)) > 4
    assert kinds.count((True, False)) > 4


def test_host_reads_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would show nothing."""
    tensor = torch.ones(3)
    looks: list[Callable[[], object]] = [
        lambda: tensor.sum().item(),
        lambda: tensor.tolist(),
        lambda: bool(tensor.all()),
        lambda: tensor.numpy(),
        lambda: tensor[tensor > 0],
    ]
    for look in looks:
        with pytest.raises(AssertionError), no_host_reads(monkeypatch):
            look()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="shows what a GPU is waited for")
def test_starting_a_step_does_not_synchronize_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    engine = Engine.from_pretrained(tmp_path, EngineConfig(device="cuda", num_kv_blocks=64, block_size=16))
    prompts = ragged_prompts(lengths=(5, 30))
    params = [REAL[n % 4] for n in range(len(prompts))]
    # Kernels are compiled and graphs captured.
    for _ in range(3):
        engine.generate(prompts, params)
    start: Callable[..., InFlightStep] = InFlightStep.start
    num_started = 0

    def guarded(runner: ModelRunner, step: Any) -> InFlightStep:
        nonlocal num_started
        num_started += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return start(runner, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(InFlightStep, "start", guarded)
    assert all(output.error is None for output in engine.generate(prompts, params))
    assert num_started > 4
