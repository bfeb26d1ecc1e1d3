"""What tests of the clients share: a tool, a batch run to its end, and a look into the tables."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from openai.types import Batch
from sqlalchemy import create_engine, text

from cli.models import DEMO
from cli.stack import RunningStack
from jobs.database import sqlalchemy_url
from tests.support.processes import await_condition

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "x-guidance": {"whitespace_flexible": False},
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
ASK: Any = {"model": DEMO, "messages": [{"role": "user", "content": "1 + 1 ="}], "max_tokens": 90, "temperature": 0}
NAMED: Any = {"type": "function", "function": {"name": "add"}}


def ended(
    client: openai.OpenAI,
    lines: list[dict[str, Any]],
    endpoint: Literal["/v1/chat/completions", "/v1/responses"] = "/v1/chat/completions",
) -> Batch:
    """A batch at its end."""
    file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")

    def is_over() -> bool:
        nonlocal batch
        batch = client.batches.retrieve(batch.id)
        return batch.status in ("completed", "failed")

    await_condition(is_over, "end of the batch")
    return batch


def rows(stack: RunningStack, statement: str) -> list[tuple[object, ...]]:
    database = create_engine(sqlalchemy_url(stack.database_url))
    with database.connect() as connection:
        found = [tuple(row) for row in connection.execute(text(statement))]
    database.dispose()
    return found
