# Each target installs what it needs by itself: a fresh clone needs only Python 3.11 or newer.
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install browser demo test test-peers test-environments check lint types format peers bench-rollout bench-train bench-sft bench-learning bench-robustness bench-encoder-decoders clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# A headless browser, with which the tests open the report. They skip that one where it can't be had.
browser:
	@command -v chromium > /dev/null && exit 0; \
	if command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && apt-get install -y -qq chromium > /dev/null; \
	else \
		echo "chromium isn't installed: the test that opens the report in a browser will be skipped"; \
	fi

# A small model learns to use a calculator. Offline, on a CPU, in under three minutes.
demo: install
	$(BIN)/python examples/calculator.py --seed $(SEED) --output_dir runs/calculator

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Lets TRL 1.16 make the numbers again that `make test` compares ours with, and fails where they have changed.
test-peers: install
	$(BIN)/python -m benchmarks.peers.install trl1
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m peers

# Adapters for other people's environments, against the real ones. Their packages exclude one another, so each has
# a virtual environment of its own, on top of ours.
test-environments: .venv-openenv/.installed .venv-verifiers/.installed
	HF_HUB_OFFLINE=1 .venv-openenv/bin/python -m pytest tests/environments/adapters/test_openenv.py
	HF_HUB_OFFLINE=1 .venv-verifiers/bin/python -m pytest tests/environments/adapters/test_verifiers.py

.venv-%/.installed: $(STAMP)
	test -x .venv-$*/bin/python || $(BIN)/python -m venv .venv-$*
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> $$(.venv-$*/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	.venv-$*/bin/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The libraries we measure against, each in a virtual environment of its own.
peers: install
	$(BIN)/python -m benchmarks.peers.install

# Rollouts and sampling against TRL 0.7.4, transformers and vLLM, sides taking turns; about 25 minutes.
# Some rows: BENCH_ARGS="--rows sample_vllm hide_tools". Whether they work at all: BENCH_ARGS=--quick.
bench-rollout: install
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Updates and whole steps: time and memory, against TRL 0.7.4, TRL 1.16 and the bare forward and backward.
bench-train: install
	$(BIN)/python -m benchmarks.train $(BENCH_ARGS)

# Supervised fine-tuning: tokens per second and memory, against TRL 1.16 and whole logits; about 15 minutes.
bench-sft: install
	$(BIN)/python -m benchmarks.sft $(BENCH_ARGS)

# What is learnt in equal wall time, ours and TRL's: a table, curves; half an hour on two quiet cores.
bench-learning: install
	$(BIN)/python -m benchmarks.learning $(BENCH_ARGS)

# Practice against more imitation at equal compute: success under noise, on a second task, by time; 25 minutes.
bench-robustness: install
	$(BIN)/python -m benchmarks.robustness $(BENCH_ARGS)

# Encoder–decoders that practise by PPO against ones that imitate on, two families and two tasks; about 20 minutes.
bench-encoder-decoders: install
	$(BIN)/python -m benchmarks.encoder_decoders $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .venv-openenv .venv-verifiers runs benchmarks/results benchmarks/peers/*/.venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
