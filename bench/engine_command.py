"""`python -m bench engine`: run one workload on the bare engine, on the CPU, and print its rates."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from bench.contender import PRECISIONS
from bench.machine import computes_in
from bench.workload import workloads
from cli import logs, models
from cli.commands.terminal import err, out, reports_errors

if TYPE_CHECKING:
    from bench.engine import Measured

NAME = "engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("--workload", default="W1s", choices=list(workloads()), help="see docs/benchmarks.md")
    parser.add_argument("--model", "-m", help="instead of the workload's: demo, a directory or the id of a hub's model")
    parser.add_argument("--precision", choices=PRECISIONS, help=f"here {computes_in()} if not given")
    parser.add_argument("--profile", action="store_true", help="show where the steps' time goes")


def run(options: argparse.Namespace) -> int:
    """Run what the parsed options ask for. Returns the exit code."""
    return measure_engine(
        options.workload,
        model=options.model,
        precision=options.precision or computes_in(),
        is_profiled=options.profile,
    )


@reports_errors
def measure_engine(workload: str, *, model: str | None, precision: str, is_profiled: bool) -> int:
    """Print the rates of one run, and with a profile each part's share of the steps' time."""
    from bench.engine import measure
    from engine.errors import EngineError

    chosen = workloads()[workload]
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
