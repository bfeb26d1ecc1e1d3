"""Limits on what a grammar may cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llguidance import LLParserLimits


@dataclass(frozen=True, slots=True)
class ParserLimits:
    """llguidance's own limits, below its defaults. Fuel is its measure of work, the same on every machine."""

    max_items_in_row: int = 2_000
    initial_lexer_fuel: int = 500_000
    step_lexer_fuel: int = 50_000
    """For one mask: some 4 ms."""

    step_max_items: int = 20_000
    max_lexer_states: int = 20_000
    """Of one grammar, over all completions that use it; 1 to 2 kB each."""

    max_grammar_size: int = 100_000
    verbose_errors: bool = False
    """A verbose error holds the output so far."""

    def for_llguidance(self) -> LLParserLimits:
        return LLParserLimits(**asdict(self))


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Limits of compilation and trial: a grammar beyond them is refused."""

    seconds: float = 2.0
    """Processor time to compile and to try it."""

    seconds_a_token: float = 0.02
    """Processor time for a mask, on average over the trial."""

    seconds_one_token: float = 0.1
    """Processor time for the slowest of them."""

    walk: int = 32
    """Tokens that the trial draws at most."""

    memory: int = 1 << 30
    """Bytes that a trial process may add to those it started with."""

    patience: float = 60.0
    """Wall-clock seconds after which a trial without an answer is ended."""

    workers: int = 2
    """Grammars compiled at a time, each with a trial process."""

    cached: int = 128
    """Grammars kept for later requests."""

    cached_bytes: int = 256 << 20
    """Bytes of memory that the kept ones may take, as the trial measured them."""

    parser: ParserLimits = field(default_factory=ParserLimits)

    def for_trial(self) -> dict[str, Any]:
        return asdict(self)
