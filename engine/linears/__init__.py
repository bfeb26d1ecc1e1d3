"""Linear layers as the machine computes them fastest: one seam (`choice.py`), one file for each implementation."""

from engine.linears.choice import LinearReplacer, prepare_linears

__all__ = ["LinearReplacer", "prepare_linears"]
