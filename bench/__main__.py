"""Every benchmark in turn: `python -m bench`, which is `make bench`."""

from __future__ import annotations

from bench import engine, submission
from bench.report import save

save("engine", engine.measure())
save("submission", submission.measure(20_000))
