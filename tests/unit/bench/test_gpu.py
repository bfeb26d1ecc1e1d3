"""The measurements for a GPU, as far as they run without one: tiny sizes, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import kernels, turn
from bench.gpu.__main__ import main
from bench.gpu.cases import CASES, DRY_CASES, case
from bench.gpu.show import plots, table
from bench.models import CONFIGS, save_config


def test_the_cases_are_what_their_titles_say() -> None:
    counts = {one.name: one.round(0) for one in CASES if one.name != "long"}
    assert {name: len(requests) for name, requests in counts.items()} == {
        "article": 50,
        "article-4096": 4096,
        "ragged": 256,
        "shared-prefix": 8192,
    }
    assert all(100 <= len(one.prompt) <= 1024 and 100 <= one.max_tokens <= 1024 for one in counts["ragged"])
    assert len({tuple(one.prompt) for one in counts["shared-prefix"]}) == 8
    assert len({tuple(one.prompt) for one in counts["article-4096"]}) == 4096
    one = case("article", is_dry=False)
    assert [len(request.prompt) for request in one.round(0)] == [len(request.prompt) for request in one.round(1)]
    assert one.round(0) != one.round(1)
    assert one.round(0) == one.round(0)


@pytest.mark.parametrize(("name", "weights"), [("gpt2-large", 774e6), ("qwen3-0.6b", 596e6), ("llama-3.1-8b", 8.03e9)])
def test_models_have_the_size_of_their_names(name: str, weights: float) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(weights, rel=0.002)


def test_kernels_and_a_turn_run_and_are_shown(tmp_path: Path) -> None:
    save_config("tiny", tmp_path)
    measured = kernels.measure(kernels.DRY, torch.device("cpu"), torch.float32)
    order = {"model": str(tmp_path), "device": "cpu", "dtype": "float32", "is_dry": True, "rounds": 1}
    cases = []
    for one in DRY_CASES:
        result = turn.run(order | {"contender": "pagemill", "case": one.name})
        assert result["output_tokens"] == sum(request.max_tokens for request in one.round(0))
        assert result["seconds"][0] > 0
        turns = {"pagemill": result, "vllm": {"failure": "it is not here"}}
        cases.append({"case": one.name, "title": one.title, "turns": turns})
    found = {"is_dry": True, "device": "CPU", "cases": cases, **measured}
    text = table(json.loads(json.dumps(found)))
    assert "attention, decode | tiny: 2 x 70" in text
    assert "sampling, top-p 0.9" in text
    assert "The host's time: linears" in text
    assert "vllm | it is not here" in text
    assert {timing["kernel"] for timing in measured["kernels"]} >= {
        "attention, decode",
        "attention, prompts",
        "product, int4",
        "experts",
    }
    assert all(timing["seconds"] > 0 for timing in measured["kernels"])
    assert measured["failures"] == []
    assert plots(found).keys() == {"article", "shared-prefix"}


def test_a_kernel_that_fails_is_told_of_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of shared memory\nand more")

    monkeypatch.setattr(kernels, "_prefill", broken)
    measured = kernels.measure(kernels.DRY, torch.device("cpu"), torch.float32)
    assert len(measured["kernels"]) == 13
    text = table({"is_dry": True, "device": "CPU", "cases": [], **measured})
    assert "| attention, prompts, tiny: (2, 70) | RuntimeError: out of shared memory | | | |" in text


def test_a_profile_of_a_gpu_is_shown() -> None:
    kernels = {
        "matrix products": {"share": 0.5, "launches": 10, "of_copy": 0.75, "of_matmul": 0.25},
        "other kernels": {"share": 0.125, "launches": 3, "of_copy": 0.0, "of_matmul": 0.0},
    }
    profile = {"device_share": 0.96, "limits": {}, "host": {"launch": 0.25, "waiting": 0.5}, "kernels": kernels}
    turn = {
        "seconds": [2.0],
        "is_scaled": False,
        "output_tokens_per_second": 50.0,
        "requests_per_second": 5.0,
        "profile": profile,
    }
    text = table({"is_dry": False, "device": "GPU", "cases": [{"title": "One", "turns": {"pagemill": turn}}]})
    assert "| pagemill | 50 | 5.0 |  | 96% |" in text
    assert "launch 25%, waiting 50%" in text
    assert "| matrix products | 50.0% | 75% | 25% |" in text
    assert "| other kernels | 12.5% |  |  |" in text


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no GPU here"):
        main([])


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    """Each contender in a process of its own."""
    subprocess.run([sys.executable, "-m", "bench.gpu", "--dry-run", "--output", str(tmp_path)], check=True, timeout=170)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [one["case"] for one in found["cases"]] == [one.name for one in DRY_CASES]
    for one in found["cases"]:
        assert {name: turn.get("failure") for name, turn in one["turns"].items()} == dict.fromkeys(one["turns"])
    assert (tmp_path / "gpu-article.svg").exists()
