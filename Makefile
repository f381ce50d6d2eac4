# Every target makes .venv if it is missing, incomplete, or older than pyproject.toml or constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python that is new enough; choose another with `make PYTHON=/path/to/python ...`.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && command -v $$p && break; done)

export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: distill test check repro bench pack clean help

distill: $(STAMP)  ## distil the default student: prompts, anchors, training, evaluation, report
	kedro run --pipeline=distill

test: $(STAMP)  ## run all tests
	OMP_NUM_THREADS=1 pytest

check: $(STAMP)  ## check style and import contracts
	ruff check
	ruff format --check
	lint-imports

repro: $(STAMP)  ## the same through DVC: runs only stages that changed
	dvc repro

bench: $(STAMP)  ## run all benchmarks
	@set -e; export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; for bench in benchmarks/bench_*.py; do echo "== $$bench"; python "$$bench"; done

pack:  ## write the ComfyUI pack as branch comfy-pack, for a repository of its own
	git subtree split -q --prefix=comfy_nodes --branch=comfy-pack

clean:  ## remove files made by runs and tools (not .venv, not DVC's cache)
	git clean -qfdX -- data logs
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The stamp is written last, so that the next target completes an interrupted installation.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Error: no Python >= 3.11 found: install one, or set its path: make PYTHON=/path/to/python"; exit 1; }
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
