"""Requests from `Engine.add` to their output: which are unfinished, and how each one ended."""

from __future__ import annotations

from collections import Counter

from engine.errors import GrammarError
from engine.loop.detokenizer import Detokenizer
from engine.outputs import CompletionProgress, FinishReason, RequestOutput
from engine.scheduling.grammar_queue import GrammarQueue
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Request, Sequence
from engine.scheduling.stop_conditions import Stop


class RequestTracker:
    """Unfinished requests by id, and the outputs of those that finished since they were last taken."""

    def __init__(self, scheduler: Scheduler, grammars: GrammarQueue, detokenizer: Detokenizer) -> None:
        self.num_finished: Counter[FinishReason] = Counter()
        """Finished requests by how they ended."""
        self._scheduler = scheduler
        self._grammars = grammars
        self._detokenizer = detokenizer
        self._unfinished: dict[str, Request] = {}
        self._outputs: list[RequestOutput] = []

    def __contains__(self, request_id: str) -> bool:
        """Whether a request of this id is unfinished."""
        return request_id in self._unfinished

    def __len__(self) -> int:
        """Unfinished requests."""
        return len(self._unfinished)

    @property
    def has_outputs(self) -> bool:
        return bool(self._outputs)

    def add(self, request: Request) -> None:
        """Queue a request: for the scheduler, or for its grammar where it has structured outputs."""
        wanted = request.params.structured_outputs
        if wanted is not None:
            self._grammars.put(request, wanted)
        self._unfinished[request.request_id] = request
        if wanted is None:
            self._schedule(request)

    def take_compiled(self, *, wait: bool) -> None:
        """Queue the requests whose grammar is compiled, and fail those whose grammar is refused.

        With `wait`, and nothing compiled yet, a moment is spent waiting.
        """
        for request, error in self._grammars.take(wait=wait):
            if error is not None:
                self.fail(request, error)
            else:
                self._schedule(request)

    def finish(self, sequence: Sequence, stop: Stop | None) -> None:
        """End a sequence by a token or the length; without either, only if its text holds a stop string."""
        text, stop_string = self._detokenizer.read(sequence, stop)
        if stop_string is not None:
            stop = Stop("stop", stop_string)
        if stop is None:
            return
        sequence.text = text
        sequence.finish_reason, sequence.stop_reason = stop.finish_reason, stop.stop_reason
        self._scheduler.finish(sequence)
        self._scheduler.lengths.record(sequence.num_prompt, sequence.num_output)
        if sequence.request.finished:
            self._deliver(sequence.request)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request, with all its completions, for the error of one."""
        if request.finished:
            return
        for sequence in request.sequences:
            # What it computed may be what is wrong.
            self._scheduler.blocks.evict(sequence.table.blocks)
        request.error = str(error)
        request.error_code = "invalid_grammar" if isinstance(error, GrammarError) else "generation_failed"
        self._end(request, "error")

    def abort(self, request_id: str) -> None:
        """End a request now, wherever it is. Unknown ids are ignored."""
        request = self._unfinished.get(request_id)
        if request is not None:
            self._end(request, "abort")

    def progress(self, request_id: str) -> list[CompletionProgress]:
        """What each completion of an unfinished request has generated; empty where it is finished or unknown."""
        request = self._unfinished.get(request_id)
        return [] if request is None else request.progress()

    def take_outputs(self) -> list[RequestOutput]:
        """The outputs of the requests that finished since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def put_back(self, outputs: list[RequestOutput]) -> None:
        """Keep outputs for the next `take_outputs`, before all others."""
        self._outputs = outputs + self._outputs

    def check(self) -> None:
        """Audit; raises AssertionError."""
        unfinished = sum(not s.finished for request in self._unfinished.values() for s in request.sequences)
        scheduler = self._scheduler
        if unfinished != len(scheduler.running) + len(scheduler.waiting) + self._grammars.num_sequences:
            raise AssertionError("a request's sequence is neither running nor waiting nor compiling")

    def _schedule(self, request: Request) -> None:
        for sequence in request.sequences:
            self._scheduler.add(sequence)

    def _end(self, request: Request, reason: FinishReason) -> None:
        """End all unfinished sequences of a request."""
        self._grammars.discard(request)
        for sequence in request.sequences:
            if sequence.finished:
                continue
            self._scheduler.finish(sequence)
            sequence.finish_reason = reason
            try:
                sequence.text, _ = self._detokenizer.read(sequence, None)
            except Exception as error:  # noqa: BLE001 - the tokens are there, and the reason too
                request.error = request.error or f"the completion could not be read: {error}"
        self._deliver(request)

    def _deliver(self, request: Request) -> None:
        del self._unfinished[request.request_id]
        output = request.output()
        self.num_finished[output.finish_reason] += 1
        self._outputs.append(output)
