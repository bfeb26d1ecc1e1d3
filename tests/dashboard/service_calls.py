"""What the browser's tests ask of the service beside the page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx

from cli.models import DEMO
from cli.stack import RunningStack
from tests.support.api_server import anonymous
from tests.support.processes import await_condition

Open = Callable[..., AbstractContextManager[Any]]
"""Opens an address in a browser that is logged in."""

LOOK_AHEAD = {"prompt": "a", "structured_outputs": {"regex": "(?=a)b"}}
"""A line that fails: its grammar does not compile."""


def sent(api: httpx.Client, prompts: list[Any], **head: Any) -> str:
    """A job's id."""
    body = {"model": DEMO, "prompts": prompts, "params": {"temperature": 0, "max_tokens": 8}} | head
    answer = api.post("/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def ended(api: httpx.Client, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = {}

    def is_over() -> bool:
        job.update(api.get(f"/v1/jobs/{job_id}?wait=5").json())
        return job["ended_at"] is not None

    await_condition(is_over, "the end of the job")
    return job


def new_key_over_http(stack: RunningStack, tenant: str, role: str = "read-write") -> str:
    with anonymous(stack.base_url, stack.api_key) as client:
        answer = client.post("/v1/keys", json={"tenant": tenant, "role": role, "name": f"{tenant} {role}"})
        assert answer.status_code == 201, answer.text
        key: str = answer.json()["key"]
        return key
