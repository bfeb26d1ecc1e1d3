"""How many sequences fit, judged by how long outputs turn out to be rather than by how long they may become.

Reserving `max_tokens` for everyone would leave most of the KV cache empty. Instead the lengths of finished outputs are
remembered, each running sequence is expected to go on as those did which came as far, and block use is simulated until
the last one ends. When the forecast was wrong, the scheduler preempts. (The idea is that of Gong et al., "Past-Future
Scheduler for LLM Serving", ASPLOS 2025, and of tokasaurus.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from engine.scheduling.block_manager import BlockManager, CachedBlock
from engine.scheduling.sequence import Sequence

_WINDOW = 2048
_REFRESH = 32

# Expected before anything has finished, and until enough has: the first to finish are the short ones.
_PRIOR_PROMPT = 128
_PRIOR_OUTPUT = 256
_ENOUGH = 16  # finished sequences


class LengthStatistics:
    """Prompt and output lengths of recently finished sequences."""

    def __init__(self, max_model_len: int) -> None:
        self._prior_prompt = min(_PRIOR_PROMPT, max_model_len // 4)
        self._prior_output = min(_PRIOR_OUTPUT, max_model_len // 2)
        self._outputs: deque[int] = deque(maxlen=_WINDOW)
        self._prompts: deque[int] = deque(maxlen=_WINDOW)
        self._prompt_sum = 0
        self._unsorted = 0
        self._sorted: npt.NDArray[np.float64] = np.zeros(0)
        self._sum_from: npt.NDArray[np.float64] = np.zeros(1)

    def record(self, num_prompt: int, num_output: int) -> None:
        if len(self._prompts) == _WINDOW:
            self._prompt_sum -= self._prompts[0]
        self._prompts.append(num_prompt)
        self._prompt_sum += num_prompt
        self._outputs.append(num_output)
        self._unsorted += 1

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length."""
        if len(self._prompts) < _ENOUGH:
            return self._prior_prompt
        return self._prompt_sum / len(self._prompts)

    @property
    def mean_output(self) -> float:
        """Mean output length."""
        return float(self.remaining(np.zeros(1), np.full(1, np.inf))[0])

    def remaining(
        self, num_output: npt.NDArray[np.float64], max_output: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Expected tokens still to come, for sequences that have `num_output` of at most `max_output`; all `[N]`.

        The mean over finished outputs that grew longer; beyond the longest of them, as much again as is there.
        """
        if len(self._outputs) < _ENOUGH:
            expected = np.maximum(self._prior_output, 2 * num_output)
        else:
            self._refresh()
            longer = np.searchsorted(self._sorted, num_output, side="right")
            count = len(self._sorted) - longer
            mean = self._sum_from[longer] / np.maximum(count, 1)
            expected = np.where(count > 0, mean, 2 * num_output)
        result: npt.NDArray[np.float64] = np.maximum(np.minimum(expected, max_output) - num_output, 1)
        return result

    def _refresh(self) -> None:
        if self._unsorted >= _REFRESH or len(self._sorted) == 0:
            self._sorted = np.sort(np.fromiter(self._outputs, dtype=np.float64))
            self._sum_from = np.append(np.cumsum(self._sorted[::-1])[::-1], 0.0)
            self._unsorted = 0


class BlockUsageForecast:
    """Block use of the running batch until its last sequence ends, if nothing else were admitted.

    When the sequence with the k-th most tokens to come ends, the k longest-lived are still there, each grown by that
    many tokens; the highest such sum is the peak. Blocks shared with others count once, under `shared`.
    """

    def __init__(
        self,
        own_blocks: npt.NDArray[np.float64],
        remaining: npt.NDArray[np.float64],
        *,
        shared_blocks: float,
        block_size: int,
    ) -> None:
        """`own_blocks` are the blocks each sequence has and still needs for its known tokens, `remaining` the tokens
        expected after them; both `[running]`."""
        order = np.argsort(-remaining, kind="stable")
        self._own = own_blocks[order]
        self._remaining = remaining[order]
        self._shared = shared_blocks
        self._block_size = block_size

    @property
    def peak(self) -> float:
        return _peak(self._own, self._remaining, self._shared, self._block_size)

    def admit(self, own_blocks: float, remaining: float, revived: int, capacity: float) -> bool:
        """Add one more sequence if the peak then stays within `capacity` blocks.

        `revived` counts cached blocks, free until now, that it would hold.
        """
        place = int(np.searchsorted(-self._remaining, -remaining, side="right"))
        own = np.insert(self._own, place, own_blocks)
        left = np.insert(self._remaining, place, remaining)
        if _peak(own, left, self._shared + revived, self._block_size) > capacity:
            return False
        self._own, self._remaining, self._shared = own, left, self._shared + revived
        return True


def _peak(own: npt.NDArray[np.float64], remaining: npt.NDArray[np.float64], shared: float, block_size: int) -> float:
    if len(own) == 0:
        return shared
    alive = np.arange(1, len(own) + 1)
    return shared + float(np.max(np.cumsum(own) + alive * remaining / block_size))


class AdmissionForecast:
    """The forecast of blocks in terms of sequences: those that run, and those that might join."""

    def __init__(self, running: Iterable[Sequence], blocks: BlockManager, lengths: LengthStatistics) -> None:
        self._blocks = blocks
        self._lengths = lengths
        running = list(running)
        size = blocks.block_size
        held = np.array([len(s.table.blocks) - s.num_shared for s in running], dtype=np.float64)
        known = np.array([s.num_tokens_with_in_flight / size - s.num_shared for s in running], dtype=np.float64)
        own = np.maximum(held, known)
        num_output = np.array([s.num_tokens_with_in_flight - s.num_prompt for s in running], dtype=np.float64)
        max_output = np.array([s.max_output for s in running], dtype=np.float64)
        self._forecast = BlockUsageForecast(
            own,
            lengths.remaining(num_output, max_output),
            shared_blocks=blocks.num_used - float(held.sum()),
            block_size=size,
        )

    @property
    def peak(self) -> float:
        return self._forecast.peak

    def admit(self, sequence: Sequence, cached: list[CachedBlock]) -> bool:
        remaining = self._lengths.remaining(
            np.array([sequence.num_output], dtype=np.float64), np.array([sequence.max_output], dtype=np.float64)
        )
        own = self._blocks.blocks_for(sequence.num_tokens) - len(cached)
        return self._forecast.admit(
            own, float(remaining[0]), self._blocks.num_unreferenced(cached), self._blocks.num_blocks
        )
