"""What was found, as a table and as plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench.chart import Bar, bar_chart

OURS = "pagemill"


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"Device: {found['device']}", ""]
    if found["is_dry"]:
        lines = ["A dry run on the CPU: the figures mean nothing.", ""]
    if "limits" in found:
        limits = found["limits"]
        lines += [
            f"Copy {limits['bytes_per_second'] / 1e9:,.0f} GB/s, matrix product "
            f"{limits['flops_per_second'] / 1e12:,.1f} TFLOP/s.",
            "",
            "| kernel | shape | us | of the limit | torch's, us |",
            "|---|---|---|---|---|",
        ]
        for timing in found["kernels"]:
            others = ", ".join(f"{name} {seconds * 1e6:,.0f}" for name, seconds in timing["others"].items())
            lines.append(
                f"| {timing['kernel']} | {timing['shape']} | {timing['seconds'] * 1e6:,.0f} "
                f"| {timing['share']:.0%} ({timing['limit']}) | {others} |"
            )
        lines += [f"| {one['kernel']} | {one['failure'].splitlines()[0]} | | | |" for one in found["failures"]]
        lines.append("")
    for case in found["cases"]:
        lines += [
            case["title"],
            "",
            "| | output tokens/s | requests/s | Pagemill is faster by | GPU busy |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(name, turn, case["turns"].get(OURS)) for name, turn in case["turns"].items()]
        lines.append("")
        if "profile" in case["turns"].get(OURS, {}):
            lines += [*_profile(case["turns"][OURS]["profile"]), ""]
    return "\n".join(lines)


def _row(name: str, turn: Mapping[str, Any], ours: Mapping[str, Any] | None) -> str:
    if "failure" in turn:
        return f"| {name} | {turn['failure'].splitlines()[0]} | | | |"
    ratio = ""
    if ours is not None and "failure" not in ours and ours is not turn:
        ratio = f"{statistics.median(turn['seconds']) / statistics.median(ours['seconds']):.2f}"
    title = name + (" (scaled)" if turn["is_scaled"] else "")
    share = turn.get("profile", {}).get("device_share")
    busy = "" if share is None else f"{share:.0%}"
    return (
        f"| {title} | {turn['output_tokens_per_second']:,.0f} | {turn['requests_per_second']:,.1f} | {ratio} | {busy} |"
    )


def _profile(profile: Mapping[str, Any]) -> list[str]:
    """Where the time of a round that was not timed went: on the host, and on the device."""
    host = ", ".join(f"{name} {share:.0%}" for name, share in profile["host"].items())
    lines = [f"The host's time: {host}."]
    if profile["kernels"]:
        lines += [
            "",
            "| on the device | share of the time | of the copy rate | of the matrix rate |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {kernel['share']:.1%} | {_known(kernel['of_copy'])} | {_known(kernel['of_matmul'])} |"
            for name, kernel in profile["kernels"].items()
        ]
    return lines


def _known(share: float) -> str:
    """Empty where nobody counted what was asked for."""
    return f"{share:.0%}" if share else ""


def plots(found: Mapping[str, Any]) -> dict[str, str]:
    """An SVG for each case that anybody finished, by the case's name."""
    pictures = {}
    for case in found["cases"]:
        bars = [
            Bar(
                name,
                turn["output_tokens_per_second"],
                turn["output_tokens"] / max(turn["seconds"]),
                turn["output_tokens"] / min(turn["seconds"]),
                name == OURS,
            )
            for name, turn in case["turns"].items()
            if "failure" not in turn
        ]
        if bars:
            pictures[case["case"]] = bar_chart(f"{case['title']}: output tokens/s", bars)
    return pictures
