"""A supervisor of child processes.

with Supervisor(log) as supervisor:
    supervisor.start(database, broker)     # a group starts together; returns once every child is ready
    supervisor.start(api, worker)          # the next group
    supervisor.wait()                      # until a stop is requested
                                           # leaving: groups stop in reverse order
"""

# A child that cannot be started the first time is its starter's error. One that was ready and dies is started again for
# as long as the supervisor lives, later each time: no child's death ends the others. The kernel sends children a signal
# when the supervisor dies, even by kill -9 (`cli.launcher`).
#
# One thread, the monitor, owns all children: it starts, signals and reaps them, and everything that happens reaches it
# through one queue. It lives as long as the supervisor, which the parent-death signal relies on.

from __future__ import annotations

import collections
import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from cli.child_logs import ChildLog
from cli.launcher import OURSELVES, Identity, launch_command

POLL_INTERVAL = 0.05  # seconds between two looks at a readiness condition
LONGEST_LINE = 64 * 1024  # bytes; a longer one is cut into several
KEEPS_DYING = 5  # deaths in a row after which the log says so
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Child:
    """How to run one process. Durations are seconds."""

    name: str
    argv: Sequence[str]  # argv[0] is an absolute path
    ready: Callable[[int], bool]  # told the pid; True once the process serves
    environment: Mapping[str, str] | None = None  # complete; None: ours
    directory: str | os.PathLike[str] | None = None
    identity: Identity = OURSELVES
    before_start: Callable[[], None] | None = None  # also before each restart
    ready_timeout: float = 60.0
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL  # sent by the kernel when the supervisor dies
    grace: float = 10.0  # between stop_signal and SIGKILL
    may_end: bool = False  # ended with status 0, it was asked to, and is not started again


@dataclass(frozen=True)
class RestartPolicy:
    """When a child that died is started again. Durations are seconds."""

    first_delay: float = 0.25  # doubles with each death in a row
    longest_delay: float = 30.0
    steady_after: float = 15.0  # a child that lives this long beyond the time that its first start took ends the row

    def delay(self, deaths: int) -> float:
        """Seconds between the `deaths`-th death in a row and the next start."""
        # The exponent is bounded, because a float overflows after 1,024 deaths.
        return min(self.first_delay * 2.0 ** min(deaths - 1, 32), self.longest_delay)


class StopRequested(Exception):
    """A stop was requested while children were being started."""


class ChildFailed(RuntimeError):
    """A child did not become ready. The message ends with the last lines that it wrote."""

    def __init__(self, name: str, what: str, last_lines: Sequence[str]) -> None:
        written = "".join(f"\n  {line}" for line in last_lines)
        super().__init__(f"{name} {what}" + (f". Its last lines:{written}" if written else " and wrote nothing."))
        self.name = name
        self.last_lines = tuple(last_lines)


@dataclass(eq=False)
class _Life:
    """A child and its present process."""

    child: Child
    process: subprocess.Popen[bytes]
    started: float  # monotonic
    last_lines: collections.deque[str]
    exited: threading.Event
    pump: threading.Thread
    adopted: bool = False  # it was ready once; before that its death is reported, not mended
    startup: float = 0.0  # seconds that the first start took until the child was ready
    deaths: int = 0  # in a row
    restart_at: float | None = None  # monotonic; set while it waits to be started again
    ending: bool = False
    retired: bool = False  # it ended as it was asked to, and stays away
    kill_at: float | None = None  # monotonic; set while it has its grace


_Group = list[_Life]


@dataclass
class _Start:
    children: Sequence[Child]
    reply: Future[_Group]


@dataclass
class _Adopt:
    group: _Group


@dataclass
class _End:
    group: _Group


@dataclass
class _Exited:
    life: _Life


@dataclass
class _Stop:
    hurry: bool


@dataclass
class _Close:
    """The owner leaves: nothing is asked for after this."""


class Supervisor:
    """See the module. Serves one `with` block."""

    def __init__(self, log: ChildLog, restart: RestartPolicy | None = None, pass_fds: Sequence[int] = ()) -> None:
        """`pass_fds` stay open in every child, e.g. a lock to be held until the last one is gone."""
        self._log = log
        self._restart = restart or RestartPolicy()
        self._pass_fds = tuple(pass_fds)
        # SimpleQueue.put may be called in a signal handler, where a lock could be held by the interrupted code.
        self._inbox: queue.SimpleQueue[_Start | _Adopt | _End | _Exited | _Stop | _Close] = queue.SimpleQueue()
        self._groups: list[_Group] = []
        self._closing = False
        self._stopping = False
        self._hurry = False
        self._stop_requested = threading.Event()
        # A daemon: an interpreter that ends without leaving the `with` block must not wait for it; the kernel then
        # sends every child its death signal.
        self._monitor = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._monitor.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._inbox.put(_Close())
        self._monitor.join()

    # --- the owner's side

    def start(self, *children: Child) -> None:
        """Start a group of children together, and wait until each is ready.

        Raises ChildFailed if one dies before that or takes longer than its `ready_timeout`; the group is ended then.
        Raises StopRequested if a stop is requested before that.
        """
        reply: Future[_Group] = Future()
        self._inbox.put(_Start(children, reply))
        group = reply.result()
        try:
            self._await_ready(group)
        except BaseException:
            self._inbox.put(_End(group))
            for life in group:
                life.exited.wait()
            raise
        self._inbox.put(_Adopt(group))

    def pids(self) -> dict[str, int]:
        """The present process of each child, by name. One that waits to be started again is missing."""
        lives = [life for group in list(self._groups) for life in list(group)]
        return {life.child.name: life.process.pid for life in lives if not life.exited.is_set()}

    def all_ended(self) -> bool:
        """Whether every child that was started has ended as it was asked to."""
        return all(life.retired for group in list(self._groups) for life in list(group))

    def wait(self, timeout: float | None = None) -> bool:
        """Block until a stop is requested (True) or `timeout` seconds are over (False)."""
        return self._stop_requested.wait(timeout)

    @contextlib.contextmanager
    def stopping_explains(self, *errors: type[Exception]) -> Iterator[None]:
        """Raise StopRequested instead of `errors` once a stop is requested: they then mean that children are gone."""
        try:
            yield
        except errors as error:
            if self.wait(0):
                raise StopRequested from error
            raise

    def request_stop(self, *, hurry: bool = False) -> None:
        """Ask for everything to stop, and return at once. In a hurry, no child gets its grace.

        Safe in a signal handler.
        """
        self._inbox.put(_Stop(hurry))

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """In the main thread: SIGINT, SIGTERM and SIGHUP ask for a stop, a second one for a quick one.

        An ignored SIGHUP stays ignored, because `nohup` asked for that.
        """

        def handle(number: int, frame: object) -> None:
            self.request_stop(hurry=self._stop_requested.is_set())

        handled = [number for number in STOP_SIGNALS if not _is_ignored_hangup(number)]
        previous = {number: signal.signal(number, handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _await_ready(self, group: _Group) -> None:
        waiting = list(group)
        while waiting:
            for life in list(waiting):
                child = life.child
                if life.exited.is_set():
                    life.pump.join(timeout=1.0)
                    raise ChildFailed(
                        child.name, f"{_ending(life.process.returncode)} before it was ready", life.last_lines
                    )
                if child.ready(life.process.pid):
                    life.startup = time.monotonic() - life.started
                    waiting.remove(life)
                elif time.monotonic() - life.started > child.ready_timeout:
                    raise ChildFailed(child.name, f"was not ready within {child.ready_timeout:g} s", life.last_lines)
            if self._stop_requested.wait(POLL_INTERVAL if waiting else 0):
                raise StopRequested

    # --- the monitor's side

    def _run(self) -> None:
        while not self._closing or self._groups:
            try:
                message = self._inbox.get(timeout=self._seconds_to_deadline())
            except queue.Empty:
                pass
            else:
                self._handle(message)
            self._meet_deadlines()
            self._remove_gone_groups()
            if self._stopping:
                self._end_last_group()

    def _remove_gone_groups(self) -> None:
        self._groups = [group for group in self._groups if not all(_gone(life) for life in group)]

    def _end_last_group(self) -> None:
        """End the group that was started last. One without a running process is gone at once, and the next is next."""
        while self._groups:
            last = self._groups[-1]
            for life in last:
                self._end(life)
            self._remove_gone_groups()
            if self._groups and self._groups[-1] is last:
                return

    def _handle(self, message: _Start | _Adopt | _End | _Exited | _Stop | _Close) -> None:
        match message:
            case _Start(children, reply):
                self._start_group(children, reply)
            case _Adopt(group):
                for life in group:
                    life.adopted = True
                    if life.exited.is_set():
                        self._after_end(life, _ending(life.process.returncode))
            case _End(group):
                for life in group:
                    self._end(life)
            case _Exited(life):
                self._reap(life)
                if life.adopted and not life.ending and not self._stopping:
                    self._after_end(life, _ending(life.process.returncode))
            case _Stop(hurry):
                self._stop(hurry)
            case _Close():
                self._closing = True
                self._stop(hurry=False)

    def _start_group(self, children: Sequence[Child], reply: Future[_Group]) -> None:
        if self._stopping:
            reply.set_exception(StopRequested())
            return
        group: _Group = []
        self._groups.append(group)
        try:
            for child in children:
                group.append(self._spawn(child))
        except Exception as error:  # noqa: BLE001 - handed to the thread that asked
            for life in group:
                self._end(life)
            reply.set_exception(error)
        else:
            reply.set_result(group)

    def _spawn(self, child: Child, life: _Life | None = None) -> _Life:
        """Start a child, or start it again in the same life."""
        if child.before_start is not None:
            child.before_start()
        process = subprocess.Popen(
            launch_command(child.argv, death_signal=child.death_signal, identity=child.identity),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=child.directory,
            env=child.environment,
            pass_fds=self._pass_fds,
            # Ctrl-C in a terminal reaches the whole foreground group. Children leave it: the order of stopping is ours.
            start_new_session=True,
        )
        last_lines: collections.deque[str] = collections.deque(maxlen=12)
        pump = threading.Thread(target=self._pump, args=(child.name, process, last_lines), daemon=True)
        if life is None:
            life = _Life(child, process, time.monotonic(), last_lines, threading.Event(), pump)
        else:
            life.process, life.started, life.last_lines, life.pump = process, time.monotonic(), last_lines, pump
            life.restart_at = None
            life.exited.clear()
        pump.start()
        threading.Thread(target=self._await_exit, args=(life, process.pid), daemon=True).start()
        return life

    def _pump(self, name: str, process: subprocess.Popen[bytes], last_lines: collections.deque[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for raw in iter(lambda: lines.readline(LONGEST_LINE), b""):
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                last_lines.append(line)
                self._log.write(name, line)

    def _await_exit(self, life: _Life, pid: int) -> None:
        # Not reaped here: the pid must stay ours until the monitor, which signals it, knows of its end.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._inbox.put(_Exited(life))

    def _reap(self, life: _Life) -> None:
        _kill_group(life)  # what the child itself started and left behind
        life.process.wait()
        life.kill_at = None
        life.exited.set()

    def _after_end(self, life: _Life, what: str) -> None:
        """A child that was ready has ended: start it again, unless it was asked to end."""
        if life.child.may_end and life.process.returncode == 0:
            life.retired = True
            self._log.write(life.child.name, "[supervisor] ended as it was asked to, and is not started again")
        else:
            self._mend(life, what)

    def _mend(self, life: _Life, what: str) -> None:
        """A child died, or could not be started again: see to its next start."""
        if time.monotonic() - life.started >= life.startup + self._restart.steady_after:
            life.deaths = 0
        life.deaths += 1
        delay = self._restart.delay(life.deaths)
        again = f", {life.deaths} times in a row" if life.deaths > 1 else ""
        self._log.write(life.child.name, f"[supervisor] {what}{again}; it is started again in {delay:g} s")
        if life.deaths == KEEPS_DYING:
            self._log.write(
                life.child.name,
                "[supervisor] keeps dying; the other processes go on without it. The reason is in the lines above.",
            )
        life.restart_at = time.monotonic() + delay

    def _end(self, life: _Life) -> None:
        if life.ending:
            return
        life.ending = True
        life.restart_at = None
        if not life.exited.is_set():
            life.process.send_signal(life.child.stop_signal)
            life.kill_at = time.monotonic() + (0.0 if self._hurry else life.child.grace)

    def _stop(self, hurry: bool) -> None:
        self._stopping = True
        self._stop_requested.set()
        if hurry and not self._hurry:
            self._hurry = True
            for life in self._lives():
                life.kill_at = life.kill_at and time.monotonic()

    def _lives(self) -> Iterator[_Life]:
        return (life for group in self._groups for life in group)

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [
            deadline for life in self._lives() for deadline in (life.restart_at, life.kill_at) if deadline is not None
        ]
        return max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None

    def _meet_deadlines(self) -> None:
        now = time.monotonic()
        for life in list(self._lives()):
            if life.kill_at is not None and life.kill_at <= now:
                life.kill_at = None
                if not self._hurry:
                    self._log.write(
                        life.child.name, f"[supervisor] did not end within {life.child.grace:g} s and is killed"
                    )
                _kill_group(life)
            if life.restart_at is not None and life.restart_at <= now:
                life.restart_at = None
                life.started = now
                try:
                    self._spawn(life.child, life)
                except Exception as error:  # noqa: BLE001 - counted as a death
                    self._mend(life, f"could not be started: {error}")


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _gone(life: _Life) -> bool:
    return life.ending and life.exited.is_set()


def _kill_group(life: _Life) -> None:
    # Children lead a process group of their own. Its id is ours while the child is not reaped.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(life.process.pid, signal.SIGKILL)


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"
