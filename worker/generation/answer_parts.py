"""A chat's text taken apart while it is generated: reasoning, content, tool calls.

    <think> reasoning </think> content <tool_call>{…}</tool_call>

What is given out is never taken back: text that may yet turn out to be a mark, a call or blanks before one is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from worker.generation.text_stream import overlap
from worker.generation.tool_calls import HERMES_BEGIN, HERMES_END, MISTRAL_BEGIN, Tools, call_id, read_calls

THINK_BEGIN, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may hold beside its content."""

    tools: Tools | None = None
    thinks: bool = False
    """The template knows reasoning: an answer may begin with it."""
    is_thinking: bool = False
    """The prompt has begun it already."""
    is_calling: bool = False
    """The prompt has begun the calls already."""


def reasoning_tokens(token_ids: Sequence[int], token_bytes: Callable[[int], bytes], form: AnswerForm) -> int:
    """Tokens of an answer's reasoning, its marks among them."""
    text = b""
    for count, token_id in enumerate(token_ids, 1):
        text += token_bytes(token_id)
        if not form.is_thinking and not _may_begin(text.lstrip(), THINK_BEGIN.encode()):
            return 0
        if text.endswith(THINK_END.encode()) or THINK_END.encode() in text[-64:]:
            return count
    return len(token_ids)


def _may_begin(text: bytes, mark: bytes) -> bool:
    return text.startswith(mark) or mark.startswith(text)


class AnswerParts:
    """One answer. `name` is unique in the service, and tool calls have their ids from it."""

    def __init__(self, form: AnswerForm, name: str) -> None:
        self._form = form
        self._name = name
        self._rest = ""
        """What is not taken apart yet."""
        self._blanks = ""
        """Blanks at the end of what is given out, dropped where the part ends."""
        self._skips_blanks = form.is_thinking
        self._step: Callable[[bool], bool] = self._begin
        if form.is_thinking:
            self._step = self._reason
        elif form.is_calling:
            self._step = self._whole_call
        self.reasoning = ""
        self.content = ""
        self.calls: list[dict[str, Any]] = []

    def feed(self, text: str) -> None:
        """Take in more of the text."""
        self._rest += text
        while self._step(False):
            pass

    def end(self) -> None:
        """There is no more text."""
        while self._step(True):
            pass
        if self._step == self._speak and not self.calls:
            self.content += self._blanks
        self._blanks = ""

    def finish_reason(self, reason: str) -> str:
        """The reason that is told for an answer that the engine ended for `reason`."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def message(self) -> dict[str, Any]:
        """The answer's message, whole."""
        is_plain = not self.calls and not self.reasoning
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.content if is_plain else self.content or None,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    # Steps: each takes something off `_rest`, and says whether there is more to do. At the end nothing is held.

    def _begin(self, is_end: bool) -> bool:
        begun = self._rest.lstrip()
        if self._form.thinks and begun.startswith(THINK_BEGIN):
            self._rest = begun[len(THINK_BEGIN) :]
            return self._go(self._reason)
        may_think = self._form.thinks and THINK_BEGIN.startswith(begun[: len(THINK_BEGIN)])
        if (may_think or not begun) and not is_end:
            return False
        self._step = self._open
        return True

    def _reason(self, is_end: bool) -> bool:
        text, is_found = self._up_to(THINK_END, is_end)
        self.reasoning += self._trimmed(text)
        return self._go(self._open) if is_found else False

    def _open(self, is_end: bool) -> bool:
        """The first of the content decides whether all of it is a call, where calls have no mark of their own."""
        begun = self._rest.lstrip()
        if not begun and not is_end:
            return False
        tools = self._form.tools
        is_call = tools is not None and tools.format == "llama" and begun.startswith("{")
        self._step = self._whole_call if is_call else self._speak
        return True

    def _speak(self, is_end: bool) -> bool:
        tools = self._form.tools
        if tools is None or tools.format == "llama":
            text, self._rest = self._rest, ""
            self.content += self._trimmed(text)
            return False
        mark = HERMES_BEGIN if tools.format == "hermes" else MISTRAL_BEGIN
        text, is_found = self._up_to(mark, is_end)
        self.content += self._trimmed(text)
        if is_found:
            # The blanks before it are content where it proves to be no call.
            if tools.format == "hermes":
                self._step = self._tagged_call
            else:
                self._rest = mark + self._rest
                self._step = self._whole_call
        return is_found

    def _tagged_call(self, is_end: bool) -> bool:
        inner, mark, rest = self._rest.partition(HERMES_END)
        if not mark and not is_end:
            return False
        # A model may leave out the last mark.
        if self._call(inner):
            self._rest = rest
            return self._go(self._speak)
        self.content += self._trimmed(HERMES_BEGIN + inner + mark)
        self._rest = rest
        self._step = self._speak
        return bool(rest)

    def _whole_call(self, is_end: bool) -> bool:
        if not is_end:
            return False
        text, self._rest = self._rest, ""
        if not self._call(text.strip().removeprefix(MISTRAL_BEGIN)):
            self.content += self._trimmed(text)
            self._step = self._speak
        return False

    def _call(self, text: str) -> bool:
        tools = self._form.tools
        calls = None if tools is None else read_calls(text, tools)
        if tools is None or calls is None:
            return False
        for name, arguments in calls:
            if tools.is_single and self.calls:
                break
            function = {"name": name, "arguments": arguments}
            self.calls.append({"id": call_id(self._name, len(self.calls)), "type": "function", "function": function})
        return True

    def _go(self, step: Callable[[bool], bool]) -> bool:
        """Begin another part: blanks around it say nothing."""
        self._step, self._blanks, self._skips_blanks = step, "", True
        return True

    def _up_to(self, mark: str, is_end: bool) -> tuple[str, bool]:
        """Take the text before `mark`, and the mark; what may be its beginning stays."""
        text, found, rest = self._rest.partition(mark)
        if found:
            self._rest = rest
            return text, True
        kept = 0 if is_end else overlap(text, mark)
        self._rest = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def _trimmed(self, text: str) -> str:
        if self._skips_blanks:
            text = text.lstrip()
            self._skips_blanks = not text
        text = self._blanks + text
        spoken = text.rstrip()
        self._blanks = text[len(spoken) :]
        return spoken
