"""A process that compiles grammars of strangers and walks a few tokens through them, before anyone else dares to.

Run as a script, with frames of 4 bytes of length (big-endian) and JSON on stdin and stdout. The first frame brings the
vocabulary and the limits and is answered `true`; each further one is a grammar, and is answered with what it costs or
why it is refused. A grammar that costs too much ends the process: the kernel kills it at its share of processor time,
and memory beyond its own cannot be had. It imports nothing of ours: it starts quickly, and knows nothing worth knowing.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from typing import IO, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

_SOON = 1.0  # seconds of processor time that the walk may take in all


def read_frame(stream: IO[bytes]) -> Any:
    """The next document; EOFError at the end."""
    header = stream.read(4)
    if len(header) < 4:
        raise EOFError
    body = stream.read(int.from_bytes(header, "big"))
    return json.loads(body)


def write_frame(stream: IO[bytes], document: Any) -> None:
    body = json.dumps(document).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


class _Tokens(TokenizerWrapper):
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.is_tokenizer_wrapper = True
        self.tokens = tokens
        self.special_token_ids: list[int] = []
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        raise AssertionError("a grammar forces tokens")


def try_grammar(tokenizer: LLTokenizer, grammar: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Compile, then let a random model speak: `{"error"}`, or `{"bytes"}` that it took in memory."""
    before = _resident()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits["parser"]))
    if matcher.is_error():
        return {"error": matcher.get_error()}
    draw = random.Random(0)
    spent: list[float] = []
    while len(spent) < limits["walk"] and sum(spent) < _SOON:
        began = time.process_time()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        spent.append(time.process_time() - began)
        if matcher.is_error():
            if matcher.stop_reason() in ("NoExtensionBias", "NoExtension") and len(spent) > 1:
                break  # a dead end on one way does not speak against the others
            return {"error": matcher.get_error()}
        tokens = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        tokens = tokens[tokens < tokenizer.vocab_size - 1]
        if not len(tokens):
            break
        if not matcher.consume_token(int(tokens[draw.randrange(len(tokens))])):
            return {"error": matcher.get_error()}
        if matcher.is_stopped():
            break
    mean = sum(spent) / len(spent)
    if mean > limits["seconds_a_token"] or max(spent) > limits["seconds_one_token"]:
        return {"error": f"a token takes {mean * 1000:.0f} ms to check, the slowest {max(spent) * 1000:.0f} ms"}
    return {"bytes": max(0, _resident() - before)}


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    # The kernel's way to end a process: no handler of ours has to run.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    hello = read_frame(stdin)
    limits = hello["limits"]
    tokenizer = LLTokenizer(_Tokens([token.encode("latin-1") for token in hello["tokens"]]))
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    most = mapped + limits["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write_frame(stdout, True)
    while True:
        try:
            grammar = read_frame(stdin)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
        verdict = try_grammar(tokenizer, grammar, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(stdout, verdict)


if __name__ == "__main__":
    main()
