"""Measure Pagemill beside its rivals: `python -m bench`, which is `make bench`.

python -m bench                    everything, into bench/results/ and docs/benchmarks.md; then the modules in OTHERS
python -m bench --prepare          only install rivals, make and convert models
python -m bench --workload W1s --rival vllm --rounds 2      a part of it, shown and not kept
python -m bench --quick            one small round, to see whether all of it works
python -m bench engine --profile   the bare engine on one workload, and where its steps' time goes
python -m bench article            threads that post to /v1/completions, ours and a sequential server's
python -m bench live               what the service adds to the bare engine where callers wait
python -m bench batch              a batch file of a million lines, from its upload to its downloaded results
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import article, engine_command, large_batch, live
from bench.comparison import Comparison, Entry, measured_ceilings
from bench.contender import PRECISIONS, contenders
from bench.machine import computes_in, cores
from bench.publish import keep, table
from bench.summary import is_ours, record
from bench.workload import Workload, workloads

# Each in a process of its own: what one leaves in memory is not the next one's.
OTHERS = (
    "bench.submission",
    "bench.claiming",
    "bench.starvation",
    "bench.wakeup",
    "bench.dashboards",
    "bench.waiting",
    "bench.startup",
    "bench.determinism",
)
COMMANDS = {command.NAME: command for command in (engine_command, article, live, large_batch)}
"""Measurements with options of their own, instead of the comparison."""

# The harness' own check, which says nothing about speed.
TRIAL = "tiny"


def main() -> None:
    options = _parser().parse_args()
    if options.command is not None:
        sys.exit(COMMANDS[options.command].run(options))
    # Contenders that wait for their turn are halted, and would stay so for ever if this process just died.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options.cache = options.cache.absolute()
    chosen = workloads()
    names = options.workload or ([TRIAL] if options.quick else [name for name in chosen if name != TRIAL])
    is_all = not (options.workload or options.rival or options.precision or options.quick)
    ends = time.monotonic() + 60 * options.minutes if options.minutes else None
    for place, name in enumerate(names):
        share = None if ends is None else max(0.0, ends - time.monotonic()) / (len(names) - place)
        _compare(chosen[name], options, seconds=share, is_kept=is_all or options.keep)
    if is_all and not options.prepare:
        for benchmark in OTHERS:
            subprocess.run([sys.executable, "-m", benchmark], check=True)


def _compare(workload: Workload, options: argparse.Namespace, *, seconds: float | None, is_kept: bool) -> None:
    print(f"{workload.name}: {workload.title}", file=sys.stderr)
    threads = options.threads or cores()
    precisions = options.precision or [computes_in(), "int8"]
    entries = _entries(options.rival, precisions)
    with Comparison(workload, entries, options.cache, threads=threads, limit=options.limit) as comparison:
        comparison.prepare()
        if options.prepare:
            return
        began = time.monotonic()
        ceilings = measured_ceilings(workload, precisions)
        for number in range(1 if options.quick else options.rounds):
            round_began = time.monotonic()
            comparison.round(number)
            now = time.monotonic()
            # A round that would end too late is not begun.
            if seconds is not None and now - began + (now - round_began) > seconds:
                break
        found = record(comparison, ceilings, _command(), threads=threads)
    print(table(found))
    if is_kept:
        keep(found)


def _entries(rivals: Sequence[str] | None, precisions: Sequence[str]) -> list[Entry]:
    """Ours, and the rivals that were asked for, in all precisions that they know."""
    return [
        Entry(contender, precision)
        for precision in precisions
        for name, contender in contenders().items()
        if precision in contender.precisions and (is_ours(name) or rivals is None or name in rivals)
    ]


def _command() -> str:
    return " ".join(["python -m bench", *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rivals = [name for name in contenders() if not is_ours(name)]
    parser.add_argument("--workload", action="append", choices=list(workloads()), help="repeatable")
    parser.add_argument("--rival", action="append", choices=rivals, help="beside ours; repeatable")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help=f"repeatable; here {computes_in()} and int8"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--minutes", type=float, help="begin no round that would end later than its workload's share")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a turn is given up")
    parser.add_argument("--threads", type=int, help="as many as there are cores")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="where environments and models are kept")
    parser.add_argument("--prepare", action="store_true", help="install, make and convert, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model")
    parser.add_argument("--keep", action="store_true", help="keep the result of a part, too")
    commands = parser.add_subparsers(dest="command", title="instead of the comparison")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0]))
    return parser


if __name__ == "__main__":
    main()
