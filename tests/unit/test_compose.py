"""compose.yaml and the Dockerfile name only what there is: commands, settings, build targets, services, volumes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
import yaml
from sqlalchemy.engine import make_url

from cli.main import app
from cli.stack import STOP_MARGIN
from cli.worker_child import WORKER_STOP_MARGIN
from jobs.settings import Settings
from tests.support.paths import REPOSITORY
from worker.courier import process as courier
from worker.generation import service

COMPOSE_TEXT = (REPOSITORY / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_TEXT)["services"]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
SETTINGS = {f"PAGEMILL_{name.upper()}" for name in Settings.model_fields}
OURS = {"migrate", "api", "courier", "worker", "worker-gpu"}


def _commands() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


OVERLAYS = {
    file.name: yaml.safe_load(file.read_text()) for file in sorted((REPOSITORY / "deploy/compose").glob("*.yaml"))
}
FROM_OUTSIDE = {"PAGEMILL_URL"}
"""Settings of the command line, which no container runs."""


def _commands() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _filled(value: object, **variables: str) -> str | None:
    """A value as Compose fills it in: ${NAME:-default}, ${NAME-default} and ${NAME?complaint}; None: not passed."""
    if value is None:
        return None
    return re.sub(r"\$\{(\w+)(?::?[-?]([^}]*))?\}", lambda found: variables.get(found[1], found[2] or ""), str(value))


def test_compose_has_every_process() -> None:
    assert set(SERVICES) == OURS | {"postgres", "redis"}
    for name in OURS:
        assert SERVICES[name]["command"] == [name.removesuffix("-gpu")]
        assert name.removesuffix("-gpu") in _commands()


@pytest.mark.parametrize("text", [COMPOSE_TEXT, DOCKERFILE], ids=["compose.yaml", "Dockerfile"])
def test_compose_variables_are_settings(text: str) -> None:
    named = set(re.findall(r"\bPAGEMILL_[A-Z_]*[A-Z]\b", text))
    assert named
    assert named <= SETTINGS


def test_every_setting_reaches_a_container() -> None:
    passed = {variable for name in OURS for variable in SERVICES[name]["environment"]}
    missing = SETTINGS - passed - FROM_OUTSIDE
    assert not missing, f"name {sorted(missing)} in compose.yaml, at the process that reads it"


@pytest.mark.parametrize("password", ["pagemill", "with / ? # @ : % in it"])
def test_compose_environment_makes_valid_settings(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        for variable, value in SERVICES[name]["environment"].items():
            filled = _filled(value, PAGEMILL_API_KEY="a-secret-of-twenty-four-c", POSTGRES_PASSWORD=password)
            if filled is not None:
                monkeypatch.setenv(variable, filled)
        settings = Settings()
        assert settings.database_url is not None
        url = make_url(settings.database_url)
        assert (url.username, url.password, url.host, url.database) == ("pagemill", password, "postgres", "pagemill")
        assert settings.redis_url == "redis://redis:6379/0"


def test_images_are_built_from_targets_that_exist() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    targets = {name: SERVICES[name]["build"]["target"] for name in OURS}
    assert set(targets.values()) <= stages
    assert {name: target for name, target in targets.items() if target != "service"} == {
        "worker": "worker",
        "worker-gpu": "worker-gpu",
    }
    libraries = DOCKERFILE.partition("AS libraries")[2].partition("FROM ")[0]
    assert "pip install -c constraints.txt -r /service.txt hatchling\n" in libraries, "no extra with torch"
    assert "python /requirements.py traces >/service.txt" in libraries


def test_images_are_pinned_to_a_version() -> None:
    images = [
        *re.findall(r"_IMAGE(?:=|:-)(\S+?)\}?$", DOCKERFILE + COMPOSE_TEXT, re.MULTILINE),
    ]
    assert len(images) == 4
    assert all(re.search(r":\d+\.\d+[.\w-]*$", image) for image in images), images


def test_gpu_image_has_what_triton_compiles_its_driver_with() -> None:
    worker = DOCKERFILE.partition("FROM runtime AS worker-gpu")[2].partition("FROM ")[0]
    assert {"gcc", "libc6-dev"} <= set(worker.split())


def test_gpu_worker_starts_with_its_profile_alone() -> None:
    assert {name for name in SERVICES if "profiles" in SERVICES[name]} == {"worker-gpu"}
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_no_container_runs_as_root() -> None:
    runtime = DOCKERFILE.partition("AS runtime")[2]
    for stage in re.split(r"^FROM runtime AS ", runtime, flags=re.MULTILINE):
        # Root may install something on the way; whom a stage ends with is whom it runs as, or else the runtime's user.
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1:] in ([], ["10001:10001"])
    assert re.findall(r"^USER (\S+)$", runtime.partition("FROM ")[0], re.MULTILINE) == ["10001:10001"]
    for name in OURS | {"redis"}:
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert SERVICES[name]["read_only"] is True


def test_build_context_leaves_out_what_a_checkout_collects() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    # `.*` stands for .git, .venv, .bench, .pagemill and the caches.
    assert {".*", "**/__pycache__/", "kernels/cpu/built/", "tests/", "docs/"} <= set(ignored)


def test_migrate_and_api_share_the_pepper() -> None:
    assert SERVICES["migrate"]["volumes"] == ["secrets:/data"]
    assert "secrets:/data" in SERVICES["api"]["volumes"]


def test_api_and_courier_share_the_files() -> None:
    for name in ("api", "courier"):
        assert "files:/files" in SERVICES[name]["volumes"]
        assert _filled(SERVICES[name]["environment"]["PAGEMILL_FILES_URL"]) == "file:///files"
    assert "install -d -o pagemill -g pagemill -m 0700 /data /files" in DOCKERFILE


def test_every_process_has_a_health_check_of_its_own() -> None:
    for name in set(SERVICES) - {"migrate"}:
        assert "healthcheck" in SERVICES[name]


def test_services_wait_for_what_they_need() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in OURS - {"migrate"}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        for needed, how in SERVICES[name]["depends_on"].items():
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[needed]


def test_docker_waits_for_the_work_to_finish() -> None:
    grace = {name: int(str(SERVICES[name].get("stop_grace_period", "10s")).removesuffix("s")) for name in OURS}
    assert grace["worker"] > Settings.model_fields["drain_deadline"].default + 20
    assert grace["courier"] > courier.END_WITHIN


def test_stop_grace_periods_exceed_the_end_deadlines() -> None:
    grace = float(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_deadline"].default + service.END_WITHIN
    assert WORKER_STOP_MARGIN > service.END_WITHIN
    assert STOP_MARGIN > courier.END_WITHIN


@pytest.mark.parametrize("name", ["hub.yaml", "secrets.yaml"])
def test_overlays_change_services_that_exist(name: str) -> None:
    assert set(OVERLAYS[name]["services"]) <= set(SERVICES)


def test_secrets_are_mounted_where_settings_look_for_them() -> None:
    secrets = OVERLAYS["secrets.yaml"]["secrets"]
    assert {name.upper() for name in secrets} <= SETTINGS
    for service_name, changed in OVERLAYS["secrets.yaml"]["services"].items():
        assert set(changed["secrets"]) <= set(secrets), service_name


def test_hub_s_redis_url_takes_the_password_that_redis_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = OVERLAYS["hub.yaml"]["services"]
    for name in ("api", "courier"):
        monkeypatch.setenv(
            "PAGEMILL_REDIS_URL",
            _filled(hub[name]["environment"]["PAGEMILL_REDIS_URL"], REDIS_PASSWORD="hunter2") or "",
        )
        assert Settings().redis_url == "redis://:hunter2@redis:6379/0"
    assert hub["redis"]["command"][-2:] == ["--requirepass", "${REDIS_PASSWORD}"]


def test_worker_host_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"HUB_ADDRESS": "10.0.0.1", "REDIS_PASSWORD": "hunter2", "POSTGRES_PASSWORD": "a/b"}
    for name, found in OVERLAYS["worker.yaml"]["services"].items():
        assert {variable for variable in found["environment"] if variable.startswith("PAGEMILL_")} <= SETTINGS, name
        for variable, value in found["environment"].items():
            filled = _filled(value, PAGEMILL_MODEL="org/name", **variables)
            if filled is not None:
                monkeypatch.setenv(variable, filled)
        settings = Settings()
        assert settings.database_url == "postgresql://pagemill:a%2Fb@10.0.0.1:5432/pagemill"
        assert settings.redis_url == "redis://:hunter2@10.0.0.1:6379/0"
