from __future__ import annotations

from importlib.util import find_spec

# A machine for GPU tests may lack what grammars are compiled with.
collect_ignore = [] if find_spec("llguidance") else ["grammar", "test_structured_generation.py"]
