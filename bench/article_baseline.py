"""A sequential server, as services of one model begin: `python -m bench.article_baseline MODEL PRECISION THREADS`.

Flask takes requests in threads of their own, and transformers generates for one at a time, under one lock. It runs in
an environment of its own (`ENVIRONMENT`), and writes `{"port", "versions"}` as a line of JSON when it listens.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.contender import Environment

ENVIRONMENT = Environment("flask", ("flask==3.1.3", "transformers==5.23.0", "torch==2.13.0", "numpy==2.4.6"))


def serve(model: Path, precision: str, threads: int) -> None:
    """Answer `POST /v1/completions` on a free port of this machine until the process is ended."""
    # Libraries print; the first line of the output is for the harness.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, _application(model, precision, threads), threaded=True)
    versions = {name: version(name) for name in ("flask", "transformers", "torch")}
    print(json.dumps({"port": server.server_port, "versions": versions}), file=answers, flush=True)
    server.serve_forever()


def _application(path: Path, precision: str, threads: int) -> Any:
    import torch
    from flask import Flask, request
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, precision)).eval()
    lock = threading.Lock()

    def completions() -> dict[str, Any]:
        body = request.get_json()
        encoded = tokenizer(body["prompt"], return_tensors="pt")
        with lock, torch.inference_mode():
            generated = model.generate(
                **encoded,
                max_new_tokens=body["max_tokens"],
                # What `temperature: 1`, the API's default, means.
                do_sample=True,
                top_k=0,
                pad_token_id=tokenizer.eos_token_id,
            )
        tokens = generated[0, encoded["input_ids"].shape[1] :]
        return {
            "object": "text_completion",
            "model": body["model"],
            "choices": [{"index": 0, "text": tokenizer.decode(tokens, skip_special_tokens=True)}],
            "usage": {"prompt_tokens": encoded["input_ids"].shape[1], "completion_tokens": len(tokens)},
        }

    application = Flask(__name__)
    application.add_url_rule("/v1/completions", view_func=completions, methods=["POST"])
    return application


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
