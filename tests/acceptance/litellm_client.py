"""What litellm gets of a server: `litellm_client.py BASE_URL KEY`, run in litellm's environment. Prints JSON.

It validates what it is answered, batches above all, and raises where something is missing.
"""

import json
import sys
import time
from typing import Any

import litellm

BASE_URL, KEY = sys.argv[1:]
SERVER: dict[str, Any] = {"api_base": BASE_URL, "api_key": KEY}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
SUM = [{"role": "user", "content": "17 + 58 ="}]
WORD = [{"role": "user", "content": "reverse stone ="}]
PATIENCE = 60.0  # seconds for a batch of two lines
LINES = [
    {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "demo", "messages": messages, **GREEDY},
    }
    for name, messages in (("sum", SUM), ("word", WORD))
]


def chats(provider: str) -> dict[str, Any]:
    """One chat in one piece and streamed, through one of litellm's own ways to a server of this shape."""
    model = f"{provider}/demo"
    whole = litellm.completion(model=model, messages=SUM, **GREEDY, **SERVER)
    chunks = litellm.completion(
        model=model, messages=WORD, stream=True, stream_options={"include_usage": True}, **GREEDY, **SERVER
    )
    streamed = litellm.stream_chunk_builder(list(chunks), messages=WORD)
    return {
        "whole": whole.choices[0].message.content,
        "finish_reason": whole.choices[0].finish_reason,
        "total_tokens": whole.usage.total_tokens,
        "streamed": streamed.choices[0].message.content,
        "streamed_finish_reason": streamed.choices[0].finish_reason,
        "streamed_tokens": streamed.usage.completion_tokens,
    }


def batch() -> dict[str, Any]:
    """A batch from file to answers."""
    content = "\n".join(map(json.dumps, LINES)).encode()
    file = litellm.create_file(file=("in.jsonl", content), purpose="batch", custom_llm_provider="openai", **SERVER)
    made = litellm.create_batch(
        completion_window="24h",
        endpoint="/v1/chat/completions",
        input_file_id=file.id,
        custom_llm_provider="openai",
        metadata={"kind": "test"},
        **SERVER,
    )
    deadline = time.monotonic() + PATIENCE
    while (found := litellm.retrieve_batch(made.id, custom_llm_provider="openai", **SERVER)).status != "completed":
        if time.monotonic() > deadline:
            raise TimeoutError(f"the batch is {found.status}")
        time.sleep(0.2)
    output = litellm.file_content(found.output_file_id, custom_llm_provider="openai", **SERVER)
    answers = [json.loads(line) for line in output.text.splitlines()]
    listed = litellm.list_batches(custom_llm_provider="openai", **SERVER)
    return {
        "first_status": made.status,
        "metadata": dict(found.metadata),
        "counts": found.request_counts.model_dump(),
        "is_listed": made.id in [one.id for one in listed.data],
        "answers": {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in answers},
    }


def refusals() -> list[str]:
    """The kinds of error that litellm makes of the server's: an unknown model, a value out of bounds."""
    kinds = []
    for changes in ({"model": "openai/nothing"}, {"model": "openai/demo", "temperature": 11}):
        try:
            litellm.completion(messages=SUM, **{**GREEDY, **SERVER, **changes}, max_retries=0)
        except Exception as error:  # noqa: BLE001 - its kind is the result
            kinds.append(type(error).__name__)
    return kinds


text = litellm.text_completion(model="text-completion-openai/demo", prompt="17 + 58 =", **GREEDY, **SERVER)
found = {
    "openai": chats("openai"),
    "hosted_vllm": chats("hosted_vllm"),
    "text": text.choices[0].text,
    "batch": batch(),
    "refusals": refusals(),
}
sys.stdout.write(json.dumps(found) + "\n")
