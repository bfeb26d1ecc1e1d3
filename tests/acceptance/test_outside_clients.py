"""Programs of others against the whole service with the demo model: litellm, and lm-evaluation-harness.

Each comes from the package index into an environment of its own under `.bench/`, as the benchmarks' rivals do.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.contender import Environment
from bench.contender_process import clean_environment
from bench.environments import NotInstallable, python_of
from cli.models import DEMO, resolve
from cli.stack import RunningStack, running_stack
from demo.tasks import mixed_holdout
from jobs.settings import Settings
from tests.support.paths import REPOSITORY

LITELLM = Environment("litellm", ("litellm==1.110.2",))
LM_EVAL = Environment("lm-eval", ("lm_eval[api,hf]==0.4.13", "torch==2.13.0", "transformers==5.23.0"))
TASK = """\
task: demo_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

# The first run installs hundreds of megabytes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    settings = Settings(data_dir=tmp_path_factory.mktemp("stack") / "data", port=0)
    with running_stack(settings, [DEMO]) as running:
        yield running


def run(environment: Environment, script: str, arguments: Sequence[str], **variables: str) -> Any:
    """What a script beside this file prints, as its last line, in an environment of packages that are none of ours."""
    try:
        python = python_of(environment, REPOSITORY / ".bench")
    except NotInstallable as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [python, "-P", Path(__file__).parent / script, *arguments],
        capture_output=True,
        text=True,
        env={**clean_environment(), **variables},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_litellm_completes_streams_and_runs_a_batch(stack: RunningStack) -> None:
    found = run(
        LITELLM,
        "litellm_client.py",
        [f"{stack.base_url}/v1", stack.api_key],
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    for provider in ("openai", "hosted_vllm"):
        chat = found[provider]
        assert chat["whole"] == "75"
        assert chat["streamed"] == "enots"
        assert chat["finish_reason"] == chat["streamed_finish_reason"] == "stop"
        assert chat["total_tokens"] > chat["streamed_tokens"] > 0
    assert found["text"] == "75"
    assert found["batch"] == {
        "first_status": found["batch"]["first_status"],
        "metadata": {"kind": "test"},
        "counts": {"total": 2, "completed": 2, "failed": 0},
        "is_listed": True,
        "answers": {"sum": "75", "word": "enots"},
    }
    assert found["batch"]["first_status"] in ("validating", "in_progress", "finalizing", "completed")
    assert found["refusals"] == ["NotFoundError", "BadRequestError"]


def test_lm_eval_reads_the_likelihoods_that_transformers_has(stack: RunningStack, tmp_path: Path) -> None:
    """`local-completions` against the service, and the `hf` backend on the same checkpoint."""
    data = tmp_path / "choices.jsonl"
    tasks = list(mixed_holdout(24, seed=11))
    with data.open("w") as file:
        for number, task in enumerate(tasks):
            choices = sorted({task.answer, task.answer[::-1], f"{task.answer}0", tasks[number - 1].answer})
            line = {"question": task.prompt, "choices": choices, "gold": choices.index(task.answer)}
            file.write(json.dumps(line) + "\n")
    (tmp_path / "demo_choices.yaml").write_text(TASK.format(data=data))
    checkpoint = resolve(DEMO).location

    def evaluated(backend: str, **options: object) -> Any:
        return run(
            LM_EVAL,
            "lm_eval_client.py",
            [str(tmp_path), "demo_choices", backend, json.dumps(options)],
            OPENAI_API_KEY=stack.api_key,
            HF_HOME=str(tmp_path / "hf"),
        )

    # Ids are taken as they are: the harness has to put in the token with which this model's texts begin.
    expected = evaluated("hf", pretrained=checkpoint, dtype="float32", add_bos_token=True)
    found = evaluated(
        "local-completions",
        model=DEMO,
        base_url=f"{stack.base_url}/v1/completions",
        tokenizer=checkpoint,
        tokenizer_backend="huggingface",
        add_bos_token=True,
        num_concurrent=4,
        max_retries=1,
    )
    assert len(found["choices"]) == len(tasks)
    for ours, theirs in zip(found["choices"], expected["choices"], strict=True):
        assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-3)
    assert found["metrics"] == expected["metrics"]
    assert found["metrics"]["acc,none"] > 0.9  # the demo model knows these tasks
