"""How many tokens each sequence runs in one step."""

from __future__ import annotations

from engine.scheduling.sequence import Sequence


class StepBudget:
    """What is left of a step's tokens and prompt logits. Chunks leave a token to each sequence that decodes."""

    def __init__(self, tokens: int, prompt_logits: int, *, decodes: int) -> None:
        self.tokens = tokens
        self._prompt_logits = prompt_logits
        self._decodes = decodes

    def grant(self, sequence: Sequence, start: int) -> int:
        """How many tokens from `start` on the sequence may run in this step."""
        pending = sequence.num_tokens_to_run_from(start)
        if pending == 1:
            return min(1, self.tokens)
        wanted = min(pending, max(0, self.tokens - self._decodes))
        excess = sequence.prompt_logits(start, start + wanted) - max(0, self._prompt_logits)
        return max(0, wanted - max(0, excess))

    def spend(self, tokens: int, prompt_logits: int, *, decode: bool) -> None:
        """Take what a sequence was given off the budget."""
        self.tokens -= tokens
        if decode:
            self._decodes = max(0, self._decodes - 1)
        self._prompt_logits -= prompt_logits
