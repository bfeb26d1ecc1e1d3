"""OpenVINO GenAI, through its continuous batching pipeline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contender import Contender, Conversion, Environment, Output, Setup, WorkloadRunner
from bench.workload import WorkloadRequest

KV_CACHE_GIB = 4
WEIGHTS = {"float32": "fp32", "bfloat16": "fp16", "int8": "int8"}
# Prompts that begin alike for this long are worth computing once.
SHARED_PREFIX = 32


class _OpenVino(WorkloadRunner):
    def __init__(self, setup: Setup) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.max_num_batched_tokens = 512
        scheduler.max_num_seqs = max(128, setup.num_requests)
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        compute = setup.compute if setup.precision == "int8" else setup.precision
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[compute],
            "INFERENCE_NUM_THREADS": setup.threads,
        }
        self._pipeline: Any = genai.ContinuousBatchingPipeline(str(setup.model), scheduler, "CPU", options)
        self._next_id = 0
        self._eos_token_ids = setup.eos_token_ids

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        # It looks for cached prefixes when a request is added: let the first one compute the shared prefix before.
        is_shared = len({tuple(request.prompt[:SHARED_PREFIX]) for request in requests}) == 1
        handles = []
        for place, request in enumerate(requests):
            handles.append(self._add(request))
            if place == 0 and is_shared:
                self._pipeline.step()
                self._pipeline.step()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return [
            Output.of(handle.read_all()[0].generated_ids, request, self._eos_token_ids)
            for handle, request in zip(handles, requests, strict=True)
        ]

    def _add(self, request: WorkloadRequest) -> Any:
        import numpy as np
        import openvino
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens = request.max_tokens
        config.ignore_eos = not request.stops_at_eos
        config.do_sample = False
        config.eos_token_id = self._eos_token_ids[-1]
        if request.stops_at_eos:
            config.stop_token_ids = set(self._eos_token_ids)
        self._next_id += 1
        prompt = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
        return self._pipeline.add_request(self._next_id, prompt, config)


def _export(source: Path, target: Path, precision: str) -> None:
    tool = [sys.executable, "-m", "optimum.commands.optimum_cli"]
    options = ["--task", "text-generation-with-past", "--weight-format", WEIGHTS[precision]]
    subprocess.run([*tool, "export", "openvino", "-m", source, *options, target], check=True)


CONTENDERS = (
    Contender(
        name="openvino",
        title="OpenVINO GenAI",
        precisions=("float32", "bfloat16", "int8"),
        start=_OpenVino,
        packages=("openvino-genai", "openvino"),
        environment=Environment("openvino", ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "numpy==2.4.6")),
        conversion=Conversion(
            Environment(
                "openvino-export",
                (
                    "optimum-intel==2.2.0",
                    "optimum==2.3.0",
                    "nncf==3.4.0",
                    "transformers==5.5.4",
                    "openvino==2026.4.1",
                    "openvino-tokenizers==2026.4.1.0",
                    "torch==2.13.0",
                    "numpy==2.4.6",
                ),
                unwanted=("torchvision",),
            ),
            _export,
        ),
    ),
)
