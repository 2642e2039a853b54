# Every target works on a fresh machine that has Python 3.11 or newer: it makes .venv, installs the
# versions of constraints.txt into it, and runs. A second call finds the stamps and starts at once.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.core ## describe the bundled clip with the bundled model
	$(BIN)/vidlm demo

test: .venv/.dev ## run the tests, without those marked slow, hub or gpu
	$(BIN)/python -m pytest -q

lint: .venv/.dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## check the types
	$(BIN)/mypy

bench: .venv/.bench ## run every benchmark; each prints one line of JSON
	@set -e; for script in $(BENCHMARKS); do $(BIN)/python $$script; done

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vidlm needs Python 3.11 or \
	newer, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@echo "installing into .venv, which takes some minutes the first time"
	@$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml constraints.txt | .venv/bin/pip
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# torchvision is an oracle of the tests, which use its pure torch functions only; without its
# dependencies it fits any build of torch.
.venv/.dev: pyproject.toml constraints.txt | .venv/bin/pip
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install -c constraints.txt --no-deps torchvision
	@touch .venv/.core $@

.venv/.bench: .venv/.dev
	@$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@
