"""A step cut into passes of always the same number of rows, so that what else is in a step changes no bit.

    entries   A: 40 tokens    B: 1    C: 1
    passes    A A A … A A (32)  |  A … A (8) B C 0 … 0 (22 of padding)

Libraries choose how to compute a product or a vector by its shape. With one shape there is one way, and each row of a
pass comes out the same wherever it stands, beside any others; `engine/execution/batch_invariance.py` tries
that at load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.batch import BatchEntry
from engine.linears.tiled import ROWS
from engine.models.decoder import TokenInputs


@dataclass(frozen=True, slots=True)
class Piece:
    """What one pass computes of one entry."""

    place: int
    """The entry's place in the step."""

    entry: BatchEntry
    first_logit: int
    """Which of the entry's logits its own begin with."""


def split_into_passes(entries: Sequence[BatchEntry]) -> Iterator[list[Piece]]:
    """Passes of at most `ROWS` tokens, in an order in which all keys are there when they are looked at.

    An entry may look at blocks that another one of the step fills. Those lie before its own first token, so that who
    fills them starts earlier.
    """
    tile: list[Piece] = []
    room = ROWS
    for place in sorted(range(len(entries)), key=lambda place: entries[place].start):
        entry = entries[place]
        length = len(entry.token_ids)
        quiet = length - entry.num_logits
        done = 0
        while done < length:
            end = min(length, done + room)
            part = replace(
                entry,
                token_ids=entry.token_ids[done:end],
                start=entry.start + done,
                num_logits=max(0, end - max(done, quiet)),
            )
            tile.append(Piece(place, part, max(0, done - quiet)))
            room -= end - done
            done = end
            if not room:
                yield tile
                tile, room = [], ROWS
    if tile:
        yield tile


def pad_pass(inputs: TokenInputs) -> TokenInputs:
    """Inputs of `ROWS` tokens that want the logits of `ROWS` rows or of none.

    What is added repeats the last token and the first wanted row; its results are not read.
    """
    missing = ROWS - len(inputs.token_ids)

    def padded(rows: Tensor) -> Tensor:
        return torch.cat((rows, rows[-1:].expand(missing))) if missing else rows

    wanted = inputs.logit_rows
    if wanted is None:
        wanted = torch.arange(len(inputs.token_ids), device=inputs.token_ids.device)
    if len(wanted):
        wanted = torch.cat((wanted, wanted[:1].expand(ROWS - len(wanted))))
    return TokenInputs(padded(inputs.token_ids), padded(inputs.positions), padded(inputs.lengths), wanted)
