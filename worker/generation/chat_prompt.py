"""The prompt of a conversation, as the model's chat template writes it, and what its answer may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from worker.generation.answer_parts import THINK_BEGIN, THINK_END, AnswerForm
from worker.generation.time_limit import time_limit
from worker.generation.tool_calls import MISTRAL_BEGIN, conversation, tools_of

Message = Mapping[str, Any]

TEMPLATE_LIMIT = 5.0  # seconds for the chat template of one conversation


class ChatRenderer(Protocol):
    """The part of `engine.tokenization` that conversations need."""

    @property
    def chat_template(self) -> str:
        """Its text."""

    def render_chat(self, messages: Sequence[Message], **template_options: Any) -> str:
        """Raises `InvalidPrompt`."""


def render(renderer: ChatRenderer, body: Mapping[str, Any]) -> tuple[str, AnswerForm]:
    """Render the `messages` of a stored line. Raises `InvalidPrompt`, `TimeLimitExceeded`."""
    template = renderer.chat_template
    options = dict(body.get("chat_template_kwargs", {}))
    continues = body.get("continue_final_message", False)
    if continues:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    elif "add_generation_prompt" in body:
        options["add_generation_prompt"] = body["add_generation_prompt"]
    if "tools" in body and body.get("tool_choice") != "none":
        options["tools"] = [{"type": tool["type"], "function": tool["function"]} for tool in body["tools"]]
    messages = conversation(body["messages"], template)
    with time_limit(TEMPLATE_LIMIT):
        text = renderer.render_chat(messages, **options)
    tools = tools_of(body, template)
    is_calling = tools is not None and tools.is_forced and tools.format == "mistral"
    if is_calling:
        # Its mark is a special token, which no grammar writes: the prompt ends with it.
        text += MISTRAL_BEGIN
    thinks = THINK_END in template and not is_calling
    is_thinking = thinks and (
        text.rstrip().endswith(THINK_BEGIN) or (continues and _is_within_reasoning(messages[-1]["content"]))
    )
    return text, AnswerForm(tools, thinks, is_thinking, is_calling)


def _is_within_reasoning(text: str) -> bool:
    return text.rfind(THINK_BEGIN) > text.rfind(THINK_END)
