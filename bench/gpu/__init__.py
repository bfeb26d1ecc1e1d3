"""Measurements on a GPU that is at hand for minutes: everything in one call, and nothing lost when a part of it fails.

    python3 -m bench.gpu.first_run --seconds 585 --out DIR     on the GPU machine; DIR/first_run.jsonl, DIR/logs.txt
    python3 -m bench.gpu.first_run --dry-run --out DIR         every step with tiny sizes, on the CPU
    python3 -m bench.gpu.record DIR/first_run.jsonl            later, anywhere: into bench/results/ and docs/

No network is needed: models have the shapes of known ones and random weights.
"""
