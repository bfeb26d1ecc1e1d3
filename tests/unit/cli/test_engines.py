"""The settings that speak of the engine reach it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from typer.testing import CliRunner

from cli.engines import engine_config
from cli.main import app
from engine import EngineConfig
from jobs.settings import Settings


def test_settings_reach_the_engine() -> None:
    settings = Settings(
        dtype="float32",
        quantization="int8",
        deterministic=True,
        device="cpu",
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        block_size=8,
        kv_cache_bytes=2**20,
        gpu_memory_utilization=0.5,
        weight_cache_bytes=2**30,
        weight_cache_dir=Path("~/weights"),
    )
    config = engine_config(settings)
    assert (config.dtype, config.device, config.max_model_len) == ("float32", "cpu", 100)
    assert (config.quantization, config.deterministic) == ("int8", True)
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.block_size) == (3, 64, 8)
    assert (config.cpu_kv_cache_bytes, config.gpu_memory_utilization) == (2**20, 0.5)
    assert (config.weight_cache_bytes, config.weight_cache_dir) == (2**30, Path.home() / "weights")


def test_limits_that_are_not_set_are_the_engines_own_on_a_cpu() -> None:
    # A library keeps no weights on the user's disk unless it is told to.
    assert engine_config(Settings(device="cpu", weight_cache_bytes=0)) == EngineConfig(device="cpu")


def test_options_of_vllms_names_go_before_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_BLOCK_SIZE", "16")
    monkeypatch.setenv("PAGEMILL_DTYPE", "float32")
    run = mock.Mock(return_value=0)
    monkeypatch.setattr("worker.generation.service.run_worker", run)
    options = {
        "--device": "cpu",
        "--tensor-parallel-size": "2",
        "--gpu-memory-utilization": "0.5",
        "--max-model-len": "100",
        "--max-num-seqs": "3",
        "--max-num-batched-tokens": "64",
        "--block-size": "8",
    }
    arguments = [word for option in options.items() for word in option]
    assert CliRunner().invoke(app, ["worker", "-m", "demo", *arguments]).exit_code == 0
    settings = run.call_args.args[0]
    assert engine_config(settings) == EngineConfig(
        device="cpu",
        dtype="float32",
        tensor_parallel_size=2,
        gpu_memory_utilization=0.5,
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        block_size=8,
        weight_cache_bytes=settings.weight_cache_bytes,
    )


@pytest.mark.parametrize(("value", "meant"), [("fp8", "float8_e4m3"), ("fp8_e4m3", "float8_e4m3"), ("auto", "auto")])
def test_kv_cache_dtype_is_taken_by_vllms_name(value: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mock.Mock(return_value=0)
    monkeypatch.setattr("worker.generation.service.run_worker", run)
    assert CliRunner().invoke(app, ["worker", "-m", "demo", "--kv-cache-dtype", value]).exit_code == 0
    assert run.call_args.args[0].kv_cache_dtype == meant


@pytest.mark.parametrize(
    ("gib", "sequences", "tokens"), [(141, 1024, 8192), (79.2, 1024, 8192), (23.6, 512, 4096), (15.7, 256, 2048)]
)
def test_limits_that_are_not_set_follow_a_gpus_memory(
    gib: float, sequences: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="a card", total_memory=int(gib * 2**30))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda place: card)
    config = engine_config(Settings(device="auto", max_model_len=100))
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.block_size) == (sequences, tokens, 64)
    assert engine_config(Settings(device="cpu")).block_size == 16


@pytest.mark.parametrize("command", [["worker", "-m", "demo"], ["generate", "-m", "demo", "-p", "1+1="]])
@pytest.mark.parametrize(
    ("variable", "value", "options", "complaint"),
    [
        ("PAGEMILL_DETERMINISTIC", "true", ["--device", "cuda"], "deterministic"),
        ("PAGEMILL_DTYPE", "float8", [], "dtype must be one of"),
        ("PAGEMILL_QUANTIZATION", "int2", [], "quantization must be"),
        ("PAGEMILL_LOG_LEVEL", "info", ["--device", "toaster"], "device must be one of"),
    ],
    ids=["deterministic", "dtype", "quantization", "device"],
)
def test_unsupported_engine_settings_are_refused_in_one_line(
    command: list[str],
    variable: str,
    value: str,
    options: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    said = CliRunner().invoke(app, [*command, *options])
    assert said.exit_code == 1
    assert not isinstance(said.exception, ValueError)
    assert complaint in said.stderr
    assert said.stderr.count("\n") == 1
