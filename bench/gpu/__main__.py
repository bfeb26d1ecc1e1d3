"""`python -m bench.gpu`: see the package."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import __doc__ as about
from bench.gpu import kernels
from bench.gpu.cases import CASES, DRY_CASES, Case
from bench.gpu.contenders import CONTENDERS
from bench.gpu.show import plots, table
from bench.gpu.turn import MARK
from bench.machine import circumstances
from bench.models import save_config
from bench.report import RESULTS

ROOT = Path(__file__).parent.parent.parent


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    is_dry = options.dry_run
    if not is_dry and not torch.cuda.is_available():
        sys.exit("there is no GPU here; `--dry-run` shows on the CPU whether all of it runs")
    device = torch.device("cpu" if is_dry else "cuda")
    found: dict[str, Any] = {"is_dry": is_dry, "device": _device(device), "measured": circumstances(), "cases": []}
    if "kernels" in options.part:
        sizes = kernels.DRY if is_dry else kernels.FULL
        dtype = torch.float32 if is_dry else torch.bfloat16
        found |= kernels.measure(sizes, device, dtype)
    if "cases" in options.part:
        with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
            for case in DRY_CASES if is_dry else CASES:
                if options.case is None or case.name in options.case:
                    found["cases"].append(_run(case, Path(directory), options))
                    _keep(found, options.output)  # what is measured is not lost when a later case breaks
    _keep(found, options.output)
    print(table(found))


def _run(case: Case, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = directory / case.model
    if not model.exists():
        save_config(case.model, model)
    turns = {}
    for name in case.contenders:
        if options.contender is None or name in options.contender:
            print(f"{case.name}: {name}", file=sys.stderr, flush=True)
            turns[name] = _turn(case, name, model, options)
    return {"case": case.name, "title": case.title, "turns": turns}


def _turn(case: Case, name: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One contender in a process of its own; a failure is a result, too."""
    python, path = sys.executable, [str(ROOT)]
    if name == "vllm":
        if options.vllm is None:
            return {"failure": "not asked for: --vllm names the Python of an environment that has it"}
        python = options.vllm
        path += options.vllm_path
    order = {
        "contender": name,
        "case": case.name,
        "model": str(model),
        "device": "cpu" if options.dry_run else "cuda",
        "dtype": "float32" if options.dry_run else "bfloat16",
        "is_dry": options.dry_run,
        "rounds": 1 if options.dry_run else options.rounds,
    }
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        done = subprocess.run(
            [python, "-m", "bench.gpu.turn", json.dumps(order)],
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.PIPE,
            env=variables,
            cwd=ROOT,
            timeout=options.limit,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"it took longer than {options.limit:.0f} s"}
    except OSError as error:
        return {"failure": str(error)}
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not answers:
        return {"failure": f"it ended with code {done.returncode}: {(done.stderr or '').strip()[-500:]}"}
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
    return answer


def _keep(found: Mapping[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, picture in plots(found).items():
        (output / f"gpu-{name}.svg").write_text(picture)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the figures mean nothing")
    parser.add_argument("--part", nargs="+", choices=("kernels", "cases"), default=("kernels", "cases"))
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], help="all of them")
    parser.add_argument("--contender", nargs="+", choices=list(CONTENDERS), help="all of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a contender's turn is given up")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment with vLLM in it")
    parser.add_argument("--vllm-path", nargs="+", default=[], metavar="DIRECTORY", help="put on its PYTHONPATH")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders say")
    return parser


if __name__ == "__main__":
    main()
