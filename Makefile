# Each target installs what it needs by itself: a fresh clone needs only Python 3.11 or newer.
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test check lint types format bench-rollout clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# A small model learns to use a calculator. Offline, on a CPU, in under three minutes.
demo: install
	$(BIN)/python examples/calculator.py --seed $(SEED) --output_dir runs/calculator

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Episodes per second against TRL 0.7.4's TextEnvironment, both sides in one run.
bench-rollout: install
	$(BIN)/python -m benchmarks.rollout $(BENCH_ARGS)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
