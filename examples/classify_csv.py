"""Classify each row of a CSV file: `classify_csv.py FILE COLUMN LABEL,LABEL,... [MODEL]`.

Prints the file with a column `label`. The grammar allows nothing but one of the labels, so no
answer has to be parsed or repaired.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx


def submit(client: httpx.Client, texts: Sequence[str], labels: Sequence[str], model: str) -> str:
    """Submit a line for each text and return the job's id."""
    lines = (
        json.dumps({"custom_id": str(row), "prompt": f"Text: {text}\nLabel ({', '.join(labels)}):"})
        for row, text in enumerate(texts)
    )
    options = {
        "model": model,
        "temperature": 0,
        "max_tokens": 32,
        "structured_outputs": json.dumps({"choice": list(labels)}),
    }
    answer = client.post(
        "/v1/jobs",
        params=options,
        content="\n".join(lines),
        headers={"content-type": "application/x-ndjson", "idempotency-key": f"classify-{os.urandom(8).hex()}"},
    )
    answer.raise_for_status()
    return str(answer.json()["id"])


def results(client: httpx.Client, job_id: str) -> Iterator[dict[str, Any]]:
    """Wait for the job's end, a long poll at a time, and read its results behind the last `seq` that was read."""
    while client.get(f"/v1/jobs/{job_id}", params={"wait": 30}).raise_for_status().json()["status"] == "in_progress":
        pass
    after = 0
    while (
        lines := client.get(f"/v1/jobs/{job_id}/results", params={"after": after}).raise_for_status().text.splitlines()
    ):
        for line in lines:
            result = json.loads(line)
            after = result["seq"]
            yield result


def main(file: str, column: str, labels: str, model: str = "demo") -> None:
    with Path(file).open(newline="") as source:
        reader = csv.DictReader(source)
        rows = list(reader)
        fields = [*(reader.fieldnames or ()), "label"]
    with httpx.Client(
        base_url=os.environ["PAGEMILL_URL"],
        headers={"authorization": f"Bearer {os.environ['PAGEMILL_API_KEY']}"},
        timeout=60,
    ) as client:
        job_id = submit(client, [row[column] for row in rows], labels.split(","), model)
        for result in results(client, job_id):
            row = rows[int(result["custom_id"])]
            row["label"] = result["response"]["body"]["choices"][0]["text"] if result["error"] is None else ""
    writer = csv.DictWriter(sys.stdout, fields)
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
