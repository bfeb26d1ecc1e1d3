"""`pagemill up`: everything at once, on servers of its own, with a tiny model of random weights."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from cli.client import Client, Submission
from cli.running import FILE, Running, with_running
from cli.stack import RunningStack, running_stack
from cli.up import up
from jobs.settings import Settings
from migrations.run import upgrade
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE, await_condition, await_gone, family

MODEL = "tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Llama of a few thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    directory = tmp_path_factory.mktemp("models") / MODEL
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data_dir = tmp_path_factory.mktemp("stack") / "with a space"
    return Settings(data_dir=data_dir, port=0, drain_deadline=0.5, poll_interval=0.2)


@pytest.fixture(scope="module")
def stack(settings: Settings, model: Path) -> Iterator[RunningStack]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)  # a worker as users have it, with a thread for each core
        with running_stack(settings, [str(model)]) as stack:
            yield stack
            processes = family(stack.pids().values())
    await_gone(processes)


def _run_a_job(stack: RunningStack, directory: Path) -> None:
    lines = directory / "lines.jsonl"
    lines.write_text('{"prompt": [5, 6, 7], "max_tokens": 4}\n' * 10)
    with closing(Client(stack.base_url, stack.api_key)) as client:
        job = client.submit(lines, Submission(model=MODEL))
        job = client.job(job["id"], wait=60)
        assert job["status"] == "completed"
        assert job["request_counts"]["completed"] == 10
        assert len(list(client.results(job["id"]))) == 10


def test_job_runs_through_every_process(stack: RunningStack, tmp_path: Path) -> None:
    assert {"postgres", "valkey", "api", "courier", "worker"} == set(stack.pids())
    _run_a_job(stack, tmp_path)


def test_other_commands_find_the_running_stack(stack: RunningStack, settings: Settings) -> None:
    found = with_running(settings)
    assert (found.url, found.database_url, found.redis_url) == (stack.base_url, stack.database_url, stack.redis_url)
    for secret in (FILE, "api_key"):
        assert stat.S_IMODE((settings.data_dir / secret).stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["api", "worker", "postgres", "valkey"])
def test_stack_restarts_a_killed_child(stack: RunningStack, tmp_path: Path, name: str) -> None:
    killed = stack.pids()[name]
    os.kill(killed, signal.SIGKILL)
    await_condition(lambda: stack.pids().get(name, killed) != killed, f"another {name}")
    await_condition(lambda: _is_ready(stack.base_url), "the API is ready again")
    _run_a_job(stack, tmp_path)


def _is_ready(base_url: str) -> bool:
    with closing(http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=5)) as connection, suppress(OSError):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    return False


def test_second_up_names_the_service_that_runs(
    stack: RunningStack, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    taken = settings.model_copy(update={"port": urlsplit(stack.base_url).port})
    assert up(taken, []) == 1
    told = capfd.readouterr().err
    assert f"Pagemill already runs on {settings.data_dir} (process {os.getpid()})" in told
    assert stack.base_url in told


def test_log_of_postgres_holds_no_words_of_callers(stack: RunningStack, settings: Settings) -> None:
    words = "a-name-from-a-caller"
    with psycopg.connect(stack.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE TEMPORARY TABLE lines (custom_id text PRIMARY KEY)")
        for _ in range(2):
            with suppress(psycopg.errors.UniqueViolation):
                connection.execute("INSERT INTO lines VALUES (%s)", (words,))
        with suppress(psycopg.errors.UndefinedTable):
            connection.execute(f"SELECT '{words}' FROM lost")  # type: ignore[arg-type]
    log = settings.data_dir / "logs" / "postgres.log"
    await_condition(lambda: 'relation "lost" does not exist' in log.read_text(), "the second error")
    assert "duplicate key value" in log.read_text()
    assert words not in log.read_text()


def _commands(section: str) -> str:
    """The indented lines of docs/operations.md between the paragraph that begins with `section` and the next one."""
    text = (REPOSITORY / "docs" / "operations.md").read_text().partition(f"**{section}.**")[2].partition("\n**")[0]
    return "\n".join(line.strip() for line in text.splitlines() if line.startswith("    "))


def test_documented_backup_commands_restore_the_data(stack: RunningStack, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / ".pagemill").symlink_to(settings.data_dir)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", _commands("Backups")],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "pagemill.pepper").read_text() == (settings.data_dir / "pepper").read_text()
    url = stack.database_url.replace("+psycopg", "")
    counted = []
    for database in ("/pagemill?", "/restored?"):
        with psycopg.connect(url.replace("/pagemill?", database)) as connection:
            counted.append(
                connection.execute("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM api_keys)").fetchone()
            )
    assert counted[0] == counted[1]
    assert counted[0] is not None
    assert counted[0][1] > 0


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a..b"])
def test_foreign_host_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], host: str) -> None:
    assert up(Settings(data_dir=tmp_path / "data", host=host, port=0), []) == 1
    told = capfd.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    assert host in told
    assert "--host" in told
    assert not (tmp_path / "data").exists()


def _start_up(settings: Settings, model: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cli", "up", "--port", "0", "--model", str(model)),
            *("--data-dir", str(settings.data_dir)),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Pagemill serves on http://127.0.0.1:"):
            return process, family([process.pid])
    raise AssertionError(f"up ended with {process.wait()}")


def test_up_ends_with_all_its_processes(tmp_path: Path, model: Path) -> None:
    """By kill -9; and then, on what that left behind, by Ctrl-C."""
    settings = Settings(data_dir=tmp_path / "up")
    killed, processes = _start_up(settings, model)
    with killed:
        assert len(processes) >= 6
        killed.kill()
        await_gone(processes)
    assert Running.read(settings.data_dir) is not None

    stopped, processes = _start_up(settings, model)
    with stopped:
        stopped.send_signal(signal.SIGINT)
        stopped.communicate(timeout=PATIENCE)
        assert stopped.returncode == 0
        await_gone(processes)
    assert Running.read(settings.data_dir) is None


def test_up_stops_while_postgres_makes_its_cluster(tmp_path: Path, model: Path) -> None:
    command = [sys.executable, "-m", "cli", "up", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--model", str(model)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        postgres = tmp_path / "data" / "postgres"
        await_condition((postgres / "cluster.partial").exists, "initdb")
        processes = family([process.pid])
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=PATIENCE)
    assert (process.returncode, complaints) == (0, "")
    await_gone(processes)
    # It came to its end, and the next start goes on from there; nothing is left of this one.
    assert sorted(path.name for path in postgres.iterdir()) == ["cluster"]


def test_up_stops_while_tables_are_made(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The signal takes Postgres away from the migrations: they fail, and that is no failure."""
    before = family([os.getpid()])
    started: list[psutil.Process] = []

    def upgrade_in_vain(database_url: str) -> None:
        started.extend(process for process in family([os.getpid()]) if process not in before)
        os.kill(os.getpid(), signal.SIGTERM)
        await_condition(lambda: not (postgres / "postmaster.pid").exists(), "Postgres is gone")
        upgrade(database_url)

    postgres = tmp_path / "data" / "postgres" / "cluster"
    monkeypatch.setattr("cli.stack.upgrade", upgrade_in_vain)
    assert up(Settings(data_dir=tmp_path / "data", port=0), [str(model)]) == 0
    assert started
    assert capfd.readouterr().err == ""
    await_gone(started)


def test_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "cli", "up", "--data-dir", str(tmp_path / "data"), "--port", str(port)]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
    assert "--port 0" in result.stderr
    assert not (tmp_path / "data").exists()


def test_model_that_cannot_be_loaded_is_named(tmp_path: Path, database_url: str, redis_url: str) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "cli", "up", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    result = subprocess.run(
        [*command, "--model", str(tmp_path / "empty")],
        cwd=REPOSITORY,
        env={**os.environ, "PAGEMILL_DATABASE_URL": database_url, "PAGEMILL_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 1
    assert "worker ended with status" in result.stderr
    assert str(tmp_path / "empty") in result.stderr
