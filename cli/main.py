"""The `pagemill` command. Each command imports what it needs inside, so that each process loads only that."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jobs.roles import Role

app = typer.Typer(
    name="pagemill",
    help="A self-hosted batch generation service for language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
tenants = typer.Typer(help="List tenants, and set their share of the workers.", no_args_is_help=True)
app.add_typer(tenants, name="tenants")
webhooks = typer.Typer(help="Receive webhooks on this machine.", no_args_is_help=True)
app.add_typer(webhooks, name="webhooks")

MODEL_HELP = "demo, smollm2, a directory, a GGUF file, or a hub's id: org/name or org/name:file.gguf."
LINES_HELP = "A file, plain or .gz; - reads standard input."
ModelName = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for scripts.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, as `submit` printed it.")]


# Processes


@app.command()
def up(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help=MODEL_HELP + " Repeat for a worker each; one worker serves those with commas in turn."
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that the API listens on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port that the API listens on; 0: any.")] = None,
) -> None:
    """Start everything: API, workers, courier, and a Postgres and a Valkey where no URL names others."""
    from cli.commands import processes

    raise typer.Exit(processes.up(model or [], data_dir=data_dir, host=host, port=port))


@app.command()
def api() -> None:
    """Serve the REST API."""
    from cli.commands import processes

    raise typer.Exit(processes.api())


@app.command()
def worker(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help=MODEL_HELP + " Repeat for several, served in turn.")
    ] = None,
    served_name: Annotated[
        list[str] | None, typer.Option(help="The name that clients ask for it by; for several models one each.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    gpus: Annotated[str | None, typer.Option(help="all, or places such as 0,2: a worker for each GPU.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Processes that share the model.")
    ] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Share of a GPU's memory to use.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Context, if shorter than the model's own.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests that run in one step at most.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=16, help="Tokens in one step at most.")] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Positions in a block of the KV cache.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto, or float8_e4m3 (also fp8, fp8_e4m3).")] = None,
) -> None:
    """Load a model, or several in turn, and work through their jobs.

    Options go before their settings, PAGEMILL_DEVICE and so on.
    """
    from cli.commands import processes

    options = {
        "device": device,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "block_size": block_size,
        "kv_cache_dtype": "float8_e4m3" if kv_cache_dtype in ("fp8", "fp8_e4m3") else kv_cache_dtype,
    }
    raise typer.Exit(processes.worker(model or [], served_names=served_name or [], gpus=gpus, options=options))


@app.command()
def courier() -> None:
    """Deliver webhooks, free what dead workers held, expire and tidy up."""
    from cli.commands import processes

    raise typer.Exit(processes.courier())


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema, and create PAGEMILL_API_KEY's key."""
    from cli.commands import processes

    raise typer.Exit(processes.migrate())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is missing on this machine, and how to mend it."""
    from cli.commands.doctor import doctor as run

    raise typer.Exit(run(as_json=as_json))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option(help="Go on serving until Ctrl-C, to look around in the dashboard.")] = False,
) -> None:
    """Start everything, run a real batch through it, show what came back, and stop everything."""
    from cli.commands.demo import demo as run

    raise typer.Exit(run(keep=keep))


# Jobs


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=LINES_HELP)],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Needed where the service serves several.")] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show progress until the job has ended.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write results here; implies --wait.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Of lines that name none. 0: greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of lines that name none.")] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="NAME=VALUE", help="Any other parameter or option of a job; repeatable."),
    ] = None,
    priority: Annotated[int | None, typer.Option(min=-100, max=100, help="Higher ones are served first.")] = None,
    window: Annotated[
        str | None, typer.Option(help="What is not finished by then expires, e.g. 30m, 24h or 7d.")
    ] = None,
    webhook: Annotated[str | None, typer.Option(help="Call this URL at the job's end.")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit prompts, one JSON object a line: {"prompt": "...", "custom_id": "...", "max_tokens": 64}.

    Exit code: 0; with --wait 1 where a line failed; 130 after Ctrl-C, which ends the wait and not the job.
    """
    from cli.commands import jobs

    if window is not None and not re.fullmatch(r"[1-9][0-9]{0,3}[mhd]", window):
        raise typer.BadParameter("is a number of minutes, hours or days, e.g. 30m, 24h or 7d", param_hint="--window")
    named = {"temperature": temperature, "max_tokens": max_tokens, "priority": priority, "completion_window": window}
    options = [(name, str(value)) for name, value in named.items() if value is not None]
    options += [_name_and_value(pair) for pair in param or []]
    raise typer.Exit(
        jobs.submit(
            file,
            model=model,
            wait=wait or output is not None,
            output=output,
            webhook=webhook,
            options=options,
            as_json=as_json,
        )
    )


def _name_and_value(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise typer.BadParameter("is NAME=VALUE, e.g. --param top_p=0.9", param_hint="--param")
    return name, value


@app.command()
def status(job: JobId, as_json: AsJson = False) -> None:
    """Show a job as it stands."""
    from cli.commands import jobs

    raise typer.Exit(jobs.status(job, as_json=as_json))


@app.command()
def watch(
    job: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids, as `submit` printed them.")],
    as_json: AsJson = False,
) -> None:
    """Show the progress of one or more jobs until all have ended.

    Exit code: 0 where all completed without a failed line, else 1; 130 after Ctrl-C.
    """
    from cli.commands import jobs

    raise typer.Exit(jobs.watch(job, as_json=as_json))


@app.command()
def results(
    job: JobId,
    after: Annotated[int, typer.Option(min=0, help="Only those with a `seq` above this.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write them here instead of printing.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    resume: Annotated[bool, typer.Option(help="Append to --output what it does not have yet.")] = False,
) -> None:
    """Print a job's results, one JSON object a line; while it runs, those that are there.

    Exit code: 0; with --follow 1 where a line failed; 130 after Ctrl-C.
    """
    from cli.commands import jobs

    if resume and output is None:
        raise typer.BadParameter("needs --output, the file to go on with", param_hint="--resume")
    raise typer.Exit(jobs.results(job, after=after, output=output, follows=follow, resumes=resume))


class RetryState(StrEnum):
    """How lines ended that run again."""

    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    TRUNCATED = "truncated"  # cut by max_tokens


@app.command()
def retry(
    job: JobId,
    state: Annotated[
        list[RetryState] | None, typer.Option(help="Repeat for several; unless given, all without an answer.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="A kind of failure, as the job's `failures` in the API name it.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the new job to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run lines of a job again, as a new job; those of the first stay as they ended.

    Exit code: 0; with --wait 1 where a line failed; 130 after Ctrl-C.
    """
    from cli.commands import jobs

    if state and fingerprint:
        raise typer.BadParameter("not beside --state", param_hint="--fingerprint")
    raise typer.Exit(jobs.retry(job, states=state or [], fingerprint=fingerprint, wait=wait, as_json=as_json))


@app.command()
def cancel(job: JobId, as_json: AsJson = False) -> None:
    """Stop a job; what is finished stays."""
    from cli.commands import jobs

    raise typer.Exit(jobs.cancel(job, as_json=as_json))


@webhooks.command()
def listen(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    secret: Annotated[str | None, typer.Option(help="whsec_…; unless given, the service is asked.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many events.")] = None,
) -> None:
    """Receive webhooks on this machine, verify their signatures and print them, one JSON object a line.

    The courier must be allowed to reach it: PAGEMILL_WEBHOOK_ALLOW_PRIVATE=true. What is not signed as it should be is
    answered 401 and reported on standard error. Exit code: 0 after --count events, 130 after Ctrl-C.
    """
    from cli.commands.webhooks import listen as run

    raise typer.Exit(run(host=host, port=port, secret=secret, count=count))


# The engine by itself


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Repeat for a batch.")],
    model: ModelName = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: no limit.")] = 0,
    seed: Annotated[int | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
) -> None:
    """Complete prompts with the bare engine: no service, no database."""
    from cli.commands.generate import generate as run

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    raise typer.Exit(run(prompt, model, options=options, device=device, dtype=dtype))


# Keys


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Whose key; a new tenant is made.")] = "default",
    name: Annotated[str, typer.Option(help="To tell keys apart later.")] = "",
    role: Annotated[Role, typer.Option(help="An operator's key sees all tenants and runs the workers.")] = (
        Role.READ_WRITE
    ),
    as_json: AsJson = False,
) -> None:
    """Create a key and show it, once."""
    from cli.commands import keys as commands

    raise typer.Exit(commands.create(tenant=tenant, name=name, role=role, as_json=as_json))


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List all keys, without the keys themselves."""
    from cli.commands import keys as commands

    raise typer.Exit(commands.list_all(as_json=as_json))


@keys.command("revoke")
def revoke_key(
    hint: Annotated[str, typer.Argument(help="The key's beginning, as `keys list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Revoke a key: it is refused from now on."""
    from cli.commands import keys as commands

    raise typer.Exit(commands.revoke(hint, as_json=as_json))


@tenants.command("list")
def list_tenants(as_json: AsJson = False) -> None:
    """List all tenants and their weights."""
    from cli.commands import tenants as commands

    raise typer.Exit(commands.list_all(as_json=as_json))


@tenants.command("weight")
def set_weight(
    tenant: Annotated[str, typer.Argument(help="Its name, as `tenants list` shows it.")],
    weight: Annotated[int, typer.Argument(min=1, max=1000, help="Twice the weight: twice the running requests.")],
) -> None:
    """Set a tenant's share of the workers beside others; 1 unless set. Counts from the next claim on."""
    from cli.commands import tenants as commands

    raise typer.Exit(commands.set_weight(tenant, weight))


if __name__ == "__main__":
    app()
