# make quickstart and make test need nothing but Python 3.11 or newer, make, and the network once.
# A CPU-only PyTorch on Linux: make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Processes that test side by side: one for each core, but no more than the memory of a laptop bears.
JOBS ?= auto
PARALLEL := -n $(JOBS) --maxprocesses 4 --dist worksteal
# Everything that an installation depends on: when one of these changes, pip runs again.
INPUTS := pyproject.toml constraints.txt

.PHONY: help quickstart test test-full lint bench clean

help:
	@echo "make quickstart   install, train a model in about four minutes, show what it can do"
	@echo "make test         install with the development tools, lint, type-check, test"
	@echo "                  (the web page in Chromium, where there is one)"
	@echo "make test-full    also the slow tests: real weights, wheel, load, a thousand kills"
	@echo "make bench        the benchmarks (docs/en/benchmarks.md); wants a quiet machine"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(INPUTS)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python $(INPUTS)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev,all]"
	@touch $@ $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/scratchlm quickstart

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

test-full: lint
	$(BIN)/python -m pytest -m "full or weights or not full"

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
