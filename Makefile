# Everything a checkout can do. Each target makes its own .venv first; nothing else has to be set up.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo check lint types contracts budgets test storm faults invariance docs bench bench-install clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | sort | expand -t 12

$(VENV)/python.stamp:
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: make PYTHON=/path/to/a/newer/python3"; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

# The package alone: what `make demo` needs.
$(VENV)/core.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

# The package with everything the tests need.
$(VENV)/test.stamp: $(VENV)/core.stamp
	$(PIP) --editable '.[test]'
	@touch $@

install: $(VENV)/test.stamp  ## .venv with the package and everything the tests need

demo: $(VENV)/core.stamp  ## the whole life of a small model, six to eight minutes
	$(BIN)/llmtrainer demo

lint: $(VENV)/test.stamp  ## ruff
	$(BIN)/ruff check .

types: $(VENV)/test.stamp  ## mypy
	$(BIN)/mypy

contracts: $(VENV)/test.stamp  ## which part may import which
	$(BIN)/lint-imports

budgets: $(VENV)/test.stamp  ## length of files and functions; no torch on the ground floor
	$(BIN)/python tools/size.py

check: lint types contracts budgets  ## lint, types, contracts, budgets

test: check  ## check, then the whole suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder

invariance: $(VENV)/test.stamp  ## every objective under every re-arrangement, and seeded bugs; fifteen minutes
	$(BIN)/python -m tests.invariants.table --write docs

docs: $(VENV)/test.stamp  ## docs/reference.md and the file list of docs/architecture.md, from the code
	$(BIN)/python tools/docs.py

storm: $(VENV)/test.stamp  ## 500 kills and 100 damaged checkpoints, one process and two; 50 kills of asynchronous rollouts
	$(BIN)/python -m pytest -q tests/training/test_storm.py tests/training/test_checkpoint.py \
	  -k "ends_like_a_quiet_one or crash_at_any" --kills 500 --corruptions 100 --faults 500
	$(BIN)/python -m pytest -q tests/training/test_asynchronous.py -k killed_at_random --kills 500
	$(BIN)/python -m pytest -q tests/training/test_exact_runs.py --exact-steps 60

faults: $(VENV)/test.stamp  ## 40 injected hangs and crashes, each told by rank and cause
	$(BIN)/python -m pytest -q -s tests/parallel/test_faults.py --injected 40

# Peers have environments of their own: litgpt and transformers want different releases of the same packages.
benchmarks/.venv-%/stamp: benchmarks/%.txt | $(VENV)/python.stamp
	"$(PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

bench-install: $(VENV)/core.stamp benchmarks/.venv-peers/stamp benchmarks/.venv-litgpt/stamp  ## what the benchmarks compare with

bench: bench-install  ## ours and the peers on the same work; SMOLLM2=FOLDER names the model for generation
	$(BIN)/python benchmarks/pretrain.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/lora_long.py
	$(BIN)/python benchmarks/dpo.py
	$(BIN)/python benchmarks/grpo.py
	$(BIN)/python benchmarks/asynchronous.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/exact.py
	$(BIN)/python benchmarks/engines_memory.py
	$(BIN)/python benchmarks/slow_link.py

clean:  ## remove .venv and caches; runs/ and .llmtrainer/ stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
