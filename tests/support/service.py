"""The whole service for fault tests: API, courier and workers as real processes, driven over real HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any
from uuid import UUID

import httpx
import orjson

from engine import Engine, SamplingParams
from jobs.ids import JOB_PREFIX, parse_id
from jobs.settings import Settings
from tests.support.api_server import address_in, anonymous, new_key
from tests.support.fake_worker import MODEL, load
from tests.support.oracle import check
from tests.support.pipeline import QUICK, Pipeline
from tests.support.processes import PATIENCE, await_condition

MAX_TOKENS = 20


class Service(Pipeline):
    """Pipeline's workers, and API and courier processes over the same rows. `environment` is that of all of them."""

    @contextlib.contextmanager
    def api(self, **environment: str) -> Iterator[httpx.Client]:
        """A client with a key for an API process, which answers by then."""
        settings = Settings(database_url=self.database_url, redis_url=self.redis_url, data_dir=self.directory)
        log = self.directory / "api.log"
        log.touch()
        before = len(log.read_text())

        def address() -> str | None:
            return address_in(log.read_text()[before:])

        with self._process("api", {"PAGEMILL_PORT": "0", **environment}) as process:
            await_condition(lambda: process.poll() is not None or address() is not None, "start of the API")
            assert process.poll() is None, log.read_text()
            with closing(anonymous(address() or "", new_key(settings, "default"))) as client:
                yield client

    @contextlib.contextmanager
    def courier(self, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """A courier process. It may still be starting."""
        with self._process("courier", {"PAGEMILL_SWEEP_INTERVAL": "0.2", **environment}) as process:
            yield process

    @contextlib.contextmanager
    def _process(self, command: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        with (self.directory / f"{command}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli", command],
                env={
                    **os.environ,
                    **QUICK,
                    "PAGEMILL_DATABASE_URL": self.database_url,
                    "PAGEMILL_REDIS_URL": self.redis_url,
                    "PAGEMILL_DATA_DIR": str(self.directory),
                    **self.environment,
                    **environment,
                },
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def post(self, client: httpx.Client, prompts: Sequence[Sequence[int]], **head: Any) -> httpx.Response:
        """Hand in a job; prompt n has the custom_id `n`, and its answer the tokens that it is made of."""
        return client.post(
            "/v1/jobs",
            json={
                "model": MODEL,
                "prompts": [{"custom_id": str(place), "prompt": list(prompt)} for place, prompt in enumerate(prompts)],
                "params": {"max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 0},
                **head,
            },
        )

    def accepted(self, client: httpx.Client, prompts: Sequence[Sequence[int]], **head: Any) -> UUID:
        """The same, for a job that must be taken. Returns its id in Postgres."""
        response = self.post(client, prompts, **head)
        assert response.status_code == 202, response.text
        return job_id_of(response)

    def await_completion(
        self,
        client: httpx.Client,
        job_id: UUID,
        prompts: Sequence[Sequence[int]],
        *,
        timeout: float = PATIENCE,
        undisturbed: Callable[[], Engine] = load,
    ) -> None:
        """Wait for a job's end; compare its results with an undisturbed engine's, and the tables with the oracle."""
        path = f"/v1/jobs/job_{job_id.hex}"

        def is_at_its_end() -> bool:
            response = client.get(path)
            assert response.status_code in (200, 503), response.text
            return response.status_code == 200 and response.json()["status"] != "in_progress"

        await_condition(is_at_its_end, "the end of the job", timeout)
        assert client.get(path).json()["status"] == "completed"
        lines = [orjson.loads(line) for line in client.get(f"{path}/results").iter_lines()]
        assert [line["seq"] for line in lines] == list(range(1, len(prompts) + 1))
        answers = {int(line["custom_id"]): line for line in lines}
        assert sorted(answers) == list(range(len(prompts)))
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        for place, output in enumerate(undisturbed().generate([list(prompt) for prompt in prompts], params)):
            answer = answers[place]["response"]["body"]["choices"][0]
            assert answer["logprobs"]["tokens"] == [f"token_id:{token}" for token in output.token_ids]
        check(self.database_url)


def job_id_of(response: httpx.Response) -> UUID:
    """The id in Postgres of the job that an answer shows."""
    job_id = parse_id(JOB_PREFIX, response.json()["id"])
    assert job_id is not None
    return job_id


def all_jobs(client: httpx.Client) -> Iterator[dict[str, Any]]:
    """Every job that the client's tenant sees."""
    page = client.get("/v1/jobs", params={"limit": 100}).json()
    yield from page["data"]
    while page["has_more"]:
        page = client.get("/v1/jobs", params={"limit": 100, "after": page["last_id"]}).json()
        yield from page["data"]
