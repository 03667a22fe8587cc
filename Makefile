# make demo    the whole pipeline on an embedded synthetic city, with its own environment; a few minutes on two cores
# make test    what CI runs: style, types, the floor rule, the tests
# make gpu     what only a GPU can show, ten minutes at a time, until nothing is left; over the torch of PYTHON, a build
#              for CUDA, where there is no .venv yet
#
# Needs Python 3.11 or newer and make, nothing else. Everything goes into .venv; a change of pyproject.toml or
# constraints.txt installs again. TORCH_INDEX picks another build of torch, for instance on a Linux machine without
# a GPU: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# Python compiles what is imported; having pip compile all of torch and sympy doubles the time of an installation.
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --no-compile -c constraints.txt
TORCH_INDEX ?=
WORKERS ?= 2
MINUTES ?= 10

# An environment may forbid Python to write bytecode: then every process compiles torch and transformers again, and
# takes three times as long to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check bench gpu install-gpu clean

demo: .venv/.installed
	$(BIN)/stdist demo --out runs/demo

# CI=true: hypothesis draws the same examples every time and has no deadlines, whatever the machine. loadfile: what
# tests of one file share, a trained run or learners that wait, is made by one worker and not by all.
test: check
	CI=true OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/.installed
	@set -e; for benchmark in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[!_]*.py)); do \
		$(BIN)/python $$benchmark --json || [ $$? -eq 2 ]; done # 2: a peer is not installed, and the line says which

gpu:
	@$(BIN)/python -c 'import bitsandbytes, hypothesis, pytest, stdist, trl' 2>/dev/null || $(MAKE) --no-print-directory install-gpu
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES)

# The torch that is there fits the card's driver; the one that constraints.txt names may not.
install-gpu:
	@test -x $(BIN)/python || $(PYTHON) -c 'import torch' 2>/dev/null || { \
		echo "install a CUDA build of torch for $(PYTHON) first (https://pytorch.org), or name another PYTHON" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages .venv
	@{ grep -v '^torch==' constraints.txt; $(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")'; } \
		> .venv/constraints-gpu.txt
	@echo "Installing stdist over the torch that is there"
	@$(subst -c constraints.txt,-c .venv/constraints-gpu.txt,$(PIP)) --editable '.[quantised,trl]' hypothesis pytest
	@touch .venv/.torch

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# torch alone and first: beside other packages pip may settle on a build that brings gigabytes of CUDA with it.
.venv/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "stdist needs Python 3.11 or newer; name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@echo "Installing torch"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml
	@echo "Installing stdist and what it needs to run"
	@$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.torch pyproject.toml
	@echo "Installing stdist and what its tests need"
	@$(PIP) --editable '.[dev]'
	@touch .venv/.installed $@
