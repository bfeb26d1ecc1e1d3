"""Models in the formats of the contenders that want one of their own, converted once and kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from bench.contender import Contender
from bench.contender_process import ContenderProcess

TIMEOUT = 1800.0  # seconds for one conversion


def converted(contender: Contender, model: Path, precision: str, cache: Path, threads: int) -> Path:
    """The directory that the contender loads; raises `NotInstallable` and `ContenderFailed`."""
    if contender.conversion is None:
        return model
    target = cache / "converted" / f"{model.name}-{contender.name}-{precision}"
    if not target.exists():
        draft = target.with_name(f".{target.name}")
        shutil.rmtree(draft, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        converter = replace(contender, environment=contender.conversion.environment)
        process = ContenderProcess(converter, cache, cache / "logs" / f"convert-{target.name}.log", threads)
        try:
            process.ask({"convert": {"source": str(model), "target": str(draft), "precision": precision}}, TIMEOUT)
        finally:
            process.close()
        draft.rename(target)  # at once, so that what is there is whole
    return target
