"""`pagemill doctor` sees what is there, what is missing, and never falls over either."""

from __future__ import annotations

import importlib
import json
import socket
from pathlib import Path

import pytest

from cli import checkup
from cli.checkup import Check, Finding, Verdict, checks
from cli.commands.doctor import doctor
from cli.running import Running
from jobs.settings import Settings


def _find(settings: Settings, name: str) -> Finding:
    return next(check for check in checks(settings) if check.name == name).run()


@pytest.fixture
def settings(tmp_path: Path, database_url: str, redis_url: str) -> Settings:
    return Settings(data_dir=tmp_path / "data", port=0, database_url=database_url, redis_url=redis_url, model="demo")


def test_doctor_finds_nothing_on_a_complete_machine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PAGEMILL_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("PAGEMILL_PORT", "0")
    monkeypatch.setenv("PAGEMILL_DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("PAGEMILL_REDIS_URL", str(settings.redis_url))
    assert doctor() == 0
    printed = capsys.readouterr().out
    assert "✗" not in printed
    assert "is the newest" in printed
    assert doctor(as_json=True) == 0
    for line in capsys.readouterr().out.splitlines():
        assert json.loads(line)["verdict"] in ("good", "note")
    assert not settings.data_dir.exists(), "looking changes nothing"


def test_embedded_services_are_started_once(tmp_path: Path) -> None:
    found = _find(Settings(data_dir=tmp_path), "embedded services")
    assert found.verdict is Verdict.GOOD
    assert "Postgres and Valkey started" in found.detail


def test_doctor_exits_with_1_when_a_finding_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAGEMILL_DATA_DIR", str(tmp_path / "file" / "data"))
    monkeypatch.setattr("cli.commands.doctor.checks", lambda settings: checks(settings)[:5])
    assert doctor() == 1
    printed = capsys.readouterr().out
    assert "is not a directory" in printed
    assert "→ Choose another with --data-dir" in printed


def test_database_without_tables_is_a_note(settings: Settings, empty_database_url: str) -> None:
    found = checkup.postgres(empty_database_url)
    assert (found.verdict, "pagemill migrate" in found.mend) == (Verdict.NOTE, True)


def test_unanswering_servers_are_findings(tmp_path: Path) -> None:
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{unanswered.getsockname()[1]}"
        settings = Settings(
            data_dir=tmp_path, database_url=f"postgresql://user:secret@{at}/name", redis_url=f"redis://:secret@{at}/0"
        )
        for name in ("Postgres (PAGEMILL_DATABASE_URL)", "Redis (PAGEMILL_REDIS_URL)"):
            found = _find(settings, name)
            assert found.verdict is Verdict.BAD
            assert "secret" not in found.detail


def test_taken_port_is_a_finding(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = _find(Settings(data_dir=tmp_path, port=port), "API")
        assert (found.verdict, str(port) in found.detail) == (Verdict.BAD, True)


def test_killed_up_is_not_reported_as_running(tmp_path: Path) -> None:
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        Running(f"http://127.0.0.1:{unanswered.getsockname()[1]}", "", "").write(tmp_path)
        assert "nothing runs" in _find(Settings(data_dir=tmp_path, port=_free_port()), "API").detail


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_missing_packages_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkup._is_installed
    monkeypatch.setattr(checkup, "_is_installed", lambda name: name != "torch" and installed(name))
    found = checkup.packages("worker")
    assert (found.verdict, found.detail) == (Verdict.BAD, "missing: torch")
    assert ".[worker]" in found.mend
    assert checkup.packages("").verdict is Verdict.GOOD
    assert checkup.packages("embedded").verdict is Verdict.GOOD


def test_broken_installation_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = Check("devices", lambda: checkup.devices("auto")).run()
    assert found.verdict is Verdict.BAD
    assert "libcudart" in found.detail


def test_missing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.cpu.library as cpu

    def unavailable() -> None:
        raise cpu.CpuKernelsUnavailable("no C++ compiler is installed")

    monkeypatch.setattr(cpu, "library", unavailable)
    found = checkup.cpu_kernels()
    assert (found.verdict, "no C++ compiler" in found.detail) == (Verdict.NOTE, True)
    assert "g++" in found.mend


def test_missing_gpu_is_a_finding_when_configured() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert checkup.devices("cuda").verdict is Verdict.BAD
    assert checkup.devices("auto").verdict is Verdict.NOTE


def test_gpu_without_a_c_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles what speaks to the driver on the spot."""
    monkeypatch.setattr(checkup, "_is_installed", lambda name: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    found = checkup._for_triton("a GPU")
    assert (found.verdict, "no C compiler" in found.detail) == (Verdict.NOTE, True)
    monkeypatch.setenv("CC", "cc")
    assert checkup._for_triton("a GPU").verdict is Verdict.GOOD


@pytest.mark.parametrize("url", ["redis://:secret@127.0.0.1:1/0?hunter2=1", "redis://127.0.0.1:1/0?port=hunter2"])
def test_redis_finding_does_not_repeat_the_url(url: str) -> None:
    finding = checkup.redis(Settings(redis_url=url))
    assert finding.verdict == Verdict.BAD
    assert "hunter2" not in finding.detail + finding.mend
