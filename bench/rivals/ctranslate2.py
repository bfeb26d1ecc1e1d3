"""CTranslate2. It has no scheduler: a call is a batch, all of which generate the same number of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contender import Contender, Conversion, Environment, Output, Setup, WorkloadRunner
from bench.workload import WorkloadRequest

# Of requests sorted by length, where lengths differ.
BATCH = 16


class _CTranslate2(WorkloadRunner):
    def __init__(self, setup: Setup) -> None:
        import ctranslate2

        # "int8" would let it choose the type of the rest; the rest is float32 on a CPU without bfloat16.
        compute = "int8_bfloat16" if (setup.precision, setup.compute) == ("int8", "bfloat16") else setup.precision
        self._generator: Any = ctranslate2.Generator(
            str(setup.model), device="cpu", compute_type=compute, intra_threads=setup.threads, inter_threads=1
        )
        self._eos_token_ids = list(setup.eos_token_ids)
        self._tokens: list[str] = json.loads((setup.model / "vocabulary.json").read_text())

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        order = sorted(range(len(requests)), key=lambda place: requests[place].max_tokens)
        is_ragged = len({request.max_tokens for request in requests}) > 1
        size = BATCH if is_ragged else len(requests)
        outputs: dict[int, Output] = {}
        for start in range(0, len(order), size):
            places = order[start : start + size]
            longest = max(requests[place].max_tokens for place in places)
            results = self._generator.generate_batch(
                [[self._tokens[token] for token in requests[place].prompt] for place in places],
                max_length=longest,
                min_length=0 if requests[0].stops_at_eos else longest,
                sampling_topk=1,
                beam_size=1,
                include_prompt_in_result=False,
                end_token=self._eos_token_ids,
            )
            for place, result in zip(places, results, strict=True):
                outputs[place] = Output.of(result.sequences_ids[0], requests[place], self._eos_token_ids)
        return [outputs[place] for place in range(len(requests))]


def _convert(source: Path, target: Path, precision: str) -> None:
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(str(source))
    converter.convert(str(target), quantization=precision)


_ENVIRONMENT = Environment(
    "ctranslate2", ("ctranslate2==4.8.5", "transformers==5.23.0", "torch==2.13.0", "numpy==2.4.6")
)

CONTENDERS = (
    Contender(
        name="ctranslate2",
        title="CTranslate2",
        precisions=("float32", "bfloat16", "int8"),
        start=_CTranslate2,
        packages=("ctranslate2",),
        environment=_ENVIRONMENT,
        conversion=Conversion(_ENVIRONMENT, _convert),
    ),
)
