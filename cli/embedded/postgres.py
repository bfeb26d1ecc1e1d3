"""An embedded Postgres: a real server from the pip package's programs, private to one data directory."""

# Its cluster is made once, with password authentication only, and kept. It listens on a Unix socket in a private
# directory under the temporary directory, on no port: nothing to collide with, and nothing that other users reach.
#
# Postgres refuses to run as root. As root it therefore runs in a user namespace in which root appears as an ordinary
# user; where the kernel or a container forbids namespaces, as the user `nobody`, with a copy of the programs if that
# user cannot read ours. Either way it is started inside its data directory and told that this is `/proc/self/cwd`:
# then the parents of the data directory, a 0700 /root say, need not be passable for it.

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy.engine import URL

from cli.data_dir import write_private
from cli.embedded.binaries import POSTGRES_MAJOR, PostgresBinaries, find_postgres
from cli.embedded.errors import OUTSIDE_SERVICES, EmbeddedServiceError
from cli.launcher import CANNOT_LAUNCH, OURSELVES, Identity, launch_command
from cli.supervisor import Child

SUPERUSER = "pagemill"
DATABASE = "pagemill"
PORT = 5432  # only the name of the socket
RUN_DIRECTORY_PREFIX = "pagemill-pg-"
SOCKET_PATH_LIMIT = 107  # bytes, unix(7)
# Postgres opens its own working directory by this name, at any depth and behind any parents.
HERE = "/proc/self/cwd"
PID_FILE_LINES = 8  # of postmaster.pid; the first is the pid, the last the status (utils/pidfile.h)
RECOVERY_TIMEOUT = 600.0  # seconds; after a crash the log is replayed before anyone may connect

SERVER_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": str(PORT),
    "max_connections": "100",
    "shared_buffers": "128MB",
    # One server without replicas: less to write.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # Parallel plans pass tuples through /dev/shm, of which a container has 64 MB.
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "",
    "log_checkpoints": "off",
    # Callers' words stay out of the log: no statements, and no DETAIL such as "Key (custom_id)=(…) already exists".
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}
# Safe against a crash of Postgres, not against one of the machine: for throw-away servers of tests.
UNSAFE_SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedPostgres:
    """The server of one directory: `with EmbeddedPostgres(...) as server`, then run `server.child()` until it has
    ended, and call `server.create_database()` once it is ready.

    Entering finds out how Postgres can run here, and makes the cluster if there is none; it raises EmbeddedServiceError
    where that cannot be.
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        """`durable=False` forgoes fsync: only for data that may be lost."""
        self._directory = directory
        self._cluster = directory / "cluster"
        self._durable = durable
        self._run_directory: Path | None = None
        self._identity = OURSELVES
        self._binaries: PostgresBinaries | None = None

    @property
    def url(self) -> str:
        """For SQLAlchemy with psycopg 3."""
        return URL.create(
            "postgresql+psycopg",
            username=SUPERUSER,
            password=self._password(),
            database=DATABASE,
            query={"host": str(self._run), "port": str(PORT)},
        ).render_as_string(hide_password=False)

    def __enter__(self) -> EmbeddedPostgres:
        try:
            self._prepare()
        except BaseException:
            self._remove_run_directory()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove_run_directory()

    def child(self) -> Child:
        assert self._binaries is not None, "entered first"
        settings = SERVER_SETTINGS | ({} if self._durable else UNSAFE_SETTINGS)
        settings["unix_socket_directories"] = str(self._run)
        options = [f"--{name}={value}" for name, value in settings.items()]
        return Child(
            name="postgres",
            argv=[str(self._binaries.postgres), "-D", HERE, *options],
            ready=self._accepts_connections,
            environment=_environment(),
            directory=self._cluster,
            identity=self._identity,
            before_start=self._remove_stale_pid_file,
            ready_timeout=RECOVERY_TIMEOUT,
            # Fast shutdown: ends sessions, writes a checkpoint.
            stop_signal=signal.SIGINT,
            death_signal=signal.SIGINT,
            grace=30.0,
        )

    def create_database(self) -> None:
        """Create our database, the first time."""
        with self._connect() as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
            if found is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))

    # --- how it is kept

    def _prepare(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_run_directory()
        self._identity, self._binaries, self._run_directory = _find_a_way(find_postgres())
        write_private(self._run_record, str(self._run_directory))
        version = self._cluster / "PG_VERSION"
        if not version.exists():
            self._make_cluster()
        elif (found := version.read_text().strip()) != str(POSTGRES_MAJOR):
            raise EmbeddedServiceError(
                f"{self._cluster} was written by PostgreSQL {found}, and the installed one is {POSTGRES_MAJOR}. "
                "Dump it with the old version and restore it here, or choose another data directory."
            )
        self._own(self._cluster)

    @property
    def _run(self) -> Path:
        assert self._run_directory is not None, "entered first"
        return self._run_directory

    @property
    def _pid_file(self) -> Path:
        return self._cluster / "postmaster.pid"

    @property
    def _run_record(self) -> Path:
        return self._directory / "run_directory"

    def _remove_run_directory(self) -> None:
        """Ours, or that of an earlier run which was killed."""
        try:
            recorded = Path(self._run_record.read_text())
        except FileNotFoundError:
            return
        if recorded.name.startswith(RUN_DIRECTORY_PREFIX):
            shutil.rmtree(recorded, ignore_errors=True)
        self._run_record.unlink()

    def _password(self) -> str:
        path = self._cluster / "password"
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            raise EmbeddedServiceError(
                f"{path} is gone, and with it the password of the database beside it. Restore it from a backup, or "
                f"move {self._cluster} away and start with an empty one."
            ) from None

    def _make_cluster(self) -> None:
        """Run initdb beside the final place and move the result there: a cluster is whole or does not exist."""
        assert self._binaries is not None
        partial = self._directory / "cluster.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        self._own(partial)
        password = secrets.token_urlsafe(24)
        password_file = self._run / "password"
        write_private(password_file, password)
        self._own(self._run)
        command = [
            *(str(self._binaries.initdb), "--pgdata", HERE),
            *("--username", SUPERUSER, "--auth", "scram-sha-256", "--pwfile", str(password_file)),
            # The same order of text everywhere, independent of the locales that the machine has.
            *("--encoding", "UTF8", "--no-locale", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
            *([] if self._durable else ["--no-sync"]),
        ]
        result = subprocess.run(
            launch_command(command, identity=self._identity),
            cwd=partial,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C is meant for us: we stop when this is done.
            start_new_session=True,
        )
        password_file.unlink()
        if result.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            raise EmbeddedServiceError(_explain("Postgres could not make its database", self._directory, result.stdout))
        write_private(partial / "password", password)
        self._own(partial)
        partial.rename(self._cluster)

    def _own(self, root: Path) -> None:
        """Hand a tree to the user that Postgres runs as: as root it may run differently than the last time."""
        if os.geteuid() == 0:
            uid, gid = self._identity.file_owner
            for path in (root, *root.rglob("*")):
                os.chown(path, uid, gid, follow_symlinks=False)

    # --- how it is run

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host=str(self._run),
            port=PORT,
            user=SUPERUSER,
            password=self._password(),
            dbname="postgres",
            connect_timeout=5,
            autocommit=True,
        )

    def _accepts_connections(self, pid: int) -> bool:
        """What `pg_ctl start` waits for: the pid file is the server's own and says so. Asking by connecting would fill
        the log with refusals as long as a crash is recovered from."""
        try:
            lines = self._pid_file.read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= PID_FILE_LINES and lines[0] == str(pid) and lines[PID_FILE_LINES - 1].strip() == "ready"

    def _remove_stale_pid_file(self) -> None:
        """Postgres believes a pid file whose pid lives. After kill -9 and a reboot, or in the next container, that pid
        may be another process's. We hold the data directory's lock, so no server of ours runs; a foreign one is
        recognised by its working directory."""
        try:
            pid = int(self._pid_file.read_text().split("\n", 1)[0])
        except FileNotFoundError:
            return
        except ValueError:  # killed while it wrote the file
            pid = 0
        try:
            inside = os.path.samefile(f"/proc/{pid}/cwd", self._cluster)
        except OSError:  # no such process, or not one that we may look at
            inside = False
        if inside and _is_running(pid):
            raise EmbeddedServiceError(
                f"A Postgres that we did not start runs on {self._cluster}. Stop it with: kill -INT {pid}"
            )
        self._pid_file.unlink()


def _is_running(pid: int) -> bool:
    """False for a zombie too: it has ended, only its parent has not looked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _environment() -> dict[str, str]:
    """Ours, without what would steer Postgres' programs, and without our secrets."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PAGEMILL_"))}
    return inherited | {"LC_ALL": "C", "TZ": "UTC"}


# --- how it can run here


def _find_a_way(binaries: PostgresBinaries) -> tuple[Identity, PostgresBinaries, Path]:
    """Try the ways to run Postgres until one works; returns it with the directory for its socket."""
    attempts = []
    for identity in _identities():
        run_directory = _make_run_directory(identity)
        for candidate in (binaries, None):
            if candidate is None:
                if identity == OURSELVES:
                    continue
                candidate = binaries.copy_to(run_directory / "programs")
            result = subprocess.run(
                launch_command([str(candidate.postgres), "--version"], identity=identity),
                cwd="/",
                env=_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
            )
            if result.returncode == 0:
                return identity, candidate, run_directory
            attempts.append(f"{_describe(identity)}: {result.stderr.strip() or f'status {result.returncode}'}")
            if result.returncode == CANNOT_LAUNCH:
                break
        shutil.rmtree(run_directory, ignore_errors=True)
    raise EmbeddedServiceError(
        "Postgres cannot run here.\n  "
        + "\n  ".join(attempts)
        + f"\nRun Pagemill as an ordinary user, or on a distribution with glibc and zlib. {OUTSIDE_SERVICES}"
    )


def _identities() -> Iterator[Identity]:
    """Who Postgres may run as, best first: not root, and (for initdb) a user with a name in the user database."""
    ordinary = _ordinary_user()
    if os.geteuid() != 0 and _has_name(os.geteuid()):
        yield OURSELVES
    elif ordinary is not None:
        yield Identity(namespace=ordinary)
        if os.geteuid() == 0:
            yield Identity(user=ordinary)
    else:
        raise EmbeddedServiceError(
            f"Postgres must run as a user with a name, and /etc/passwd has none for the id {os.geteuid()}, nor any "
            f"but root's. Add one, e.g. with: useradd --uid {os.geteuid() or 1000} pagemill. {OUTSIDE_SERVICES}"
        )


def _ordinary_user() -> tuple[int, int] | None:
    users = {user.pw_name: (user.pw_uid, user.pw_gid) for user in pwd.getpwall() if user.pw_uid != 0}
    return users.get("nobody") or next(iter(users.values()), None)


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _make_run_directory(identity: Identity) -> Path:
    """A private directory with a short name, which the identity can reach."""
    uid, gid = identity.file_owner
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):
        longest = os.path.join(parent, RUN_DIRECTORY_PREFIX + "12345678", f".s.PGSQL.{PORT}.lock")
        if len(os.fsencode(longest)) > SOCKET_PATH_LIMIT or not _can_pass(Path(parent), uid):
            continue
        try:
            directory = Path(tempfile.mkdtemp(prefix=RUN_DIRECTORY_PREFIX, dir=parent))
        except OSError:
            continue
        if os.geteuid() == 0:
            os.chown(directory, uid, gid)
        return directory
    raise EmbeddedServiceError(
        "Postgres needs a short temporary directory for its socket, and none of "
        f"{tempfile.gettempdir()}, /tmp and /var/tmp can be written to by user {uid}. Mend it with: chmod 1777 /tmp"
    )


def _can_pass(directory: Path, uid: int) -> bool:
    """Whether a user without privileges may go through every directory down to this one."""
    resolved = directory.resolve()
    modes = [path.stat() for path in (resolved, *resolved.parents)]
    return all(mode.st_mode & (0o100 if mode.st_uid == uid else 0o001) for mode in modes)


def _describe(identity: Identity) -> str:
    if identity.user:
        return f"as user {identity.user[0]}"
    if identity.namespace:
        return "in a user namespace"
    return f"as user {os.geteuid()}"


def _explain(what: str, directory: Path, output: str) -> str:
    """A sentence with the remedy for what people meet most, then what the program said."""
    lowered = output.lower()
    if "no space left" in lowered or "disk quota" in lowered:
        free = shutil.disk_usage(directory).free // 2**20
        remedy = f"The disk of {directory} is full ({free} MiB free): make room, or choose another data directory."
    elif "read-only file system" in lowered:
        remedy = f"{directory} cannot be written to: choose another data directory."
    elif "permission" in lowered or "not permitted" in lowered:
        remedy = (
            f"The file system of {directory} does not keep owners and permissions (as shared folders of virtual "
            "machines do not), or they are wrong: choose a data directory on a local disk."
        )
    else:
        remedy = OUTSIDE_SERVICES
    return f"{what}. {remedy}\nIt said:\n" + "\n".join(f"  {line}" for line in output.strip().splitlines()[-12:])
