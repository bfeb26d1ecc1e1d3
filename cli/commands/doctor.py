"""doctor: what is missing on this machine, and how to mend it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cli.checkup import Finding, Verdict, checks
from cli.commands.terminal import reports_errors, show_json
from jobs.settings import Settings

SIGNS = {Verdict.GOOD: ("✓", "green"), Verdict.NOTE: ("!", "yellow"), Verdict.BAD: ("✗", "red")}
INDENT = " " * 5


@reports_errors
def doctor(*, as_json: bool = False) -> int:
    """Look at everything. 1 where something would keep `pagemill up` from running, else 0."""
    if as_json:
        return _as_lines()
    console = Console(highlight=False, soft_wrap=True)
    verdicts = []
    for check in checks(Settings()):
        with console.status(check.name):
            finding = check.run()
        verdicts.append(finding.verdict)
        console.print(_line(check.name, finding))
    is_bad = Verdict.BAD in verdicts
    console.print("\nMend what is marked ✗ first." if is_bad else "\n`pagemill up` can run here.")
    return int(is_bad)


def _as_lines() -> int:
    verdicts = []
    for check in checks(Settings()):
        finding = check.run()
        verdicts.append(finding.verdict)
        show_json(
            {"check": check.name, "verdict": finding.verdict.value, "detail": finding.detail, "mend": finding.mend}
        )
    return int(Verdict.BAD in verdicts)


def _line(name: str, finding: Finding) -> Text:
    sign, style = SIGNS[finding.verdict]
    line = Text.assemble("  ", (sign, style), "  ", (name, "bold"), f": {finding.detail}")
    if finding.mend:
        line.append(f"\n{INDENT}→ {finding.mend}", style="dim" if finding.verdict is not Verdict.BAD else "")
    return line
