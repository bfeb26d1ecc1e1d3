"""Compile untrusted grammars in a process of its own, and walk a few tokens through them.

Run as a script; a frame on stdin and stdout is 4 bytes of length (big-endian) and JSON. The first one holds vocabulary
and limits, and is answered `true`; each later one is a grammar, and is answered with its cost or why it is refused. A
grammar that costs too much ends the process: the kernel kills it at its limit of processor time, and allocations beyond
its limit of memory fail. The script imports nothing of this project, so that it starts quickly and holds no secrets.
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

_MAX_WALK = 1.0  # seconds of processor time


def read_frame(stream: IO[bytes]) -> Any:
    """Return the next document; raises EOFError at the end."""
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
    """The attributes of a tokenizer that llguidance reads."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.is_tokenizer_wrapper = True
        self.tokens = tokens
        self.special_token_ids: list[int] = []
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        raise AssertionError("a grammar forces tokens")


def try_grammar(tokenizer: LLTokenizer, grammar: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Compile, then draw random tokens; return `{"error": ...}`, or `{"bytes": ...}` of memory that it took."""
    before = _resident()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits["parser"]))
    if matcher.is_error():
        return {"error": matcher.get_error()}
    draw = random.Random(0)
    spent: list[float] = []
    while len(spent) < limits["walk"] and sum(spent) < _MAX_WALK:
        began = time.process_time()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        spent.append(time.process_time() - began)
        if matcher.is_error():
            if matcher.stop_reason() in ("NoExtensionBias", "NoExtension") and len(spent) > 1:
                break  # other tokens may lead past this dead end
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
    # The default action: the kernel ends the process, and no Python handler has to run.
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
