"""The engines of a worker that serves several models in turn: at most one of them has requests.

    switch thread   load each once, the first named last ─▶ on_ready ─▶ wait for `switch` ─▶ make room, load ─▶ …
    claim loop      while no line runs: switch(model); nothing is claimed until that model is the present one

An engine whose turn ends stays loaded where memory allows, and its thread waits. With one model this is one engine.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from engine.execution.host_memory import resident_memory, return_freed_memory
from engine.execution.memory_budget import free_memory
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import ClaimToken
from jobs.requests import ModelLimits
from worker.generation.engine_thread import EngineCallbacks, EngineThread, LoadEngine
from worker.generation.engine_totals import IDLE, add_counters
from worker.generation.live import LiveAnswers
from worker.generation.vital_thread import OnCrash, VitalThread

if TYPE_CHECKING:
    from engine.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ROOM = 2.0  # times a model's size that must be free for it beside those that stay: its KV cache takes half of the rest


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by the name that clients ask for it by."""

    name: str
    load: LoadEngine
    may_stay: bool = False
    """Whether its engine may stay in main memory while another one runs."""


@dataclass(slots=True)
class _Known:
    """What the first load of a model told, and what its engines did."""

    limits: ModelLimits
    tokenizer: Tokenizer | None
    load_seconds: float
    size: int  # bytes of this process's memory
    totals: Mapping[str, Any]  # of engines that were unloaded


class EngineRoster:
    """Loads, switches and unloads engines from a thread of its own, so that no claim or heartbeat waits for a load.

    To the rest of the worker it is the present engine; between two there is none, and nothing can be submitted.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        callbacks: Callable[[str], EngineCallbacks],
        *,
        on_ready: Callable[[Sequence[ModelLimits]], None],
        on_switched: Callable[[str], None],
        on_crash: OnCrash,
        share_prefixes: bool,
        times_lines: bool = True,
        live: LiveAnswers | None = None,
        kept_bytes: int | None = None,
    ) -> None:
        """`callbacks` gives those of a model's engine, but `on_loaded`. `on_ready` is told the limits of all models,
        the present one first. Engines that wait may keep `kept_bytes` of memory; None: what is free.
        """
        self._models = {model.name: model for model in models}
        self._callbacks = callbacks
        self._on_ready = on_ready
        self._on_switched = on_switched
        self._share_prefixes = share_prefixes
        self._times_lines = times_lines
        self._live = live
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        # Guarded by _lock; the order of _loaded is that of their last turns.
        self._loaded: dict[str, EngineThread] = {}
        self._known: dict[str, _Known] = {}
        self._turn = models[0].name
        self._has_begun = False  # the turn: its model is loaded, and takes requests
        self._is_closing = False
        # Names to switch to, and what ends a wait: a load's end (True), a broken engine (False), the close (None).
        self._wanted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._load_ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = VitalThread("models", self._run, on_crash)

    def start(self) -> None:
        """Begin to load. Returns at once."""
        self._thread.start()

    # Which model

    @property
    def names(self) -> list[str]:
        """All models, the one that is served first at the head."""
        return list(self._models)

    @property
    def turn(self) -> str:
        """The model whose turn it is, which may still have to be loaded."""
        return self._turn

    @property
    def present(self) -> str | None:
        """The model whose turn it is, once it takes requests; None between two."""
        with self._lock:
            return self._turn if self._has_begun else None

    def switch_to(self, model: str) -> None:
        """End the present model's turn, of which nothing may be left running, and begin that of another. Returns at
        once: until the other is loaded there is no present one."""
        with self._lock:
            self._turn, self._has_begun = model, False
        self._wanted.put(model)

    def switch_cost(self, model: str) -> float:
        """Seconds that a turn of another model costs: loading it, and the present one again; 0 where both stay."""
        with self._lock:
            if model in self._loaded:
                return 0.0
            return sum(self._known[name].load_seconds for name in (model, self._turn))

    # Of any model

    def tokenizer(self, model: str) -> Tokenizer | None:
        """The tokenizer of a model that was loaded once, which threads may share."""
        with self._lock:
            return self._known[model].tokenizer if model in self._known else None

    def load_seconds(self) -> dict[str, float]:
        """How long the last load of each model took."""
        with self._lock:
            return {name: known.load_seconds for name, known in self._known.items()}

    def loaded(self) -> set[str]:
        """The models that are loaded now."""
        with self._lock:
            return set(self._loaded)

    def stats_by_model(self) -> dict[str, dict[str, Any]]:
        """Each model's counters over all its engines, and its gauges; only models that were loaded once."""
        with self._lock:
            engines = {name: (self._loaded.get(name), known.totals) for name, known in self._known.items()}
        return {
            name: add_counters(IDLE if engine is None else engine.stats(), totals)
            for name, (engine, totals) in engines.items()
        }

    def stats(self) -> dict[str, Any]:
        """The gauges of the present engine, and the counters of all models together; empty before one is loaded."""
        present, found = self.present, self.stats_by_model()
        if not found:
            return {}
        whole = dict(found.pop(present)) if present in found else dict(IDLE)
        for stats in found.values():
            whole = add_counters(whole, stats)
        return whole

    # The present engine

    def free_capacity(self) -> int:
        """See `EngineThread`, as of all that follow; 0 between two models."""
        engine = self._engine()
        return 0 if engine is None else engine.free_capacity()

    def live_capacity(self) -> int:
        engine = self._engine()
        return 0 if engine is None else engine.live_capacity()

    def held(self) -> list[ClaimedRequest]:
        return [request for engine in self._engines() for request in engine.held()]

    def submit(self, requests: Sequence[ClaimedRequest]) -> Sequence[ClaimedRequest]:
        engine = self._engine()
        return list(requests) if engine is None else engine.submit(requests)

    def abort(self, requests: Sequence[ClaimedRequest]) -> None:
        for engine in self._engines():
            engine.abort(requests)

    def abort_job(self, job_id: UUID) -> None:
        for engine in self._engines():
            engine.abort_job(job_id)

    def stalled_for(self) -> float:
        """Seconds since the step that is under way began. A load is no step, however long it takes."""
        return max((engine.stalled_for() for engine in self._engines()), default=0.0)

    def in_preparation(self) -> list[ClaimToken]:
        return [token for engine in self._engines() for token in engine.in_preparation()]

    def suspects(self) -> list[ClaimToken]:
        return [token for engine in self._engines() for token in engine.suspects()]

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is held. False where an engine broke, or that took longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        return all(engine.drain(max(0.0, deadline - time.monotonic())) for engine in self._engines())

    def close(self) -> None:
        """Step no more. What is held stays unfinished, and a load that is under way is left."""
        with self._lock:
            self._is_closing = True
        self._wanted.put(None)
        self._load_ended.put(False)
        for engine in self._engines():
            engine.close()

    def _engine(self) -> EngineThread | None:
        with self._lock:
            return self._loaded[self._turn] if self._has_begun else None

    def _engines(self) -> list[EngineThread]:
        with self._lock:
            return list(self._loaded.values())

    # The switch thread

    def _run(self) -> None:
        first, *others = self._models
        for name in (*others, first):
            if not self._load(name):
                return
            if name != first:
                self._unload(name)
        with self._lock:
            limits = [self._known[name].limits for name in self._models]
            self._has_begun = True
        self._on_ready(limits)
        while (following := self._wanted.get()) is not None:
            name, began = following, time.monotonic()
            self._make_room(name)
            if name not in self._loaded and not self._load(name):
                return
            with self._lock:
                self._loaded[name] = self._loaded.pop(name)  # the last in the order of turns
                self._has_begun = True
            logger.info("switched to %s in %.1f s", name, time.monotonic() - began)
            self._on_switched(name)

    def _load(self, name: str) -> bool:
        """Load a model and wait for it. False where it cannot be loaded, or this worker ends."""
        callbacks = self._callbacks(name)

        def on_fatal(error: BaseException, *, is_understood: bool) -> None:
            self._load_ended.put(False)
            callbacks.on_fatal(error, is_understood=is_understood)

        engine = EngineThread(
            self._models[name].load,
            replace(callbacks, on_loaded=lambda limits: self._load_ended.put(True), on_fatal=on_fatal),
            model=name,
            share_prefixes=self._share_prefixes,
            times_lines=self._times_lines,
            live=self._live,
        )
        with self._lock:
            if self._is_closing:
                return False
            began, before = time.monotonic(), resident_memory()
            self._loaded[name] = engine
            engine.start()
        if not self._load_ended.get() or self._is_closing:
            return False
        limits = engine.limits
        assert limits is not None
        seconds, size = time.monotonic() - began, max(0, resident_memory() - before)
        with self._lock:
            known = self._known.get(name)
            self._known[name] = _Known(
                limits,
                engine.tokenizer,
                seconds,
                size if known is None else max(size, known.size),
                {} if known is None else known.totals,
            )
        logger.info(
            "%s is loaded: context %d, vocabulary %d, in %.1f s", name, limits.max_model_len, limits.vocab_size, seconds
        )
        return True

    def _make_room(self, name: str) -> None:
        """Unload what cannot stay beside a model, the one whose turn ended first first."""
        for other in [loaded for loaded in self._loaded if loaded != name]:
            if not self._models[other].may_stay or not self._has_room(name):
                self._unload(other)

    def _has_room(self, name: str) -> bool:
        """Whether `name` can run beside all other engines that are loaded."""
        with self._lock:
            kept = sum(self._known[other].size for other in self._loaded if other != name)
            needed = 0 if name in self._loaded else ROOM * self._known[name].size
        return free_memory() >= needed and (self._kept_bytes is None or kept <= self._kept_bytes)

    def _unload(self, name: str) -> None:
        """End a model's engine and give its memory back; its counters stay."""
        engine = self._loaded[name]
        engine.close()
        with self._lock:
            known = self._known[name]
            known.totals = add_counters(known.totals, self._loaded.pop(name).stats())
        del engine
        return_freed_memory()
        logger.info("%s is unloaded", name)
