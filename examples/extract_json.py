"""Extract fields from texts by a JSON schema: `extract_json.py FILE.jsonl [MODEL]`, of lines {"id": ..., "text": ...}.

Goes through OpenAI's files and batches, whose calls are written out as plain HTTP. Prints one line for each text: its
id, and the fields or the error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

SCHEMA = {
    "type": "object",
    "properties": {
        "vendor": {"type": "string", "maxLength": 8},
        "total": {"type": "integer", "minimum": 0, "maximum": 999},
        "currency": {"enum": ["EUR", "USD", "GBP"]},
    },
    "required": ["vendor", "total", "currency"],
    "additionalProperties": False,
}


def request(line: dict[str, Any], model: str) -> dict[str, Any]:
    """A line of a batch's input file."""
    return {
        "custom_id": str(line["id"]),
        "method": "POST",
        "url": "/v1/completions",
        "body": {
            "model": model,
            "prompt": f"{line['text']}\nJSON:",
            "max_tokens": 128,
            "temperature": 0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "invoice", "schema": SCHEMA, "strict": True},
            },
        },
    }


def run_batch(client: httpx.Client, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Upload the input, wait for the batch, and return the lines of its output and error files."""
    content = "\n".join(map(json.dumps, requests)).encode()
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
    body = {"input_file_id": file.raise_for_status().json()["id"], "endpoint": "/v1/completions"}
    batch = client.post("/v1/batches", json=body | {"completion_window": "24h"}).raise_for_status().json()
    while batch["status"] in ("validating", "in_progress", "finalizing"):
        time.sleep(1)
        batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
    if batch["status"] != "completed":
        raise SystemExit(f"the batch is {batch['status']}: {batch['errors']}")
    files = [batch[name] for name in ("output_file_id", "error_file_id") if batch.get(name)]
    texts = [client.get(f"/v1/files/{name}/content").raise_for_status().text for name in files]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def main(file: str, model: str = "demo") -> None:
    requests = [request(json.loads(line), model) for line in Path(file).read_text().splitlines()]
    with httpx.Client(
        base_url=os.environ["PAGEMILL_URL"],
        headers={"authorization": f"Bearer {os.environ['PAGEMILL_API_KEY']}"},
        timeout=60,
    ) as client:
        for answer in run_batch(client, requests):
            if answer["error"] is None and answer["response"]["status_code"] == 200:
                found = {"fields": json.loads(answer["response"]["body"]["choices"][0]["text"])}
            else:
                found = {"error": answer["error"] or answer["response"]["body"]}
            sys.stdout.write(json.dumps({"id": answer["custom_id"], **found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
