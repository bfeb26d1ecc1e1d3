"""The supervisor, with real processes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cli.child_logs import ChildLog
from cli.launcher import CANNOT_LAUNCH, OURSELVES, Identity, launch_command
from cli.supervisor import Child, ChildFailed, RestartPolicy, StopRequested, Supervisor
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE, await_condition, await_gone, family

QUICK = RestartPolicy(first_delay=0.01, longest_delay=0.05, steady_after=60.0)
NOBODY = (65534, 65534)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def supervisor(lines: io.StringIO) -> Iterator[Supervisor]:
    with Supervisor(ChildLog(None, lines), QUICK) as supervisor:
        yield supervisor


def shell(name: str, script: str, *, ready: Callable[[int], bool] = lambda pid: True, grace: float = 10.0) -> Child:
    """A child that runs a shell script, started in an instant."""
    return Child(name, ["/bin/sh", "-c", script], ready, grace=grace)


def is_there(path: Path) -> Callable[[int], bool]:
    return lambda pid: path.exists()


def test_group_starts_once_the_one_before_is_ready(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(
        shell("first", f"sleep 0.2; touch {tmp_path}/ready; exec sleep 600", ready=is_there(tmp_path / "ready"))
    )
    supervisor.start(
        shell("second", f"ls {tmp_path} > {tmp_path}/seen; exec sleep 600", ready=is_there(tmp_path / "seen")),
    )
    await_condition(lambda: "ready" in (tmp_path / "seen").read_text(), "second saw first ready")
    assert list(supervisor.pids()) == ["first", "second"]


def test_groups_stop_in_reverse_order(lines: io.StringIO, tmp_path: Path) -> None:
    order = tmp_path / "order"

    def child(name: str) -> Child:
        ready = tmp_path / name
        script = f"trap 'echo {name} >> {order}; exit 0' TERM; touch {ready}; while :; do sleep 0.01; done"
        return shell(name, script, ready=is_there(ready))

    with Supervisor(ChildLog(None, lines), QUICK) as supervisor:
        supervisor.start(child("database"))
        supervisor.start(child("api"), child("worker"))
        supervisor.start(child("extra"))
        processes = family(supervisor.pids().values())
    await_gone(processes)
    stopped = order.read_text().split()
    assert (stopped[0], {*stopped[1:3]}, stopped[3]) == ("extra", {"api", "worker"}, "database")


def test_child_that_dies_is_started_again(supervisor: Supervisor, lines: io.StringIO) -> None:
    supervisor.start(shell("worker", "exec sleep 600"))
    first = supervisor.pids()["worker"]
    os.kill(first, signal.SIGKILL)
    await_condition(lambda: supervisor.pids().get("worker", first) != first, "a new process")
    assert "was ended by SIGKILL; it is started again in 0.01 s" in lines.getvalue()
    assert supervisor.wait(timeout=0) is False


def test_processes_left_by_a_dead_child_are_ended(supervisor: Supervisor, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    supervisor.start(
        shell(
            "worker",
            f"sleep 600 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait",
            ready=is_there(pid_file),
        )
    )
    orphan = psutil.Process(int(pid_file.read_text()))
    os.kill(supervisor.pids()["worker"], signal.SIGKILL)
    await_gone([orphan])


def test_child_that_keeps_dying_ends_no_other(supervisor: Supervisor, lines: io.StringIO, tmp_path: Path) -> None:
    other = tmp_path / "other"
    supervisor.start(shell("other", f"touch {other}; exec sleep 600", ready=is_there(other)))
    pid = supervisor.pids()["other"]
    # It lives until it is killed, however long `start` takes to look at it; from then on it dies at once.
    broken = tmp_path / "broken"
    supervisor.start(shell("worker", f"test -e {broken} || exec sleep 600; echo no model here; exit 7"))
    broken.touch()
    os.kill(supervisor.pids()["worker"], signal.SIGKILL)
    await_condition(lambda: "7 times in a row" in lines.getvalue(), "seven deaths")
    written = lines.getvalue()
    assert "[supervisor] ended with status 7, 6 times in a row; it is started again in 0.05 s" in written
    assert written.count("keeps dying; the other processes go on without it") == 1
    assert supervisor.wait(timeout=0) is False
    assert supervisor.pids()["other"] == pid
    supervisor.start(shell("late", "exec sleep 600"))


def test_restart_is_retried_when_a_child_cannot_be_started(
    supervisor: Supervisor, lines: io.StringIO, tmp_path: Path
) -> None:
    obstacle = tmp_path / "obstacle"

    def refuse() -> None:
        if obstacle.exists():
            raise RuntimeError("no room")

    supervisor.start(Child("server", ["/bin/sleep", "600"], lambda pid: True, before_start=refuse))
    obstacle.touch()
    os.kill(supervisor.pids()["server"], signal.SIGKILL)
    await_condition(lambda: "could not be started: no room, 4 times in a row" in lines.getvalue(), "four tries")
    obstacle.unlink()
    await_condition(lambda: "server" in supervisor.pids(), "a new process")


def test_restart_delay_is_reset_after_a_steady_run(lines: io.StringIO) -> None:
    policy = RestartPolicy(first_delay=0.01, longest_delay=60.0, steady_after=0.0)
    with Supervisor(ChildLog(None, lines), policy) as supervisor:
        began = time.monotonic()
        supervisor.start(shell("worker", "exec sleep 600"))
        startup = time.monotonic() - began  # at least what the supervisor measured
        for _ in range(4):
            pid = supervisor.pids()["worker"]
            os.kill(pid, signal.SIGKILL)
            await_condition(lambda pid=pid: supervisor.pids().get("worker", pid) != pid, "a new process")  # type: ignore[misc]
            steady = time.monotonic() + startup
            await_condition(lambda steady=steady: time.monotonic() >= steady, "a run as long as the first start")  # type: ignore[misc]
    assert "in a row" not in lines.getvalue()


def test_stop_does_not_wait_for_a_pending_restart(lines: io.StringIO, tmp_path: Path) -> None:
    policy = RestartPolicy(first_delay=600.0, longest_delay=600.0)
    with Supervisor(ChildLog(None, lines), policy) as supervisor:
        for name in ("database", "worker"):
            supervisor.start(shell(name, "exec sleep 600"))
            os.kill(supervisor.pids()[name], signal.SIGKILL)
        await_condition(lambda: lines.getvalue().count("started again in 600 s") == 2, "both wait")


def test_slow_start_does_not_reset_the_restart_delay(lines: io.StringIO, tmp_path: Path) -> None:
    """A child that dies each time as soon as it has loaded must not be started again and again without a pause."""
    first = tmp_path / "first"
    loads = f"sleep 0.3; test -e {first} && exit 3; touch {first}; exec sleep 600"
    policy = RestartPolicy(first_delay=0.01, longest_delay=0.01, steady_after=0.2)
    with Supervisor(ChildLog(None, lines), policy) as supervisor:
        supervisor.start(shell("worker", loads, ready=is_there(first)))
        os.kill(supervisor.pids()["worker"], signal.SIGKILL)
        await_condition(lambda: "status 3, 3 times in a row" in lines.getvalue(), "three deaths")


def test_restart_delay_doubles_up_to_a_limit() -> None:
    policy = RestartPolicy(first_delay=0.25, longest_delay=3.0)
    assert [policy.delay(deaths) for deaths in (1, 2, 3, 4, 5, 6, 5000)] == [0.25, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_start_fails_at_once_when_a_child_exits_before_it_is_ready(supervisor: Supervisor) -> None:
    with pytest.raises(ChildFailed) as failure:
        supervisor.start(
            shell("bad", "echo cannot read it >&2; exit 5", ready=lambda pid: False),
            shell("good", "exec sleep 600", ready=lambda pid: True),
        )
    assert str(failure.value) == "bad ended with status 5 before it was ready. Its last lines:\n  cannot read it"
    assert supervisor.pids() == {}
    supervisor.start(shell("another", "exec sleep 600"))


def test_start_fails_when_a_child_is_not_ready_in_time(supervisor: Supervisor) -> None:
    slow = Child("slow", ["/bin/sleep", "600"], lambda pid: False, ready_timeout=0.1)
    with pytest.raises(ChildFailed, match=r"slow was not ready within 0.1 s and wrote nothing"):
        supervisor.start(slow)
    assert supervisor.pids() == {}


def test_start_fails_when_the_program_does_not_exist(supervisor: Supervisor) -> None:
    with pytest.raises(ChildFailed, match="cannot execute /nowhere/program"):
        supervisor.start(Child("lost", ["/nowhere/program"], lambda pid: False))


def test_failing_hook_is_raised_where_the_child_was_started(supervisor: Supervisor) -> None:
    def refuse() -> None:
        raise RuntimeError("in use by another")

    with pytest.raises(RuntimeError, match="in use by another"):
        supervisor.start(Child("child", ["/bin/true"], lambda pid: True, before_start=refuse))


def test_child_that_ignores_the_signal_is_killed_after_its_grace(lines: io.StringIO, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with Supervisor(ChildLog(None, lines), QUICK) as supervisor:
        script = f"trap '' TERM; touch {ready}; while :; do sleep 0.01; done"
        supervisor.start(shell("stubborn", script, ready=is_there(ready), grace=0.2))
        processes = family(supervisor.pids().values())
    await_gone(processes)
    assert "did not end within 0.2 s and is killed" in lines.getvalue()


def test_hurried_stop_grants_no_grace_period(lines: io.StringIO, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with Supervisor(ChildLog(None, lines), QUICK) as supervisor:
        script = f"trap '' TERM; touch {ready}; while :; do sleep 0.01; done"
        supervisor.start(shell("stubborn", script, ready=is_there(ready), grace=600))
        supervisor.request_stop()
        assert supervisor.wait(timeout=PATIENCE)
        supervisor.request_stop(hurry=True)


def test_stop_interrupts_the_wait_for_readiness(supervisor: Supervisor) -> None:
    threading.Timer(0.1, supervisor.request_stop).start()
    with pytest.raises(StopRequested):
        supervisor.start(Child("slow", ["/bin/sleep", "600"], lambda pid: False))
    assert supervisor.wait(timeout=0) is True


def test_child_runs_with_its_environment_and_directory(
    supervisor: Supervisor, lines: io.StringIO, tmp_path: Path
) -> None:
    child = Child(
        "child",
        ["/bin/sh", "-c", 'echo "$PWD $COLOUR"; exec sleep 600'],
        lambda pid: "blue" in lines.getvalue(),
        environment={"COLOUR": "blue"},
        directory=tmp_path,
    )
    supervisor.start(child)
    assert f"{tmp_path} blue" in lines.getvalue()


def test_child_log_labels_and_keeps_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = ChildLog(tmp_path / "logs", stream, colour=True)
    with Supervisor(log, QUICK) as supervisor:
        script = f"echo hello; printf 'bad byte \\377' >&2; touch {tmp_path}/said; exec sleep 600"
        supervisor.start(shell("api", script, ready=is_there(tmp_path / "said")))
        await_condition(lambda: "hello" in stream.getvalue(), "a line")
    # What is no whole line is written when the child is gone.
    await_condition(lambda: "bad byte �\n" in stream.getvalue(), "the rest")
    log.close()
    assert "\x1b[36mapi       | \x1b[0mhello\n" in stream.getvalue()
    assert (tmp_path / "logs" / "api.log").read_text() == "hello\nbad byte �\n"


def test_child_log_continues_when_the_terminal_closes(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as stream:
        log = ChildLog(tmp_path, stream)
        log.write("api", "one")
        log.write("api", "two")
        log.close()
    assert (tmp_path / "api.log").read_text() == "one\ntwo\n"


SUPERVISE = """
import signal
import sys
from cli.child_logs import ChildLog
from cli.launcher import Identity
from cli.supervisor import Child, Supervisor

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
stubborn = "trap '' TERM INT HUP; echo started; while :; do sleep 0.05; done"
with Supervisor(ChildLog(None, sys.stdout)) as supervisor, supervisor.stop_on_signals():
    supervisor.start(
        Child("polite", ["/bin/sleep", "600"], lambda pid: True),
        Child("stubborn", ["/bin/sh", "-c", stubborn], lambda pid: True, identity={identity!r}, grace=0.2),
    )
    print("ready", flush=True)
    supervisor.wait()
    print("stopping", flush=True)
"""


@pytest.fixture(
    params=[
        OURSELVES,
        pytest.param(Identity(namespace=NOBODY), marks=needs_root),
        pytest.param(Identity(user=NOBODY), marks=needs_root),
    ],
    ids=["ourselves", "namespace", "another-user"],
)
def supervising(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A supervisor process with two children; one refuses to end. For each identity that a child may have."""
    code = SUPERVISE.format(identity=request.param)
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = set[str]()
        while not {"ready", "stubborn  | started"} <= seen:
            line = process.stdout.readline()
            assert line, "the supervisor ended"
            seen.add(line.rstrip())
        yield process
        process.kill()


def test_kill_9_of_the_supervisor_ends_every_child(supervising: subprocess.Popen[str]) -> None:
    children = psutil.Process(supervising.pid).children()
    assert len(children) == 2
    supervising.kill()
    await_gone(children)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_every_child(supervising: subprocess.Popen[str], number: signal.Signals) -> None:
    processes = family([supervising.pid])
    supervising.send_signal(number)
    output, _ = supervising.communicate(timeout=PATIENCE)
    assert supervising.returncode == 0
    assert "stopping" in output
    await_gone(processes)


def test_ignored_hangup_stays_ignored(lines: io.StringIO) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Supervisor(ChildLog(None, lines), QUICK) as supervisor, supervisor.stop_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert supervisor.wait(timeout=0) is False
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_child_whose_parent_died_first_does_not_start() -> None:
    """The launcher looks for its parent after it asked for the signal: no moment lies between the two."""
    command = launch_command(["/bin/sleep", "600"])
    orphaned = [f"--parent={os.getppid()}" if word.startswith("--parent=") else word for word in command]
    assert subprocess.run(orphaned, timeout=PATIENCE).returncode == CANNOT_LAUNCH
    assert subprocess.run(launch_command(["/bin/true"]), timeout=PATIENCE).returncode == 0
