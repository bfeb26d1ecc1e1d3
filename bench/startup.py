"""How long from nothing to the first token, and how much memory beside the weights: `python -m bench.startup`.

gpt2-large from a checkpoint on disk and SmolLM2 from its GGUF file, as a user's program would: a Python that starts,
loads the model and generates one token. Each case starts twice, with an empty cache of packed weights and with what the
first start kept there. Cases take turns, each start a new process. The checkpoint lies in the system's file cache from
the round before the first that counts on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.models import model_directory
from bench.report import save
from bench.usage import peak_memory
from cli.packaged_models import fetch

if TYPE_CHECKING:
    from torch import Tensor, nn

CACHE = Path(".bench")
WEIGHT_CACHE = CACHE / "startup-weights"
PROMPT = list(range(1_000, 1_008))
KV_CACHE_BYTES = 256 << 20
ROUNDS = 3
STARTS = ("first", "second")


@dataclass(frozen=True, slots=True)
class Case:
    """A model in one precision."""

    model: str
    precision: str

    @property
    def path(self) -> Path:
        return fetch("smollm2") if self.model == "smollm2" else model_directory(self.model, CACHE)


CASES = tuple(Case(model, precision) for model in ("gpt2-large", "smollm2") for precision in ("float32", "int8"))


def measure(cases: Sequence[Case] = CASES, rounds: int = ROUNDS) -> dict[str, Any]:
    """By model, precision and start: seconds and seconds of CPU to the first token, and bytes."""
    turns: dict[tuple[Case, str], list[dict[str, float]]] = {(case, start): [] for case in cases for start in STARTS}
    for round_number in range(rounds + 1):
        for case in cases:
            shutil.rmtree(WEIGHT_CACHE, ignore_errors=True)
            for start in STARTS:
                found = _turn(case)
                if round_number:
                    turns[case, start].append(found)
    shutil.rmtree(WEIGHT_CACHE, ignore_errors=True)
    return {
        "kv_cache_bytes": KV_CACHE_BYTES,
        "rounds": rounds,
        "starts": [
            {"model": case.model, "precision": case.precision, "start": start, **_summary(found)}
            for (case, start), found in turns.items()
        ],
    }


def _summary(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    beside = [turn["peak"] - turn["weights"] - KV_CACHE_BYTES for turn in found]
    return {
        "seconds_to_first_token": _spread([turn["seconds"] for turn in found]),
        "cpu_seconds_to_first_token": _spread([turn["cpu_seconds"] for turn in found]),
        "weight_bytes": found[0]["weights"],
        "peak_bytes_beside_weights_and_kv_cache": _spread(beside),
    }


def _turn(case: Case) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.startup", str(case.path), case.precision]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    found = {"seconds": seconds, **json.loads(line)}
    print(f"  {case.model} {case.precision}: {found}", file=sys.stderr)
    return found


def _start(path: Path, precision: str) -> None:
    """What is measured: load, generate a token, say so. Packed weights are kept after that."""
    from engine import Engine, EngineConfig, SamplingParams
    from engine.execution.model_runner import ModelRunner
    from engine.loading.weight_cache import finish_writes

    is_int8 = precision == "int8"
    config = EngineConfig(
        device="cpu",
        dtype="bfloat16" if is_int8 and path.is_dir() else "float32",  # bfloat16: as the checkpoint has it
        quantization="int8" if is_int8 else None,
        cpu_kv_cache_bytes=KV_CACHE_BYTES,
        weight_cache_bytes=2**40,
        weight_cache_dir=WEIGHT_CACHE,
    )
    engine = Engine.from_pretrained(path, config)
    engine.generate([PROMPT], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert isinstance(engine.runner, ModelRunner)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "weights": weight_bytes(engine.runner.model),
        "peak": peak_memory([os.getpid()]),  # `ru_maxrss` is at least that of the process that started this one
    }
    print(json.dumps(found), flush=True)
    finish_writes()


def weight_bytes(model: nn.Module) -> int:
    """What a model's weights take, as they lie in memory; what two layers share counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in _weights(model)}.values())


def _weights(model: nn.Module) -> Iterator[Tensor]:
    from engine.linears.packed import PackedLinear

    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield from module.parts.values()


def _spread(found: list[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", nargs="*", help=argparse.SUPPRESS)  # a checkpoint and a precision: one start
    if arguments := parser.parse_args().start:
        _start(Path(arguments[0]), arguments[1])
    else:
        save("startup", measure())
