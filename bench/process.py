"""`python -m bench.process NAME`: a contender's process, with orders and answers as JSON lines until its input ends.

{"convert": {"source", "target", "precision"}}     ->  {}
{"start": {the fields of Setup}}                   ->  {"seconds", "versions"}
{"generate": [{"prompt", "max_tokens"}, ...]}      ->  {"seconds", "outputs": [{"num_tokens", "token_ids"}, ...]}
{"processes": null}                                ->  {"processes": [pid, ...] or null}
an order that fails                                ->  {"error": text}
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.contender import Contender, Setup, WorkloadRunner, contenders
from bench.workload import WorkloadRequest


class _Host:
    """One contender, as its orders come in."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._runner: WorkloadRunner | None = None

    def convert(self, order: Mapping[str, str]) -> dict[str, Any]:
        assert self._contender.conversion is not None
        self._contender.conversion.convert(Path(order["source"]), Path(order["target"]), order["precision"])
        return {}

    def start(self, order: Mapping[str, Any]) -> dict[str, Any]:
        setup = Setup(**{**order, "model": Path(order["model"])})
        began = time.perf_counter()
        self._runner = self._contender.start(setup)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "versions": {name: version(name) for name in self._contender.packages}}

    def generate(self, order: list[Mapping[str, Any]]) -> dict[str, Any]:
        assert self._runner is not None
        requests = [WorkloadRequest(**request) for request in order]
        began = time.perf_counter()
        outputs = self._runner.generate(requests)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "outputs": [asdict(output) for output in outputs]}

    def processes(self, order: None) -> dict[str, Any]:
        del order
        assert self._runner is not None
        return {"processes": self._runner.processes()}

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


def main() -> None:
    # Libraries print; the harness shall read answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    host = _Host(contenders()[sys.argv[1]])
    try:
        for line in sys.stdin:
            ((name, order),) = json.loads(line).items()
            try:
                answer = getattr(host, name)(order)
            except Exception as error:  # noqa: BLE001 - any error that a rival raises is its result
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        host.close()


if __name__ == "__main__":
    main()
