"""llama.cpp, through the server that `xllamacpp` runs in the process; int8 is its Q8_0."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.contender import Contender, Conversion, Environment, Output, Setup, WorkloadRunner
from bench.workload import WorkloadRequest

TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
MOST_SLOTS = 64
"""Requests that it generates for at once; others wait."""

FILE = "model.gguf"


class _LlamaCpp(WorkloadRunner):
    def __init__(self, setup: Setup) -> None:
        import xllamacpp

        slots = min(setup.num_requests, MOST_SLOTS)
        params = xllamacpp.CommonParams()
        params.model.path = str(setup.model / FILE)
        params.n_parallel = slots
        params.n_ctx = slots * setup.max_tokens
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup.threads
        params.n_threads_http = setup.num_requests + 1  # each request holds one until it is answered
        self._server: Any = xllamacpp.Server(params)
        self._eos_token_ids = setup.eos_token_ids

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self._complete, requests))

    def _complete(self, request: WorkloadRequest) -> Output:
        # Over HTTP, because its answers to calls in the process have no token ids.
        asked = {
            "prompt": list(request.prompt),
            "n_predict": request.max_tokens,
            "temperature": 0,
            "ignore_eos": not request.stops_at_eos,
            "return_tokens": True,
        }
        address = f"{self._server.listening_address}/completion"
        with urllib.request.urlopen(address, json.dumps(asked).encode()) as answer:
            found = json.load(answer)
        return Output.of(found["tokens"], request, self._eos_token_ids)


def _convert(source: Path, target: Path, precision: str) -> None:
    from bench.gguf_conversion import write_gguf

    target.mkdir(parents=True)
    write_gguf(source, target / FILE, TYPES[precision])


_VERSION = "2026.10.11549"
_ENVIRONMENT = Environment("llamacpp", (f"xllamacpp=={_VERSION}", "gguf==0.19.0", "numpy==2.4.6"))

CONTENDERS = (
    Contender(
        name="llamacpp",
        title="llama.cpp",
        precisions=("float32", "bfloat16", "int8"),
        start=_LlamaCpp,
        packages=("xllamacpp",),
        environment=_ENVIRONMENT,
        conversion=Conversion(_ENVIRONMENT, _convert),
    ),
)
