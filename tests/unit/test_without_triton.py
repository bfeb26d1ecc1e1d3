"""On a machine that Triton is not built for, the engine imports and generates, and a GPU's attention is refused."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import REPOSITORY

# None in `sys.modules` is how Python itself says that a module is not to be found.
PROGRAM = """
import json, sys

sys.modules["triton"] = None

from engine import Engine, EngineConfig, SamplingParams
from engine.errors import ModelError

def generate(**options):
    engine = Engine.from_pretrained("demo/model", EngineConfig(device="cpu", num_kv_blocks=64, **options))
    return engine.generate(["17 + 58 ="], SamplingParams(temperature=0, max_tokens=4))[0].text.strip()

found = [generate(attention="torch"), generate(), generate(deterministic=True)]
try:
    generate(attention="triton")
except ModelError as error:
    found.append(error.message)
print(json.dumps(found))
"""


def test_engine_generates_and_refuses_what_needs_kernels() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *texts, refusal = json.loads(done.stdout)
    assert texts == ["75", "75", "75"]
    assert "Triton is not installed" in refusal
