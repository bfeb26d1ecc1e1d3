"""The engine's step: schedule → run → sample → settle, at once or overlapped.

    immediate    schedule 1, run 1, sample 1, settle 1      schedule 2, run 2, sample 2, settle 2
    overlapped   schedule 1, start 1      schedule 2, start 2, settle 1      schedule 3, start 3, settle 2

A started step runs and samples on the device; settling it waits for its tokens (`in_flight.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch, BatchEntry, Runner
from engine.device.errors import device_errors_as_engine_failed
from engine.errors import EngineFailed
from engine.loop.fault_isolation import IsolatedStep, filled_blocks, run_isolating_faults
from engine.loop.in_flight import InFlightStep
from engine.loop.settling import Settler
from engine.loop.step_result import StepResult, sample_step
from engine.loop.throughput import Throughput
from engine.sampling.sampler import Sampler
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step import ScheduledSequence, ScheduledStep

logger = logging.getLogger(__name__)


class StepLoop:
    """Steps the scheduler, the runner and the sampler; `settler` takes in what comes of it."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, sampler: Sampler, settler: Settler, *, supports_overlap: bool
    ) -> None:
        self.throughput = Throughput()
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._settler = settler
        self._supports_overlap = supports_overlap
        self._in_flight: InFlightStep | None = None
        self._last_step_end = 0.0
        """When the last started step had run, by `time.perf_counter`."""

    def step(self) -> None:
        """Make one step; raises `EngineFailed` when the runner is broken for all requests."""
        with self.throughput.measure() as measured:
            if self._supports_overlap:
                self._step_overlapped()
            else:
                self._step_immediate()
            measured.is_busy = self._in_flight is not None

    def _step_immediate(self) -> None:
        """Schedule a step, run it, and settle it."""
        step = self._schedule()
        self._run_and_settle(step)

    def _step_overlapped(self) -> None:
        """Schedule and start the next step while the last one runs, then settle the last one."""
        last = self._take_in_flight()
        step = self._schedule(last)
        if not (step.is_empty or step.needs_host):
            self._in_flight = self._start(step)
        if self._in_flight is None:  # the host samples it, and needs the last step's tokens for that
            unfilled = self._settle_before(step, last) if last is not None else set()
            self._run_and_settle(step, unfilled)
        elif last is not None:
            self._settle_in_flight(last)

    def _take_in_flight(self) -> InFlightStep | None:
        """The step that is in flight; it is settled first where scheduling over it would lose its tokens."""
        last, self._in_flight = self._in_flight, None
        if last is not None and not self._scheduler.needs_no_preemption():
            self._settle_in_flight(last)
            return None
        return last

    def _schedule(self, last: InFlightStep | None = None) -> ScheduledStep:
        step = self._scheduler.schedule()
        if last is None and step.is_empty and not step.preempted and len(self._scheduler.waiting):
            raise EngineFailed("requests are queued, but none can be scheduled")
        return step

    # Run and sample

    def _run_and_settle(self, step: ScheduledStep, unfilled: Iterable[int] = ()) -> None:
        """Run a step to its end: its multi-step batch, if any, is started beside the items that the host samples."""
        began = time.perf_counter()
        multi_step = self._start(step.only_multi_step()) if step.multi_step else None
        items = step.scheduled if multi_step is not None else step.items
        if items:
            results = self._run(items, unfilled)
            self._settle(items, results)
        if multi_step is not None:
            self._settle_in_flight(multi_step)
        elif items:
            self._record_duration(items, time.perf_counter() - began)

    def _run(self, items: Sequence[ScheduledSequence], unfilled: Iterable[int]) -> IsolatedStep[StepResult]:
        """Run and sample; where that raises, find the requests at fault. `unfilled` as for `run_isolating_faults`."""
        block_size = self._scheduler.blocks.block_size
        results = run_isolating_faults(items, block_size, self._run_and_sample, unfilled=unfilled)
        if results.failed and not results.results:
            self._check_runner_alive(*results.failed[0])
        return results

    def _run_and_sample(self, items: Sequence[ScheduledSequence]) -> list[StepResult]:
        logits = self._run_batch(Batch([item.entry() for item in items]))
        return sample_step(self._sampler, items, logits)

    def _run_batch(self, batch: Batch) -> torch.Tensor:
        with device_errors_as_engine_failed():
            return self._runner.run(batch)

    def _check_runner_alive(self, item: ScheduledSequence, error: Exception) -> None:
        """When all of a step fails, find out whether the requests are at fault or the runner is broken.

        A single token runs in the last block that the failed request was to fill, which no other request relies on.
        """
        block = item.sequence.table.blocks[-1]
        try:
            self._run_batch(Batch([BatchEntry([0], 0, [block], 1)]))
        except Exception as probe_error:
            raise EngineFailed(f"the model runs no request any more: {error}") from probe_error

    def _start(self, step: ScheduledStep) -> InFlightStep | None:
        """Start a step that does not need the host.

        None where that fails: the step then has no multi-step batch any more, and is to be run by the host, which
        finds the request at fault.
        """
        try:
            with device_errors_as_engine_failed():
                return InFlightStep.start(self._runner, step)
        except EngineFailed:
            raise
        except Exception as error:  # noqa: BLE001 - any error of a model or a kernel
            logger.warning("%d steps at once failed, and are tried one by one: %s", step.num_steps, error)
            if step.multi_step and isinstance(error, torch.OutOfMemoryError):
                self._scheduler.memory_backoff.shrink(len(step.multi_step))
        step.scheduled, step.multi_step = step.items, []
        return None

    # Settle

    def _settle(self, items: Sequence[ScheduledSequence], results: IsolatedStep[StepResult]) -> None:
        if results.too_many is not None:
            logger.warning(
                "the memory does not suffice for a step of %d tokens: steps become smaller", results.too_many
            )
            self._scheduler.memory_backoff.shrink(results.too_many)
        else:
            self._scheduler.memory_backoff.record_success()
        num_output = self._settler.settle(results)
        self.throughput.count(output=num_output, computed=sum(item.end - item.start for item in items))

    def _settle_in_flight(self, step: InFlightStep) -> None:
        """Wait for a started step's tokens, and settle them."""
        sampled = self._wait_for(step)
        now = time.perf_counter()
        # It ran after the one before it, even if it was started earlier.
        seconds = now - max(step.started, self._last_step_end)
        self._last_step_end = now
        self._scheduler.decode_steps.record(seconds, step.num_steps, only_decodes=step.only_decodes)
        num_output = self._settler.settle_in_flight(step, sampled)
        self._scheduler.memory_backoff.record_success()
        self.throughput.count(steps=step.num_steps, output=num_output, computed=step.num_prompt_tokens + num_output)

    def _wait_for(self, step: InFlightStep) -> npt.NDArray[np.int64]:
        with device_errors_as_engine_failed():
            return step.tokens.wait()

    def _settle_before(self, step: ScheduledStep, last: InFlightStep) -> set[int]:
        """Settle the last step before `step`, which was scheduled after it and loses the sequences that end in it.

        Returns the blocks that `step` therefore does not fill.
        """
        block_size = self._scheduler.blocks.block_size
        to_fill = [(item, filled_blocks(item, block_size)) for item in step.scheduled]
        self._settle_in_flight(last)
        step.scheduled = [item for item in step.scheduled if item.is_current]
        step.multi_step = [item for item in step.multi_step if item.is_current]
        return {block for item, blocks in to_fill if not item.is_current for block in blocks}

    def _record_duration(self, items: Sequence[ScheduledSequence], seconds: float) -> None:
        num_tokens = sum(item.end - item.start for item in items)
        num_decodes = sum(item.decodes for item in items)
        self.throughput.count(steps=1)
        self._scheduler.decode_steps.record(seconds, 1, only_decodes=num_decodes == num_tokens)
        self._scheduler.prefill_budget.record(num_tokens, num_decodes, seconds)
