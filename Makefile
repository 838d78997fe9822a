# `make demo` and `make test` set up everything they need in .venv/. `make env` does only that.
#
#   PYTHON=python3.12 make env     another interpreter (default: python3)
#   make demo MODEL=wan            another of the tiny models (docs/tiny.md)
#   make demo SLICES=6             six words, six jobs, one merge that keeps them all (docs/loraid.md)
#   make test ARGS="-k lora -x"    arguments for pytest (default: as many processes as cores, at most 8)
#   make mutate ONLY='hvtrain.flow.*'   plant bugs and see whether the tests notice (tests/mutate.py)

PYTHON ?= python3
ARGS ?= -n auto --maxprocesses 8 --dist loadfile
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# One thread per process: tests and the demo start several processes. No library may ask a hub for files.
# Bytecode is kept, whatever the shell says: hundreds of processes would compile the same modules.
ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=

.PHONY: demo test lint mutate env clean

demo: $(STAMP)
	@$(ENV) $(BIN)/python -m launcher demo $(if $(MODEL),--model $(MODEL)) $(if $(SLICES),--slices $(SLICES))

test: $(STAMP)
	@$(ENV) $(BIN)/python -m pytest $(ARGS)

# Hours the first time; stopped, it goes on. No part of `make test`.
mutate: $(STAMP)
	@$(ENV) $(BIN)/python -m tests.mutate $(ONLY)

lint: $(STAMP)
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m mypy

env: $(STAMP)

# torch first, by its exact version: the others then take the build that is there.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv/ (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) $$(grep '^torch==' constraints.txt)
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv mutants build *.egg-info .pytest_cache .mypy_cache .ruff_cache
