"""Settings travel to child processes through their environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from cli.stack import _children
from cli.worker_child import child_environment
from jobs.settings import Settings


def test_child_reads_the_settings_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_LEASE", "37.5")
    monkeypatch.setenv("PAGEMILL_DEVICE", "cpu")
    settings = Settings().model_copy(
        update={
            "data_dir": Path("/with a space"),
            "api_key": SecretStr("pm_secret"),
            "webhook_schedule": (0.0, 2.5),
            "webhook_allow_private": True,
            "device": "cuda",
            "database_url": "postgresql://u:p%2F%25@/db?host=%2Ftmp",
        }
    )
    environment = child_environment(settings)
    for name in [name for name in os.environ if name.startswith("PAGEMILL_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_unset_settings_are_left_to_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_TEST_DATABASE_URL", "not a setting")
    settings = Settings().model_copy(update={"port": 1})
    names = {name for name in child_environment(settings) if name.startswith("PAGEMILL_")}
    assert "PAGEMILL_PORT" in names
    assert "PAGEMILL_LEASE" not in names
    assert "PAGEMILL_TEST_DATABASE_URL" not in names


def test_metrics_port_differs_for_each_child() -> None:
    settings = Settings(
        metrics_port=9400, database_url="postgresql://u@127.0.0.1:1/name", redis_url="redis://127.0.0.1:1"
    )
    children = _children(settings, ["demo", "demo"])
    ports = {child.name: (child.environment or {}).get("PAGEMILL_METRICS_PORT") for child in children}
    assert {name: port for name, port in ports.items() if name != "api"} == {
        "courier": "9400",
        "worker": "9401",
        "worker-2": "9402",
    }
