"""Measure the demo model through the engine, on examples that training never saw.

    python -m demo.evaluate [--count 900] [--dtype bfloat16] [--quantization int8] [DIRECTORY]

Exits 1 where a task falls below 99 %.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.tasks import LONGEST_ANSWER, TASKS, Example, exact, holdout
from demo.train import HOLDOUT_PER_TASK, MODEL_DIRECTORY
from engine import Engine, EngineConfig, SamplingParams

LEAST_SHARE = 0.99


@dataclass(frozen=True)
class Score:
    """How one task went."""

    task: str
    asked: int
    wrong: tuple[tuple[Example, str], ...]
    """The examples that were not answered exactly, with what came instead."""

    @property
    def share(self) -> float:
        """The part of the answers that was exact, from 0 to 1."""
        return 1 - len(self.wrong) / self.asked


def score(engine: Engine, task: str, examples: Sequence[Example]) -> Score:
    """Ask for all answers in one batch. An answer that the model does not end by itself counts as wrong."""
    params = SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER + 2)
    outputs = engine.generate([example.prompt for example in examples], params)
    answers = [(example, output) for example, output in zip(examples, outputs, strict=True)]
    wrong = tuple(
        (example, output.text)
        for example, output in answers
        if output.finish_reason != "stop" or not exact(example.prompt, output.text)
    )
    return Score(task, len(examples), wrong)


def scores(engine: Engine, count: int) -> Iterator[Score]:
    """Each task's score on `count` held-out examples."""
    for task in TASKS:
        yield score(engine, task, holdout(task, count))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model through the engine.")
    parser.add_argument("directory", type=Path, nargs="?", default=MODEL_DIRECTORY)
    parser.add_argument("--count", type=int, default=HOLDOUT_PER_TASK, help="examples per task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", choices=["int8"])
    arguments = parser.parse_args()

    config = EngineConfig(dtype=arguments.dtype, device=arguments.device, quantization=arguments.quantization)
    engine = Engine.from_pretrained(arguments.directory, config)
    started = time.monotonic()
    worst = 1.0
    for result in scores(engine, arguments.count):
        print(f"{result.task:8} {result.asked - len(result.wrong)} of {result.asked} exact ({result.share:.2%})")
        for example, answer in result.wrong:
            print(f"    {example.prompt} → {answer}, not {example.answer}")
        worst = min(worst, result.share)
    print(f"{time.monotonic() - started:.1f} s")
    sys.exit(worst < LEAST_SHARE)


if __name__ == "__main__":
    main()
