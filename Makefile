# The first target that needs it creates .venv and installs the pinned versions of .ci/constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two processes that each start a thread per core slow each other down tenfold.
export OMP_NUM_THREADS ?= 1

# Shapes in signatures are checked while tests run. Not in addopts: make gpu runs where jaxtyping's checker may be missing.
PYTEST := $(BIN)/python -m pytest --jaxtyping-packages=ntk_monitor,tests.typechecked.typechecked --hypothesis-profile=ci
# One process for each core; every one of them has a single thread.
PARALLEL := -n logical --dist worksteal
COVERAGE := --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

.PHONY: help demo test test-all browser check format bench gpu clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## train a small network on real data and watch its kernel
	$(BIN)/ntk-monitor demo

test: $(STAMP) ## what CI runs: quick tests and coverage
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu" $(COVERAGE)

test-all: $(STAMP) ## every test that needs no accelerator
	$(PYTEST) $(PARALLEL) -m "not gpu" $(COVERAGE)

browser: ## install the browser that tests of the NTK tab drive (Debian, as root); without it they are skipped
	apt-get update -qq && apt-get install -qq -y chromium chromium-driver

check: $(STAMP) ## formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## time what users wait for
	$(BIN)/python -m tests.benchmarks.run
	$(BIN)/python -m tests.benchmarks.overhead
	$(BIN)/python -m tests.benchmarks.analyze
	$(BIN)/python -m tests.benchmarks.dashboard

# Installs nothing: a machine with an accelerator is often offline and has its own torch. Only files with gpu tests are
# collected, since others may import test tools that it lacks; and its versions are not ours, so warnings are no errors.
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests)
gpu: ## tests and benchmark on an accelerator, with the Python that is there
	$(if $(GPU_TESTS),$(PYTHON) -m pytest -m gpu -o addopts="" -W default $(GPU_TESTS),@echo "no test is marked gpu")
	$(PYTHON) -m tests.benchmarks.run

# --group needs pip 25.1; the pip that a new virtual environment brings is often older.
$(STAMP): pyproject.toml setup.cfg .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable . --group test --group lint
	touch $@

clean: ## remove what builds and tests left behind; .venv stays
	rm -rf build dist ntk_monitor.egg-info .coverage htmlcov
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
