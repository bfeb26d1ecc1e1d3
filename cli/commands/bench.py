"""`pagemill bench`: what this machine does with the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from cli import logs, models
from cli.commands.terminal import err, explained, out

if TYPE_CHECKING:
    from bench.engine import Measured


@explained
def engine(workload: str, *, model: str | None, precision: str | None, is_profiled: bool) -> int:
    """Print the rates of one run, and with a profile each part's share of the steps' time."""
    from bench.contender import PRECISIONS
    from bench.engine import measure
    from bench.machine import computes_in
    from bench.workload import workloads
    from engine.errors import EngineError

    chosen, precision = workloads().get(workload), precision or computes_in()
    if chosen is None or precision not in PRECISIONS:
        known, what = (PRECISIONS, "precisions") if chosen else (workloads(), "workloads")
        err.print(f"The {what} are {', '.join(known)}.", style="red", markup=False)
        return 1
    logs.configure("warning")
    location = None if model is None else models.resolve(model).location
    try:
        found = measure(chosen, precision, model=location, is_profiled=is_profiled)
    except (EngineError, ValueError) as error:
        err.print(str(error), style="red", markup=False)
        return 1
    out.print(f"{chosen.title if model is None else model}, {precision}, loaded in {found.load_seconds:.1f} s")
    out.print(
        f"{found.output_tokens / found.seconds:,.0f} tokens/s · {found.requests / found.seconds:.2f} requests/s · "
        f"{found.seconds:.2f} s"
    )
    if found.profile is not None:
        out.print(_parts(found))
    return 0


def _parts(found: Measured) -> Table:
    profile, ceilings = found.profile, found.ceilings
    assert profile is not None
    assert ceilings is not None
    table = Table(
        title=f"{profile.steps} steps; ceilings: {ceilings.compute:,.0f} GFLOP/s, {ceilings.memory:.1f} GB/s",
        title_justify="left",
    )
    table.add_column("part")
    for column in ("ms a step", "share", "GFLOP/s", "of ceiling", "GB/s", "of ceiling"):
        table.add_column(column, justify="right")
    for name, part in profile.parts.items():
        cells = [f"{1e3 * part.seconds / profile.steps:.3f}", f"{part.seconds / profile.seconds:.1%}"]
        if part.flops:
            gflops, gigabytes = part.flops / part.seconds / 1e9, part.bytes / part.seconds / 1e9
            cells += [f"{gflops:,.0f}", f"{gflops / ceilings.compute:.0%}"]
            cells += [f"{gigabytes:.1f}", f"{gigabytes / ceilings.memory:.0%}"]
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("all", f"{1e3 * profile.seconds / profile.steps:.3f}", "100.0%")
    return table
