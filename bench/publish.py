"""Results into `docs/benchmarks.md`: a table and a chart for each workload, between markers.

    <!-- bench W1 -->  …written here…  <!-- end W1 -->

`python -m bench.publish` writes them again from `bench/results/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.chart import Bar, bar_chart
from bench.report import RESULTS
from bench.summary import MOST_NOISE, Record, Row, Spread, is_ours, our_entries, ratios, rows
from bench.workload import workloads

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
LONGEST_REASON = 160


def keep(record: Record) -> None:
    """Write a comparison's record, its chart and its part of the document."""
    name = record["workload"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    _publish(record)


def table(record: Record) -> str:
    """The comparison as Markdown, one row a contender, the fastest first."""
    ours = our_entries(record)
    columns = ["", "precision", "tokens/s", "requests/s", "peak MB", "load s", "of the ceiling", "same tokens"]
    columns += [f"engine in {entry['precision']} is × as fast" for entry in ours]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    by_name = {(entry["contender"], entry["precision"]): entry for entry in record["entries"]}
    lines += [
        _line(row, [_ratio(record, mine, by_name[row.name, row.precision]) for mine in ours])
        for row in rows(record)
        if row.tokens_per_second is not None
    ]
    out = [
        f"- **{row.title}, {row.precision}** took no turn: {_brief(row.failure)}"
        for row in rows(record)
        if row.tokens_per_second is None
    ]
    return "\n".join([*lines, *(["", *out] if out else [])])


def main() -> None:
    for name in workloads():
        file = RESULTS / f"{name}.json"
        if file.exists():
            _publish(json.loads(file.read_text()))


def _publish(record: Record) -> None:
    name = record["workload"]
    bars = [
        Bar(f"{row.title}, {row.precision}", spread.median, spread.least, spread.most, is_ours(row.name))
        for row in rows(record)
        if (spread := row.tokens_per_second) is not None
    ]
    (RESULTS / f"{name}.svg").write_text(bar_chart(f"{record['title']}: output tokens a second", bars))
    write_section(name, _section(record), DOCUMENT)


def write_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Replace what stands between a benchmark's markers. Raises LookupError where the document has none."""
    begin, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    found = document.read_text()
    if not pattern.search(found):
        raise LookupError(f"{document.name} has no place for {name}: add the lines {begin} and {end}")
    document.write_text(pattern.sub(lambda match: section, found))


def _section(record: Record) -> str:
    name, measured = record["workload"], record["measured"]
    rounds = {turn["round"] for entry in record["entries"] for turn in entry["turns"]}
    ceilings = "; ".join(
        f"{precision} {found['compute']:,.0f} GFLOP/s and {found['memory']:.1f} GB/s, so at least "
        f"{found['least_seconds']:.2f} s"
        for precision, found in record["ceilings"]["precisions"].items()
    )
    ceilings = f"Measured ceilings: {ceilings}. " if ceilings else ""
    versions = {}
    for entry in record["entries"]:
        if not is_ours(entry["contender"]):
            versions.update(entry["versions"])
    return "\n".join(
        [
            f"### {name}: {record['title']}",
            "",
            f"`{record['command']}` · {measured['at'][:10]} · commit {measured['commit']} · {measured['cpu']}, "
            f"{record['threads']} threads, {measured['memory_gib']:.0f} GiB · {len(rounds)} rounds",
            "",
            table(record),
            "",
            f"![{record['title']}](../bench/results/{name}.svg)",
            "",
            f"{ceilings}Rivals: {', '.join(f'{key} {value}' for key, value in versions.items())}. {_noise(record)}",
        ]
    )


def _noise(record: Record) -> str:
    noisy = [f"{row.title} {row.precision} ({row.noise:.0%})" for row in rows(record) if row.noise > MOST_NOISE]
    if not noisy:
        return f"Nothing else took more than {MOST_NOISE:.0%} of the CPU during any turn."
    return f"Others took CPU during turns of: {', '.join(noisy)}."


def _line(row: Row, ratios: list[str]) -> str:
    spread = row.tokens_per_second
    assert spread is not None
    cells = [
        f"**{row.title}**" if is_ours(row.name) else row.title + (" (scaled from a few)" if row.is_scaled else ""),
        row.precision,
        f"{spread.median:,.0f} ({spread.least:,.0f} … {spread.most:,.0f})",
        f"{row.requests_per_second:.2f}",
        f"{row.peak_memory / 1e6:,.0f}",
        f"{row.load_seconds:.1f}",
        "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}",
        "" if row.same_tokens is None else f"{row.same_tokens:.0%}",
        *ratios,
    ]
    return "| " + " | ".join(cells) + " |"


def _ratio(record: Record, mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    spread = None if mine is other else ratios(record, mine, other)
    return "" if spread is None else _spread(spread)


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.least:.2f} … {spread.most:.2f})"


def _brief(reason: str | None) -> str:
    text = " ".join((reason or "it was not asked").split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " …"


if __name__ == "__main__":
    main()
