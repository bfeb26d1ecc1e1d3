"""compose.yaml for real: images built, containers up, jobs answered, a worker killed. Run by `make test-compose`.

Its name keeps it out of other test runs, since it needs Docker and minutes. What may be set, beside what compose.yaml
reads: `COMPOSE`, the command (`docker compose` or `docker-compose`, whichever is there); `PYTHON_IMAGE`,
`POSTGRES_IMAGE`, `VALKEY_IMAGE`, `CPU_TORCH_INDEX` and `BUILD_NETWORK`, where the public registries are out of reach.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from demo.tasks import mixed_holdout
from tests.support.paths import REPOSITORY
from tests.support.processes import await_condition

PATIENCE = 300.0  # seconds
LINES = 4000
LEASE = 6  # seconds, so that a killed worker is missed soon
USER = "10001:10001"

pytestmark = pytest.mark.timeout(3600)  # images are built from nothing


@dataclass(frozen=True)
class Compose:
    """A project of its own, on a free port."""

    command: Sequence[str]
    environment: dict[str, str]
    url: str
    key: str

    def run(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self.command, *arguments], env=self.environment, stdout=subprocess.PIPE, text=True, check=check
        )
        return done.stdout

    def containers(self, service: str) -> list[str]:
        """The ids of a service's containers."""
        return self.run("ps", "-q", service).split()

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=PATIENCE, trust_env=False
        )


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def inspect(container: str) -> dict[str, Any]:
    (found,) = json.loads(docker("inspect", container))
    assert isinstance(found, dict)
    return found


def compose_command() -> list[str]:
    """Compose 2 where Docker has it, else Compose 1."""
    if "COMPOSE" in os.environ:
        return shlex.split(os.environ["COMPOSE"])
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    return ["docker", "compose"] if has_plugin else ["docker-compose"]


def compose_file(command: Sequence[str], directory: Path) -> Path:
    """compose.yaml, for Compose 1 without the `name` that it does not know."""
    if command[-1] == "compose":
        return REPOSITORY / "compose.yaml"
    lines = (REPOSITORY / "compose.yaml").read_text().splitlines(keepends=True)
    copy = directory / "compose.yaml"
    copy.write_text("".join(line for line in lines if not line.startswith("name:")))
    return copy


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    command = compose_command()
    assert shutil.which(command[0]), "this test needs Docker with Compose"
    project = f"pagemill-test-{secrets.token_hex(4)}"
    file = compose_file(command, tmp_path_factory.mktemp("compose"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    key = secrets.token_hex(24)
    environment = os.environ | {
        "PAGEMILL_API_KEY": key,
        "PAGEMILL_PORT": str(port),
        "POSTGRES_PASSWORD": "a/b?c@d:e%f",  # to be percent-encoded in a URL
        "PAGEMILL_LEASE": str(LEASE),
        "PAGEMILL_FENCE_AFTER": "4",
        "PAGEMILL_HEARTBEAT_INTERVAL": "1",
        "PAGEMILL_SWEEP_INTERVAL": "1",
    }
    compose = Compose(
        [*command, "-p", project, "--project-directory", str(REPOSITORY), "-f", str(file)],
        environment,
        f"http://127.0.0.1:{port}",
        key,
    )
    compose.run("build")
    try:
        compose.run("up", "-d", "--no-build", "--scale", "worker=2")
        await_condition(lambda: is_serving(compose), "two workers that serve the demo model", timeout=PATIENCE)
        yield compose
    finally:
        if os.environ.get("KEEP_LOGS"):
            Path(os.environ["KEEP_LOGS"]).write_text(compose.run("logs", "--no-color", check=False))
        compose.run("down", "--volumes", "--timeout", "30")
        assert not docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={project}")


def is_serving(compose: Compose) -> bool:
    with compose.client() as client:
        try:
            models = client.get("/v1/models").json()["data"]
        except (httpx.TransportError, KeyError):
            return False
    return [(model["id"], model["live_workers"]) for model in models] == [("demo", 2)]


def test_every_container_becomes_healthy(stack: Compose) -> None:
    containers = [
        container
        for service in ("postgres", "redis", "api", "courier", "worker")
        for container in stack.containers(service)
    ]
    assert len(containers) == 6
    for container in containers:
        await_condition(
            lambda container=container: inspect(container)["State"]["Health"]["Status"] == "healthy",
            f"health of {inspect(container)['Name']}",
            timeout=PATIENCE,
        )


def test_no_process_of_ours_is_root_or_can_write_to_its_image(stack: Compose) -> None:
    for service in ("redis", "api", "courier", "worker"):
        for container in stack.containers(service):
            found = inspect(container)
            assert found["Config"]["User"] == USER
            assert found["HostConfig"]["ReadonlyRootfs"] is True
            processes = docker("top", container, "-eo", "pid,uid").splitlines()[1:]
            assert {process.split()[1] for process in processes} == {USER.partition(":")[0]}


def test_limits_reach_the_containers(stack: Compose) -> None:
    for service in ("redis", "api", "courier"):
        for container in stack.containers(service):
            assert inspect(container)["HostConfig"]["Memory"] > 0


def test_job_by_rest_is_answered(stack: Compose) -> None:
    examples = mixed_holdout(20, seed=5)
    body = {"model": "demo", "prompts": [example.prompt for example in examples], "params": {"max_tokens": 12}}
    with stack.client() as client:
        job = client.post("/v1/jobs", json=body | {"params": {"max_tokens": 12, "temperature": 0}}).json()
        assert client.get(f"/v1/jobs/{job['id']}", params={"wait": 60}).json()["status"] == "completed"
        lines = client.get(f"/v1/jobs/{job['id']}/results").text.splitlines()
    answers = [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in lines]
    assert sorted(answers) == sorted(example.answer for example in examples)


def test_openai_client_is_answered(stack: Compose) -> None:
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "demo", "prompt": example.prompt, "max_tokens": 12, "temperature": 0},
        }
        for number, example in enumerate(mixed_holdout(20, seed=6))
    ]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, timeout=PATIENCE) as client:
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("lines.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        await_condition(
            lambda: client.batches.retrieve(batch.id).output_file_id is not None, "output", timeout=PATIENCE
        )
        output = client.batches.retrieve(batch.id).output_file_id
        assert output is not None
        answers = {
            int(line["custom_id"]): line["response"]["body"]["choices"][0]["text"]
            for line in map(json.loads, client.files.content(output).text.splitlines())
        }
    expected = {number: example.answer for number, example in enumerate(mixed_holdout(20, seed=6))}
    assert answers == expected


def test_killed_worker_loses_nothing(stack: Compose) -> None:
    examples = 2 * mixed_holdout(LINES // 2, seed=7)  # more are not held out
    body = "\n".join(
        json.dumps({"custom_id": str(number), "prompt": example.prompt}) for number, example in enumerate(examples)
    )
    query = {"model": "demo", "max_tokens": 12, "temperature": 0}
    with stack.client() as client:
        began = time.monotonic()
        job = client.post(
            "/v1/jobs", params=query, content=body.encode(), headers={"content-type": "application/x-ndjson"}
        ).json()["id"]

        def read() -> dict[str, Any]:
            found = client.get(f"/v1/jobs/{job}").json()
            assert isinstance(found, dict)
            return found

        await_condition(lambda: read()["request_counts"]["completed"] > LINES // 20, "first results", timeout=PATIENCE)
        victim = stack.containers("worker")[0]
        docker("kill", "--signal", "KILL", victim)
        at_death = read()["request_counts"]
        await_condition(lambda: read()["status"] == "completed", "end of the job", timeout=PATIENCE)
        seconds = time.monotonic() - began
        results: list[dict[str, Any]] = []
        while len(results) < LINES:
            page = client.get(f"/v1/jobs/{job}/results", params={"after": results[-1]["seq"] if results else 0})
            lines = page.text.splitlines()
            assert lines, f"only {len(results)} results"
            results += map(json.loads, lines)
    assert 0 < at_death["completed"] < LINES, "the worker was killed in the middle of the job"
    assert len(results) == LINES
    assert {int(result["custom_id"]) for result in results} == set(range(LINES))
    assert all(result["error"] is None for result in results)
    texts = {int(result["custom_id"]): result["response"]["body"]["choices"][0]["text"] for result in results}
    exact = sum(texts[number] == example.answer for number, example in enumerate(examples))
    print(
        f"\nkilled one of two workers after {at_death['completed']} of {LINES} lines: {len(results)} results, "
        f"{exact} exact, {seconds:.0f} s"
    )
    assert exact > 0.95 * LINES
    assert "died:" in stack.run("logs", "--no-color", "courier"), "the courier rescued what the dead worker held"


def test_backup_is_restored_into_another_database(stack: Compose) -> None:
    (postgres,) = stack.containers("postgres")
    as_owner = "export PGPASSWORD=$POSTGRES_PASSWORD PGHOST=127.0.0.1 PGUSER=pagemill; "

    def shell(command: str) -> str:
        return docker("exec", postgres, "sh", "-c", as_owner + command)

    def counts(database: str) -> str:
        tables = ("tenants", "api_keys", "jobs", "requests", "bodies", "results", "files", "batches")
        query = "SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        return shell(f"psql -At -d {database} -c '{query}'")

    shell("pg_dump -Fc -d pagemill -f /tmp/pagemill.dump")
    shell("createdb restored && pg_restore --exit-on-error -d restored /tmp/pagemill.dump")
    restored = counts("restored")
    assert restored == counts("pagemill")
    assert int(restored.split("|")[5]) >= LINES
    shell("dropdb restored; rm /tmp/pagemill.dump")


def test_metrics_are_served_inside(stack: Compose) -> None:
    ask = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9464/metrics').read().decode())"
    (courier,) = stack.containers("courier")
    assert "pagemill:dead_workers_total 1.0" in docker("exec", courier, "python", "-c", ask)
