"""compose.yaml and the Dockerfile name only what there is: commands, settings, build targets, services, volumes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
import yaml

from cli.main import app
from cli.stack import STOP_MARGIN, WORKER_STOP_MARGIN
from jobs.settings import Settings
from tests.support.paths import REPOSITORY
from worker.courier import process as courier
from worker.generation import service

COMPOSE_TEXT = (REPOSITORY / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_TEXT)["services"]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
SETTINGS = {f"PAGEMILL_{name.upper()}" for name in Settings.model_fields}
OURS = {"migrate", "api", "courier", "worker"}


def _commands() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_compose_has_every_process() -> None:
    assert set(SERVICES) == OURS | {"postgres", "redis"}
    for name in OURS:
        assert SERVICES[name]["command"] == [name]
        assert name in _commands()


@pytest.mark.parametrize("text", [COMPOSE_TEXT, DOCKERFILE], ids=["compose.yaml", "Dockerfile"])
def test_compose_variables_are_settings(text: str) -> None:
    named = set(re.findall(r"\bPAGEMILL_[A-Z_]*[A-Z]\b", text))
    assert named
    assert named <= SETTINGS


def test_compose_environment_makes_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        for variable, value in SERVICES[name]["environment"].items():
            # As Compose fills it in where nothing is set: ${NAME:-default}, and a key of the operator's own.
            filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
            monkeypatch.setenv(variable, re.sub(r"\$\{\w+:\?[^}]*\}", "a-secret-of-twenty-four-c", filled))
        settings = Settings()
        assert settings.database_url == "postgresql://pagemill:pagemill@postgres:5432/pagemill"
        assert settings.redis_url == "redis://redis:6379/0"


def test_images_are_built_from_targets_that_exist() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    targets = {name: SERVICES[name]["build"]["target"] for name in OURS}
    assert set(targets.values()) <= stages
    assert {name for name, target in targets.items() if target == "worker"} == {"worker"}
    slim = DOCKERFILE.partition("AS build-service")[2].partition("FROM ")[0]
    assert "pip install -c constraints.txt .\n" in slim, "the slim image installs no extra, so no torch"


def test_worker_s_image_has_what_triton_compiles_its_driver_with() -> None:
    worker = DOCKERFILE.partition("FROM runtime AS worker")[2].partition("FROM ")[0]
    assert {"gcc", "libc6-dev"} <= set(worker.split())


def test_containers_do_not_run_as_root() -> None:
    runtime = DOCKERFILE.partition("AS runtime")[2]
    for stage in re.split(r"^FROM runtime AS ", runtime, flags=re.MULTILINE):
        # Root may install something on the way; whom a stage ends with is whom it runs as, or else the runtime's user.
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1:] in ([], ["pagemill"])
    assert re.findall(r"^USER (\S+)$", runtime.partition("FROM ")[0], re.MULTILINE) == ["pagemill"]


def test_migrate_and_api_share_the_pepper() -> None:
    assert SERVICES["migrate"]["volumes"] == ["secrets:/data"]
    assert "secrets:/data" in SERVICES["api"]["volumes"]


def test_api_and_courier_share_the_files() -> None:
    for name in ("api", "courier"):
        assert "files:/files" in SERVICES[name]["volumes"]
        assert SERVICES[name]["environment"]["PAGEMILL_FILES_URL"] == "file:///files"
    assert "install -d -o pagemill -g pagemill -m 0700 /data /files" in DOCKERFILE


def test_services_wait_for_what_they_need() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in OURS - {"migrate"}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        for needed, how in SERVICES[name]["depends_on"].items():
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[needed]


def test_docker_waits_for_the_work_to_finish() -> None:
    grace = {name: int(str(SERVICES[name].get("stop_grace_period", "10s")).removesuffix("s")) for name in OURS}
    assert grace["worker"] > Settings.model_fields["drain_deadline"].default + 20


def test_stop_grace_periods_exceed_the_end_deadlines() -> None:
    grace = float(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_deadline"].default + service.END_WITHIN
    assert WORKER_STOP_MARGIN > service.END_WITHIN
    assert STOP_MARGIN > courier.END_WITHIN
