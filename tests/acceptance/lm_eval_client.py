"""One task of lm-evaluation-harness: `lm_eval_client.py TASK_DIRECTORY TASK MODEL OPTIONS`, in its environment.

MODEL is a backend of the harness and OPTIONS its arguments as JSON. Prints each choice's log-probability and whether it
is what greedy decoding says, by document, and the metrics, as JSON.
"""

import json
import os
import sys

import lm_eval
from lm_eval.tasks import TaskManager

# Libraries print; the last line of the output is for the test.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
directory, task, model, options = sys.argv[1:]
results = lm_eval.simple_evaluate(
    model=model,
    model_args=json.loads(options),
    tasks=[task],
    task_manager=TaskManager(include_path=directory, include_defaults=False),
    batch_size=4,
    device="cpu",
    log_samples=True,
    bootstrap_iters=0,
)
samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
found = {
    "choices": [[[float(value), bool(is_greedy)] for value, is_greedy in one["filtered_resps"]] for one in samples],
    "metrics": {
        name: value
        for name, value in results["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    },
}
answers.write(json.dumps(found) + "\n")
answers.close()
