"""What a run found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_LINES = 100
LONGEST = 110


def table(lines: Sequence[Mapping[str, Any]], most: int = MOST_LINES) -> str:
    """The steps, then what they measured, in at most `most` lines."""
    result = ["| step | | seconds | |", "|---|---|---:|---|", *map(_step, lines), ""]
    rows = [row for line in lines for row in rows_of(line)]
    result += ["| step | what | us | of the limit | |", "|---|---|---:|---:|---|"]
    room = most - len(result)
    if len(rows) > room:
        rows = [*rows[: room - 1], f"… and {len(rows) - room + 1} more in first_run.jsonl"]
    return "\n".join(result + rows)


def rows_of(line: Mapping[str, Any], *, with_details: bool = False) -> list[str]:
    """A step's measurements; failures always, details only where they are asked for."""
    wanted = [one for one in line["data"] if with_details or "failure" in one or not one.get("is_detail")]
    return [_row(line["step"], one) for one in wanted]


def _step(line: Mapping[str, Any]) -> str:
    reason = line.get("reason") or (line.get("stderr") or "").strip().splitlines()[-1:] or ""
    return f"| {line['step']} | {line['status']} | {line.get('seconds') or 0:.0f} | {cell(reason)} |"


def _row(step: str, one: Mapping[str, Any]) -> str:
    seconds, share = one.get("seconds"), one.get("share")
    time = "" if seconds is None else f"{seconds * 1e6:,.1f}"
    of_limit = "" if share is None else f"{share:.0%} {one.get('limit', '')}".rstrip()
    known = ("what", "seconds", "share", "limit", "failure", "is_detail", "step")
    rest = {name: value for name, value in one.items() if name not in known and not isinstance(value, dict | list)}
    note = one.get("failure") or ", ".join(f"{name} {_value(value)}" for name, value in rest.items())
    return f"| {step} | {cell(one['what'])} | {time} | {of_limit} | {cell(note)} |"


def _value(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def cell(value: object) -> str:
    """Text in one cell of a table."""
    text = " ".join(str(value[0] if isinstance(value, list) else value).replace("|", "/").split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
