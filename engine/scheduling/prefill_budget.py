"""How many prompt tokens a step reads, learned from what steps took.

Long steps share a step's fixed cost (the host, reading the weights); short ones let sequences join and leave sooner.
The size doubles from step to step at first, while steps stay short enough. Later the current size and one neighbour
run alternately (small-large, large-small, ...), so that context growth and background load affect both equally. After
six pairs the smaller wins if it is 3 % faster in the median pair and faster in all but one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_FIRST = 256
"""Where it begins, or just below: half a minute with a model of 8 B parameters on two cores."""

_LEAST = 128
"""Below this a CPU's multipliers wait for weights."""

_LONGEST = 10.0
"""Seconds that no step should take, however fast it is for its tokens."""

_PAIRS = 6

_GAIN = 1.03
"""What half as many tokens in a step must be faster by, each."""

_REST = 128
"""Full steps from a comparison that left nothing to try to the next one: the load or the machine may have changed."""

_FEW = 8
"""One token in so many may be a decode's: they cost more than a prompt's, and weigh more in smaller steps."""

_LARGER_IN_TURN = (False, True, True, False)


def candidate_budgets(most: int) -> tuple[int, ...]:
    """`most` and its halves, ascending: what a `PrefillBudgetTuner` may choose from on a CPU."""
    sizes = [most]
    while sizes[0] // 2 >= _LEAST:
        sizes.insert(0, sizes[0] // 2)
    return tuple(sizes)


class PrefillBudgetTuner:
    """Chooses among sizes; with only one there is nothing to measure."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes` in tokens, ascending, each about twice the one before."""
        self._sizes = sizes
        self._chosen = max((place for place, size in enumerate(sizes) if size <= _FIRST), default=0)
        self._is_starting = True
        self._compares_up = False
        """Whether the neighbour that takes turns with the chosen size is the larger one."""
        self._rest = 0
        self._found: list[float] = []
        """Seconds per token of the present comparison's steps, in turn."""

    @property
    def chosen(self) -> int:
        """The best size that is known."""
        return self._sizes[self._chosen]

    @property
    def tokens(self) -> int:
        """Tokens of prompts that the next step should read; decodes come on top."""
        if self._is_starting or self._rest or len(self._sizes) == 1:
            return self.chosen
        return self._sizes[self._smaller + self._is_larger_due]

    @property
    def _smaller(self) -> int:
        """The place of the smaller one of the two that are compared."""
        return self._chosen if self._compares_up else self._chosen - 1

    @property
    def _is_larger_due(self) -> bool:
        return _LARGER_IN_TURN[len(self._found) % 4]

    def record(self, tokens: int, num_decodes: int, seconds: float) -> None:
        """What a step took, with all its tokens and those of them that were decodes'.

        It says nothing unless it was as long as it should be.
        """
        if len(self._sizes) == 1 or tokens < self.tokens:
            return
        if self._is_starting:
            self._go_on_starting(seconds)
        elif seconds * (2 if self._compares_up and not self._is_larger_due else 1) > _LONGEST:
            self._conclude(is_larger_better=False)
        elif self._rest:
            self._rest -= 1
        elif num_decodes * _FEW <= self._sizes[self._smaller]:
            self._found.append(seconds / tokens)
            if len(self._found) == 2 * _PAIRS:
                self._conclude(not self._is_smaller_faster())

    def _go_on_starting(self, seconds: float) -> None:
        if 2 * seconds <= _LONGEST and self._chosen + 1 < len(self._sizes):
            self._chosen += 1
            return
        self._is_starting = False
        self._rest = _REST
        self._compares_up = self._chosen == 0

    def _is_smaller_faster(self) -> bool:
        pairs = zip(self._found[::2], self._found[1::2], strict=True)
        # Every other pair began with the larger size.
        gains = sorted(first / second if place % 2 else second / first for place, (first, second) in enumerate(pairs))
        return statistics.median(gains) >= _GAIN and gains[1] > 1

    def _conclude(self, is_larger_better: bool) -> None:
        self._found = []
        moves = is_larger_better is self._compares_up
        if moves:
            self._chosen += 1 if self._compares_up else -1
        if not moves or self._chosen in (0, len(self._sizes) - 1):
            # Nothing is left to try in this direction. Later, the other one; at an end there is only one.
            self._rest = _REST
            self._compares_up = self._chosen == 0 or (not self._compares_up and self._chosen + 1 < len(self._sizes))
