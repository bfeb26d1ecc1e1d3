"""Whose turn it is: the rule by which a worker that serves several models goes from one to the next.

The present model goes on while a line waits for it. It gives way

- to the model that waits longest, once no line waits for the present one: at once, or where another worker runs that
  model when it has waited for as long as the switch takes;
- although lines wait for it, to a model that no other worker runs, when that one's lines and the present turn are both
  older than a bound: `switch_after`, and at least `COST_FACTOR` times what the switch and the way back cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from jobs.queries.demand import Demand

COST_FACTOR = 10.0  # so that about a tenth of the time goes into switches
LIVE_SWITCH_AFTER = 1.0  # seconds, in the place of `switch_after` where a caller waits


class Turns:
    """Decides from each model's demand. With n models that all have lines, each has a turn within n - 1 bounds."""

    def __init__(
        self,
        models: Collection[str],
        *,
        switch_after: float,
        cost: Callable[[str], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cost` tells how many seconds it takes to switch to a model and back; 0 where both stay loaded."""
        self._switch_after = switch_after
        self._cost = cost
        self._clock = clock
        self._began = clock()  # the present turn
        self._left = dict.fromkeys(models, self._began)

    def end_turn(self, model: str) -> None:
        """The worker turns from `model` to another one."""
        self._began = self._left[model] = self._clock()

    def following(self, present: str, demands: Mapping[str, Demand]) -> str | None:
        """The model to turn to; None where the present one goes on."""
        others = {model: demand for model, demand in demands.items() if model != present}
        if present in demands:
            starving = [model for model, demand in others.items() if self._starves(model, demand)]
            # By their last turns: by their lines, of two with long queues one would never be left out.
            return min(starving, key=self._left.__getitem__, default=None)
        waiting = {
            model: (demand.live_waiting is not None, self._since_its_turn(model, demand.waiting))
            for model, demand in others.items()
            if not demand.is_served or self._since_its_turn(model, demand.waiting) > self._cost(model)
        }
        return max(waiting, key=waiting.__getitem__, default=None)

    def _starves(self, model: str, demand: Demand) -> bool:
        if demand.is_served:
            return False
        turn, cost = self._clock() - self._began, COST_FACTOR * self._cost(model)
        return min(turn, demand.waiting) > max(self._switch_after, cost) or (
            demand.live_waiting is not None and min(turn, demand.live_waiting) > max(LIVE_SWITCH_AFTER, cost)
        )

    def _since_its_turn(self, model: str, waiting: float) -> float:
        return min(waiting, self._clock() - self._left[model])
