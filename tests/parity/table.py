"""Writes the table of docs/models.md by running every comparison: `python -m tests.parity.table`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

from engine import Engine, EngineConfig
from engine.models.registry import NATIVE as NATIVE_TYPES
from tests.parity.comparing import assert_same, generate_with_preemptions, greedy, ragged_prompts, reference_greedy
from tests.parity.tiny_models import GENERIC, MORE_GENERIC, NATIVE, TinyModel
from tests.support.paths import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "models.md"
BEGIN = "<!-- written by tests/parity/table.py -->"
END = "<!-- end -->"
NUM_TOKENS = 64


def path_of(model: TinyModel) -> str:
    return "native" if model.model_type in NATIVE_TYPES else "generic"


def compared() -> list[TinyModel]:
    """All models, native ones first, each group by name."""
    return sorted((*NATIVE, *GENERIC, *MORE_GENERIC), key=lambda model: (path_of(model) != "native", model.name))


def compare(model: TinyModel) -> float:
    """The largest difference in log-probability over 16 ragged prompts of 64 tokens; raises where tokens differ."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        references = reference_greedy(model.save(Path(directory)), ragged_prompts(), NUM_TOKENS)
        engine = Engine.from_pretrained(
            directory, EngineConfig(device="cpu", num_kv_blocks=256, max_num_batched_tokens=64)
        )
        prompts = [reference.prompt for reference in references]
        return assert_same(generate_with_preemptions(engine, prompts, greedy(NUM_TOKENS)), references)


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other
    rows = ["| model | `model_type` | path | largest difference in log-probability |", "|---|---|---|---|"]
    for model in compared():
        row = f"| {model.name} | `{model.model_type}` | {path_of(model)} | {compare(model):.0e} |"
        sys.stdout.write(row + "\n")
        sys.stdout.flush()
        rows.append(row)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text("\n".join((before + BEGIN, "", *rows, "", END)) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
