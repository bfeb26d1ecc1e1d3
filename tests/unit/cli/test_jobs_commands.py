"""submit, watch and results, as typed at a terminal, against a service in trouble."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.commands.following import Pace, describe
from cli.main import app
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE, await_condition
from tests.unit.cli.scripted_service import UNAVAILABLE, Reply, ScriptedService, job

KEY = "a-key-of-sixteen-characters"
MODELS = Reply.of({"data": [{"id": "demo"}]})


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return file


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGEMILL_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PAGEMILL_API_KEY", KEY)


def run(service: ScriptedService, *arguments: str, given: bytes | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    result = CliRunner().invoke(app, arguments, env={"PAGEMILL_URL": service.url}, input=given)
    return result.exit_code, result.stdout, result.stderr


def test_submit_waits_through_an_outage_and_writes_every_result(lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    cut = Reply(b'{"seq": 1}\n', promised=100)
    replies = [
        MODELS,
        Reply.of(job("queued", opened=2), 202),
        UNAVAILABLE,
        Reply.of(job()),
        cut,
        Reply(b'{"seq": 2}\n'),
    ]
    with ScriptedService.serving(replies) as service:
        status, _, told = run(service, "submit", str(lines), "-o", str(output))
    assert status == 0, told
    assert output.read_text() == '{"seq": 1}\n{"seq": 2}\n'
    assert "Postgres is away" in told
    assert "The service answers again." in told


def test_submit_sends_its_options(lines: Path) -> None:
    options = ["--temperature", "0.5", "--max-tokens", "9", "--priority", "-3", "--window", "24h", "-p", "stop=a=b"]
    with ScriptedService.serving([Reply.of(job(), 202)]) as service:
        assert run(service, "submit", str(lines), "-m", "demo", *options)[0] == 0
    query = service.received[0].path.partition("?")[2]
    assert query == "model=demo&temperature=0.5&max_tokens=9&priority=-3&completion_window=24h&stop=a%3Db"


@pytest.mark.parametrize(
    ("options", "complaint"), [(["--window", "24 hours"], "e.g. 30m, 24h or 7d"), (["--param", "top_p"], "NAME=VALUE")]
)
def test_submit_explains_a_malformed_option(lines: Path, options: list[str], complaint: str) -> None:
    with ScriptedService.serving([Reply.of(job())]) as service:
        status, _, told = run(service, "submit", str(lines), "-m", "demo", *options)
    assert status == 2
    assert complaint in " ".join(told.replace("│", "").split())  # in a box, wrapped
    assert not service.received


def test_submit_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    with ScriptedService.serving([Reply.of(job())]) as service:
        status, _, told = run(service, "submit", str(tmp_path / "lost.jsonl"), "-m", "demo")
    assert (status, told) == (1, f"{tmp_path}/lost.jsonl: No such file or directory\n")
    assert not service.received


def test_submit_reads_standard_input() -> None:
    with ScriptedService.serving([Reply.of(job(), 202)]) as service:
        status, shown, _ = run(service, "submit", "-", "-m", "demo", given=b'{"prompt": "a"}\n')
    assert (status, shown) == (0, "job_1\n")
    assert service.received[0].body == b'{"prompt": "a"}\n'


@pytest.mark.parametrize("name", ["missing/out.jsonl", "."])
def test_submit_refuses_an_unwritable_output_before_the_job(lines: Path, tmp_path: Path, name: str) -> None:
    with ScriptedService.serving([Reply.of(job())]) as service:
        status, _, told = run(service, "submit", str(lines), "-m", "demo", "-o", str(tmp_path / name))
    assert status == 1
    assert len(told.splitlines()) == 1
    assert str(tmp_path) in told
    assert not service.received


@pytest.mark.parametrize("command", ["watch", "submit"])
def test_interrupted_wait_says_that_the_job_goes_on(lines: Path, command: str) -> None:
    arguments = {"watch": ["watch", "job_1"], "submit": ["submit", str(lines), "-m", "demo", "--wait"]}[command]
    with ScriptedService.serving([Reply.of(job("in_progress", opened=1))]) as service:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PAGEMILL_URL": service.url},
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background process ignores SIGINT, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        )
        with process:
            await_condition(lambda: len(service.received) > 3, "polls")
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "job_1 goes on. `pagemill watch job_1` waits for it" in told


def test_results_end_quietly_when_their_reader_does() -> None:
    many = Reply(b'{"seq": 1}\n' * 50_000)
    with ScriptedService.serving([many]) as service:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "results", "job_1"],
            cwd=REPOSITORY,
            env={**os.environ, "PAGEMILL_URL": service.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""


@pytest.mark.parametrize(("failed", "status"), [(0, 0), (1, 1)])
def test_watch_follows_many_jobs_and_fails_where_a_line_did(failed: int, status: int) -> None:
    good, other = job(), job(failed=failed) | {"id": "job_2"}
    replies = [Reply.of(job("in_progress", opened=2)), Reply.of(other), *[Reply.of(good), Reply.of(other)] * 2]
    with ScriptedService.serving(replies) as service:
        found, shown, told = run(service, "watch", "job_1", "job_2", "--json")
    assert found == status
    assert [json.loads(line)["id"] for line in shown.splitlines()] == ["job_1", "job_2"]
    assert f"job_2 completed: {2 - failed} completed, {failed} failed" in told


def test_watch_fails_where_a_job_was_cancelled() -> None:
    with ScriptedService.serving([Reply.of(job("cancelled"))]) as service:
        assert run(service, "watch", "job_1")[0] == 1


@pytest.mark.parametrize("command", [["status"], ["cancel"], ["watch"]])
def test_json_is_one_object_a_line(command: list[str]) -> None:
    with ScriptedService.serving([Reply.of(job())]) as service:
        status, shown, _ = run(service, *command, "job_1", "--json")
    assert (status, json.loads(shown)) == (0, job())
    assert len(shown.splitlines()) == 1


def test_results_resume_behind_the_last_whole_line(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"seq": 1}\n{"seq": 2}\n{"seq": 3, "cut')
    with ScriptedService.serving([Reply(b'{"seq": 3}\n{"seq": 4}\n')]) as service:
        assert run(service, "results", "job_1", "-o", str(output), "--resume")[0] == 0
    assert service.received[0].path.endswith("/v1/jobs/job_1/results?after=2")
    assert [json.loads(line)["seq"] for line in output.read_text().splitlines()] == [1, 2, 3, 4]


def test_results_resume_leaves_a_file_of_something_else_alone(tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_text("my notes\n")
    with ScriptedService.serving([Reply(b"")]) as service:
        status, _, told = run(service, "results", "job_1", "-o", str(output), "--resume")
    assert status == 1
    assert "does not end with a result" in told
    assert output.read_text() == "my notes\n"


def test_results_follow_until_the_job_has_ended() -> None:
    running, ended = job("in_progress", opened=1) | {"last_seq": 1}, job(failed=1) | {"last_seq": 2}
    replies = [Reply.of(running), Reply(b'{"seq": 1}\n'), Reply.of(ended), Reply(b'{"seq": 2}\n')]
    with ScriptedService.serving(replies) as service:
        status, shown, _ = run(service, "results", "job_1", "--follow")
    assert (status, shown) == (1, '{"seq": 1}\n{"seq": 2}\n')
    assert [request.path for request in service.received if "results" in request.path] == [
        "/v1/jobs/job_1/results?after=0",
        "/v1/jobs/job_1/results?after=1",
    ]


def test_pace_tells_lines_tokens_and_the_time_that_is_left() -> None:
    pace = Pace()
    for second in range(100):
        seen = job("in_progress", opened=0) | {"usage": {"completion_tokens": 50 * second}}
        counts = {"total": 1000, "open": 1000 - 10 * second, "failed": 3}
        pace.add(seen | {"request_counts": counts}, float(second))
    told = describe(seen | {"request_counts": counts}, pace)
    assert told == "10 lines/s · 50 tokens/s · [red]3 failed[/red] · ETA 0:00:01"


def test_retry_prints_the_new_jobs_id_and_follows_it() -> None:
    child = job("queued", opened=1) | {"id": "job_child"}
    with ScriptedService.serving([Reply.of(child, 202), Reply.of(job() | {"id": "job_child"})]) as service:
        status, shown, told = run(service, "retry", "job_parent", "--state", "failed", "--state", "truncated", "--wait")
        assert (status, shown) == (0, "job_child\n"), told
    asked = service.received[0]
    assert (asked.method, asked.path) == ("POST", "/v1/jobs/job_parent/retry")
    assert json.loads(asked.body) == {"state": ["failed", "truncated"]}


def test_retry_by_state_and_kind_at_once_is_refused() -> None:
    with ScriptedService.serving([]) as service:
        assert run(service, "retry", "job_parent", "--state", "failed", "--fingerprint", "v1:0")[0] == 2
        assert run(service, "retry", "job_parent", "--state", "completed")[0] == 2
