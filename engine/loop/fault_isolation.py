"""Finding the request at fault when a step raises, so that its neighbours go on.

A step changes nothing but the KV cache until it is settled, and writing the same keys and values twice is harmless. So
a step that raises is run again in halves, down to the single request that raises alone. Where only memory was short,
that is no request's fault as long as its part of the step can be made smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from engine.errors import EngineFailed
from engine.scheduling.step import ScheduledSequence

Result = TypeVar("Result")


@dataclass(slots=True)
class IsolatedStep(Generic[Result]):
    """What became of a step."""

    results: list[Result] = field(default_factory=list)
    failed: list[tuple[ScheduledSequence, Exception]] = field(default_factory=list)
    """Those that raise alone, and what."""

    depends_on_failed: list[ScheduledSequence] = field(default_factory=list)
    """Those that attend to blocks which a failed one should have filled, directly or through another."""

    retry_smaller: list[ScheduledSequence] = field(default_factory=list)
    """Those that found no memory by themselves, and would need less with fewer tokens."""

    too_many: int | None = None
    """The fewest tokens for which memory did not suffice."""


def run_isolating_faults(
    scheduled: Sequence[ScheduledSequence],
    block_size: int,
    run: Callable[[Sequence[ScheduledSequence]], list[Result]],
    *,
    unfilled: Iterable[int] = (),
) -> IsolatedStep[Result]:
    """Run a step, in halves where it raises, until each part succeeds or is a single request that raises.

    Parts run in the step's order: an entry that fills shared blocks runs before those that read them. `unfilled` are
    blocks that no step fills any more. `EngineFailed` passes through.
    """
    result: IsolatedStep[Result] = IsolatedStep()
    unfilled = set(unfilled)
    parts = [list(scheduled)] if scheduled else []
    while parts:
        part: list[ScheduledSequence] = []
        for item in parts.pop():
            if not unfilled or unfilled.isdisjoint(item.sequence.table.blocks):
                part.append(item)
            else:
                result.depends_on_failed.append(item)
                unfilled.update(filled_blocks(item, block_size))
        if not part:
            continue
        try:
            result.results.extend(run(part))
        except EngineFailed:
            raise
        except Exception as error:  # noqa: BLE001 - any error of a model or a kernel
            # The traceback would keep the step's tensors alive, and memory may be what is missing.
            failure = error.with_traceback(None)
        else:
            continue
        if isinstance(failure, torch.OutOfMemoryError):
            num_tokens = sum(item.end - item.start for item in part)
            result.too_many = min(num_tokens, result.too_many or num_tokens)
            if len(part) == 1 and num_tokens > 1:
                result.retry_smaller.append(part[0])
                unfilled.update(filled_blocks(part[0], block_size))
                continue
        if len(part) == 1:
            result.failed.append((part[0], failure))
            unfilled.update(filled_blocks(part[0], block_size))
        else:
            parts += [part[len(part) // 2 :], part[: len(part) // 2]]
    return result


def filled_blocks(item: ScheduledSequence, block_size: int) -> list[int]:
    """The blocks that a scheduled item writes to."""
    return item.sequence.table.blocks[item.start // block_size :]
