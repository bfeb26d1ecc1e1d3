"""The pipelines of examples/, run as their README says, against the whole service with the demo model."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema

from cli.stack import RunningStack
from examples.extract_json import SCHEMA
from tests.support.paths import REPOSITORY
from tests.support.processes import PATIENCE


def run(stack: RunningStack, name: str, *arguments: str) -> str:
    """What the example prints."""
    environment = os.environ | {"PAGEMILL_URL": stack.base_url, "PAGEMILL_API_KEY": stack.api_key}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_are_classified_with_the_labels_alone(stack: RunningStack, tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    texts = ["good, really", 'a "quote"', "two\nlines", "bad"]
    with file.open("w", newline="") as target:
        csv.writer(target).writerows([["id", "text"], *enumerate(texts)])
    rows = list(csv.DictReader(io.StringIO(run(stack, "classify_csv.py", str(file), "text", "positive,negative"))))
    assert [row["text"] for row in rows] == texts
    assert {row["label"] for row in rows} <= {"positive", "negative"}


def test_fields_satisfy_the_schema(stack: RunningStack, tmp_path: Path) -> None:
    file = tmp_path / "invoices.jsonl"
    file.write_text("".join(json.dumps({"id": number, "text": f"invoice {number}"}) + "\n" for number in range(5)))
    answers = [json.loads(line) for line in run(stack, "extract_json.py", str(file)).splitlines()]
    assert {answer["id"] for answer in answers} == set("01234")
    for answer in answers:
        jsonschema.validate(answer["fields"], SCHEMA)


def test_webhook_of_the_first_job_starts_the_second(stack: RunningStack, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    words = ["stone", "garden", "river"]
    file.write_text("\n".join(words))
    lines = [json.loads(line) for line in run(stack, "chain_by_webhook.py", str(file)).splitlines()]
    assert [line["line"] for line in lines] == words
    # Reversed twice: the second job worked on what the first one wrote.
    assert [(line["draft"], line["review"]) for line in lines] == [(word[::-1], word) for word in words]
