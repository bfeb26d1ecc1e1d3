"""The settings that speak of the engine reach it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cli.engines import engine_config
from cli.main import app
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
        kv_cache_bytes=2**20,
        gpu_memory_utilization=0.5,
    )
    config = engine_config(settings)
    assert (config.dtype, config.device, config.max_model_len) == ("float32", "cpu", 100)
    assert (config.quantization, config.deterministic) == ("int8", True)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (3, 64)
    assert (config.cpu_kv_cache_bytes, config.gpu_memory_utilization) == (2**20, 0.5)


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
