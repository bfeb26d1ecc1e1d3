"""Results of a run on a GPU into the repository: `python -m bench.gpu.record first_run.jsonl [--commit HASH]`.

Writes `bench/results/gpu-CARD-DATE.json` and the tables between the markers `<!-- gpu kernels -->` of docs/gpu.md and
`<!-- gpu cases -->` of docs/benchmarks.md. Steps and measurements that failed are in them as failures.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.table import rows_of, table
from bench.report import RESULTS

DOCS = Path(__file__).parents[2] / "docs"
CASES = ("article", "article-4096", "ragged", "sequential", "vllm", "long")


def read(path: Path) -> dict[str, Any]:
    """A run's lines as one record; of a step that ran more than once, the last. Raises ValueError for a dry run."""
    begins, lines = [], {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if "begin" in line:
            begins.append(line)
        elif line["step"] not in lines or line["status"] != "skipped":
            lines[line["step"]] = line
    if any(begin["is_dry"] for begin in begins):
        raise ValueError("a dry run measures nothing")
    machine = next((one for one in lines.get("limits", {"data": []})["data"] if one["what"] == "machine"), None)
    if machine is None or machine["gpu"] is None:
        raise ValueError("the step `limits` did not say on which card it ran")
    commit = next((begin["commit"] for begin in reversed(begins) if begin["commit"]), machine["commit"])
    return {"at": begins[0]["begin"], "commit": commit, "machine": machine, "steps": list(lines.values())}


def name_of(record: Mapping[str, Any]) -> str:
    card = re.sub(r"[^a-z0-9]+", "-", record["machine"]["gpu"]["name"].lower()).strip("-")
    return f"gpu-{card}-{record['at'][:10]}"


def title_of(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    gpu, versions = machine["gpu"], machine["versions"]
    return (
        f"{gpu['name']} · driver {gpu['driver']} · CUDA {gpu['cuda']} · torch {versions['torch']} · "
        f"triton {versions['triton']} · {record['at'][:10]} · commit {record['commit']}"
    )


def section(record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of some steps: how each ended, and all that was measured but for details."""
    file = f"../bench/results/{name_of(record)}.json"
    return f"{title_of(record)}; every line is in [{Path(file).name}]({file}).\n\n{table(steps, most=10_000)}"


def publish(record: Mapping[str, Any], results: Path = RESULTS, docs: Path = DOCS) -> Path:
    """Write the record and the tables; returns the record's file."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"{name_of(record)}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    of_cases = [step for step in record["steps"] if step["step"] in CASES]
    others = [step for step in record["steps"] if step["step"] not in CASES]
    _replace_section(docs / "gpu.md", "kernels", section(record, others))
    _replace_section(docs / "benchmarks.md", "cases", section(record, of_cases))
    return file


def _replace_section(document: Path, marker: str, text: str) -> None:
    begin, end = f"<!-- gpu {marker} -->", f"<!-- end gpu {marker} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    before = document.read_text()
    if not pattern.search(before):
        raise LookupError(f"{document.name} has no place for it: add the lines {begin} and {end}")
    document.write_text(pattern.sub(lambda match: f"{begin}\n{text}\n{end}", before))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.record", description=__doc__)
    parser.add_argument("run", type=Path, help="first_run.jsonl")
    parser.add_argument("--commit", help="what was measured, where the run does not say it")
    options = parser.parse_args()
    record = read(options.run)
    if options.commit is not None:
        record["commit"] = options.commit
    print(publish(record))
    for step in record["steps"]:
        print(*rows_of(step), sep="\n")


if __name__ == "__main__":
    main()
